"""What a run folder holds, read for the report.

Letters: N rows that have a metric.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from jaxtyping import Float64

from jaxdistill.errors import DataError
from jaxdistill.metrics.rows import read_rows


class Series(NamedTuple):
    """One metric over the steps that have it; NaN where its value was not finite."""

    steps: Float64[np.ndarray, " N"]
    values: Float64[np.ndarray, " N"]

    def finite(self) -> "Series":
        """The points whose value is a number."""
        keep = np.isfinite(self.values)
        return Series(self.steps[keep], self.values[keep])


@dataclass(frozen=True)
class RunData:
    """A run folder's contents; None or empty where a file is missing.

    `config_text` is config.yaml as it stands, `config` the same parsed.
    """

    name: str
    rows: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    config_text: str | None
    config: Mapping[str, Any]
    manifest: Mapping[str, Any] | None

    def series(self, key: str) -> Series:
        """The metric `key` over the rows that have it."""
        pairs = [(row["step"], row[key]) for row in self.rows if key in row]
        steps = np.array([step for step, _ in pairs], np.float64)
        values = np.array([_number(value) for _, value in pairs], np.float64)
        return Series(steps, values)

    def keys(self, prefix: str) -> list[str]:
        """Every metric that begins with `prefix`, in order of appearance."""
        return list(dict.fromkeys(key for row in self.rows for key in row if key.startswith(prefix)))

    def setting(self, path: str) -> Any:
        """The configuration's value at a dotted path, None where there is none."""
        node: Any = self.config
        for part in path.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        return node


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def read_run(run_dir: Path) -> RunData:
    """Reads a run folder. Raises DataError where the folder or metrics.jsonl is missing, or a file
    cannot be read as what it should be."""
    if not run_dir.is_dir():
        raise DataError(f"{run_dir}: no such folder; expected a run folder, as `run.dir` names it")
    metrics = run_dir / "metrics.jsonl"
    if not metrics.is_file():
        raise DataError(f"{run_dir}: has no metrics.jsonl, so it is no run folder, or nothing was logged yet")
    config_text = _text(run_dir / "config.yaml")
    return RunData(
        name=run_dir.resolve().name,
        rows=read_rows(metrics),
        samples=read_rows(run_dir / "samples.jsonl"),
        config_text=config_text,
        config=_config(config_text, run_dir / "config.yaml"),
        manifest=read_manifest(run_dir / "manifest.json"),
    )


def _text(path: Path) -> str | None:
    return path.read_text("utf-8", errors="replace") if path.is_file() else None


def _config(text: str | None, path: Path) -> Mapping[str, Any]:
    try:
        config = yaml.safe_load(text) if text else {}
    except yaml.YAMLError as error:
        raise DataError(f"{path}: expected YAML, got {' '.join(str(error).split())}; restore it") from error
    return config if isinstance(config, Mapping) else {}


def read_manifest(path: Path) -> Mapping[str, Any] | None:
    """A run's manifest.json, None where there is none. Raises DataError where it is no JSON."""
    text = _text(path)
    if text is None:
        return None
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: expected a JSON object, got {text[:80]!r} ({error}); restore it") from error
    return manifest if isinstance(manifest, Mapping) else {"manifest": manifest}
