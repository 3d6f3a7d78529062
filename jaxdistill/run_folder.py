"""The folder of one run: whose it is, that only one process writes it, and which config it belongs to."""

import fcntl
import logging
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from jaxdistill.config import flat
from jaxdistill.errors import ConfigError
from jaxdistill.metrics import write_atomically

logger = logging.getLogger(__name__)

# Settings that may change between two parts of a run, because no number of it depends on them: where
# things are, how patiently a server is asked, how often something is written.
_FREE = re.compile(
    r"(run\.dir|run\.tensorboard|run\.wandb|run\.trackio|run\.compilation_cache|run\.max_hours|run\.barrier_timeout_s|optimizer\.max_skipped|checkpoint\..*"
    r"|sampler\.weights|(sampler|teacher|teachers\.\d+)\.(endpoint|api_key_env|record|canary_tolerance|attempts|backoff_(max_)?s|breaker_.*|hedge_share"
    r"|max_concurrency|max_unscored|request_timeout_s|batch_budget_s|start_timeout_s)(\..*)?)"
)


@contextmanager
def open_run_folder(folder: Path, resolved: str, steps: int, allowed: Collection[str] = ()) -> Iterator[Path]:
    """Take `folder` for a run with the config `resolved` (YAML) that ends at `steps`.

    Until the context ends no other process can take it. A new folder is made; one whose run has begun
    must be of the same config, but for settings no number depends on and those `allowed` to change, by their
    dotted names. Raises `ConfigError` for a folder of something else, in use, of another config (the
    differing keys are named), already beyond `steps`, or not writable; in all those cases nothing in it was
    changed.
    """
    try:
        _check_place(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("a") as lock:
            _take(lock, folder, fcntl.LOCK_EX)
            _check_run(folder, resolved, steps, allowed)
            _warn_of_moved_ends(folder, resolved, steps)
            write_atomically(folder / "config.yaml", resolved.encode())
            yield folder
    except OSError as error:
        if error.filename is None or not str(error.filename).startswith(str(folder)):
            raise
        raise ConfigError(
            f"run.dir={folder} cannot be written ({error.strerror}); choose another folder"
        ) from error


def _take(lock: Any, folder: Path, kind: int) -> None:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            f"run.dir={folder} is being written by another process; wait for it, or use another run.dir"
        ) from error


def config_of(folder: Path) -> Path:
    """The config.yaml of the run in `folder`. Raises `ConfigError` where there is none."""
    if not (folder / "config.yaml").is_file():
        what = "has no config.yaml" if folder.is_dir() else "is not there"
        raise ConfigError(f"{folder} is no run folder: it {what}; name the run.dir of a run")
    return folder / "config.yaml"


def has_begun(folder: Path) -> bool:
    """Whether a run has done anything in `folder` that another part of it would go on from."""
    metrics = folder / "metrics.jsonl"
    return bool(_saved(folder)) or (metrics.is_file() and metrics.stat().st_size > 0)


def _saved(folder: Path) -> list[int]:
    return [int(p.name) for p in folder.glob("checkpoints/*") if p.name.isdigit()]


def check_run_folder(folder: Path, resolved: str, steps: int, allowed: Collection[str] = ()) -> None:
    """Raise `ConfigError` where `open_run_folder` would, before anything is loaded or started for the run;
    nothing is kept or written."""
    _check_place(folder)
    if (folder / ".lock").is_file():
        with (folder / ".lock").open() as lock:  # shared: several processes of a run may ask at once
            _take(lock, folder, fcntl.LOCK_SH)
    _check_run(folder, resolved, steps, allowed)


def _check_place(folder: Path) -> None:
    """Whether a run can be there at all."""
    there = next(
        place for place in (folder, *folder.absolute().parents) if os.path.exists(place)
    )  # unlike its method this never raises
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "no permission to write there" if there.is_dir() else "no folder"
        raise ConfigError(f"run.dir={folder} cannot be written ({there}: {why}); choose another folder")
    if there == folder and any(folder.iterdir()) and not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"run.dir={folder} is not empty and holds no run (no config.yaml); choose another folder"
        )


def _check_run(folder: Path, resolved: str, steps: int, allowed: Collection[str]) -> None:
    """Whether a run that has begun there can go on as this one."""
    if not has_begun(folder):
        return  # whatever config stands there binds nobody
    saved = _saved(folder)
    if said := config_difference(folder, resolved, allowed):
        raise ConfigError(
            f"run.dir={folder} holds a run with another config ({said}); use another run.dir, remove the "
            "folder to start anew, or go on with the change by --allow-changed and the setting's name"
        )
    if max(saved, default=0) > steps:
        raise ConfigError(
            f"run.dir={folder} is at step {max(saved)}, beyond run.steps={steps}; raise run.steps, or use "
            "another run.dir"
        )


def _warn_of_moved_ends(folder: Path, resolved: str, steps: int) -> None:
    """Say what moves in the run of `folder` where it goes on to another last step."""
    if not has_begun(folder):
        return
    old, new = _both(folder, resolved)
    if old.get("run.steps") != steps:
        moving = ["the cosine schedule"] if new.get("optimizer.schedule") == "cosine" else []
        moving += [k for k in new if k.startswith("rollout.origins.") and isinstance(new[k], list)]
        if moving:
            logger.warning(
                "run.steps was %s and is %s: %s now ends at the new last step",
                old.get("run.steps"),
                steps,
                " and ".join(moving),
            )


def config_difference(folder: Path, resolved: str, allowed: Collection[str] = ()) -> str:
    """How the config of the run in `folder` is another than `resolved` (YAML), in words, but for settings
    that are `allowed` to be; empty where a run with this one would go on from it, or is what it made."""
    old, new = _both(folder, resolved)
    changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    bound = [k for k in changed if k != "run.steps" and k not in allowed and not _FREE.fullmatch(k)]
    return "; ".join(f"{k}: {old.get(k, 'not set')} there, {new.get(k, 'not set')} now" for k in bound)


def _both(folder: Path, resolved: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every setting of the run in `folder`, and of `resolved`, by its dotted name."""
    path = folder / "config.yaml"
    try:
        return flat(yaml.safe_load(path.read_text())), flat(yaml.safe_load(resolved))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"{path} cannot be read ({said}); restore it, or use another run.dir") from error
