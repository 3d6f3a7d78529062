"""A run folder as a run would leave it, from a seed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxdistill.metrics import RowFile, Sample, SampleLog

CONFIG = """\
run:
  dir: runs/quickstart
  seed: 0
  steps: {steps}
student:
  path: models/toy-student
teacher:
  kind: embedded
  path: models/toy-teacher
objective:
  kind: reverse_kl
  signal: chunk
  credit: lookahead
note: <b>not markup</b> & "quoted"
"""
QUESTIONS = (
    ("Anna has 37 apples and buys 48 more. How many now?", "85", "37 + 48 = 85", "37 + 48 = 75"),
    ("A café sells 12 crêpes an hour. How many in 7 hours?", "84", "12 * 7 = 84", "12 + 7 = 19"),
    ("How many legs have 9 spiders <each 8>?", "72", "9 * 8 = 72", "9 * 8 = 72"),
    ("Jürgen walks 3 km. How many metres?", "3000", "3 * 1000 = 3000", "3 * 100 = 300"),
)


def rows(steps: int, *, evaluate_every: int, seed: int = 0) -> list[dict[str, Any]]:
    """Metrics that fall and rise as in a run that goes well."""
    rng = np.random.default_rng(seed)
    out: list[dict[str, Any]] = []
    for step in range(steps + 1):
        part = step / steps
        row: dict[str, Any] = {"step": step}
        if step % evaluate_every == 0 or step == steps:
            row["eval/accuracy"] = 0.105 + 0.7 * (1 - np.exp(-4 * part)) + rng.normal(0, 0.01)
            row["eval/reverse_kl_per_byte"] = 0.41 * np.exp(-2.2 * part) + 0.02
            row["eval/coverage"] = 0.99 + 0.009 * part
            row["eval/teacher_logprob_per_byte"] = -0.7 * np.exp(-2 * part) - 0.1
            row["eval/references/student_bits_per_byte"] = 0.3 + 0.9 * np.exp(-3 * part)
            row["eval/references/teacher_bits_per_byte"] = 0.25
            row["eval/references/cross_entropy_gap_per_byte"] = 0.03 + 0.6 * np.exp(-3 * part)
        if step < steps:
            row |= {
                "loss": rng.normal(0, 0.04) - 0.2 * np.exp(-3 * part),
                "reverse_kl_per_byte": (0.41 * np.exp(-2.2 * part) + 0.03) * rng.lognormal(0, 0.2),
                "coverage": 1 - 0.02 * np.exp(-3 * part) * rng.uniform(),
                "exact_fraction": 0.34 + 0.1 * part + rng.normal(0, 0.02),
                "tokens_per_second": rng.normal(5200, 300) if step else 410.0,
                "reward": min(1.0, max(0.0, 0.1 + 0.6 * part + rng.normal(0, 0.05))),
                "reward_spread": min(1.0, max(0.0, 0.4 - 0.2 * part + rng.normal(0, 0.05))),
                "grad_norm": rng.lognormal(0, 0.4),
                "learning_rate": 1e-3 * np.cos(np.pi / 2 * part),
                "recompiles": 0,
                "seconds/train": rng.normal(0.31, 0.02) if step else 14.2,
                "seconds/sample": rng.normal(0.14, 0.02) if step else 6.1,
                "seconds/teacher": rng.normal(0.1, 0.02),
                "seconds/align": rng.normal(0.02, 0.002),
                "teacher/requests": 3.0,
                "teacher/retries": float(rng.poisson(0.3)) if 0.4 < part < 0.5 else 0.0,
                "teacher/hedges": float(rng.poisson(0.1)),
                "teacher/bad_reply": 0.0,
            }
        row["elapsed_seconds"] = 20 + 0.57 * step
        out.append(row)
    return out


def samples(step: int, *, good: bool) -> list[Sample]:
    """The same questions at any step, answered well or badly."""
    out = []
    for question, answer, right, wrong in QUESTIONS:
        line = right if good else wrong
        head, number = line.rsplit(" ", 1)
        pieces: list[list[Any]] = [
            [head, "exact", -0.2], [f" {number}", "chunk", 0.4 if good else -4.0], ["<|end|>", "role", 0.0]
        ]  # fmt: skip
        if not good:
            pieces.insert(1, [" ü�", "unaligned", None])
        text = "".join(piece for piece, kind, _ in pieces if kind != "role")
        out.append(
            Sample(
                messages=[{"role": "user", "content": question}],
                response=text,
                answer=answer,
                score=float(line == right),
                reverse_kl_per_byte=0.04 if good else 0.4 + 0.01 * step,
                alignment={"pieces": pieces},
            )
        )
    return out


def write_run(
    folder: Path, *, steps: int = 90, evaluate_every: int = 10, seed: int = 0, copies: int = 1
) -> Path:
    """Writes a whole run folder, its samples `copies` times, and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    RowFile(folder / "metrics.jsonl").append(rows(steps, evaluate_every=evaluate_every, seed=seed))
    log = SampleLog(folder)
    log.log(0, samples(0, good=False) * copies)
    log.log(steps, samples(steps, good=True) * copies)
    (folder / "config.yaml").write_text(CONFIG.format(steps=steps))
    manifest = {"versions": {"jax": "0.12.0", "python": "3.12"}, "hardware": {"devices": ["cpu"], "cores": 2}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def make_run() -> Callable[..., Path]:
    """`write_run`, for tests: modules beside a test are not importable from it."""
    return write_run
