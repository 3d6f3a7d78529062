r"""A genuine SGLang server, whose address stands in JAXDISTILL_SGLANG_URL, and this package's own beside it.

    .venv/bin/python scripts/sglang_cpu.py run --model assets/toy/teacher -- \
        .venv/bin/python -m pytest -m live tests/live

The tests know two models, the toy teacher and SmolLM2-135M-Instruct; the values are those of float32. They
change the server's weights and take them back: one process at a time.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
CACHE = Path(os.environ.get("JAXDISTILL_CACHE", "~/.cache/jaxdistill")).expanduser()
URL_VARIABLE = "JAXDISTILL_SGLANG_URL"
ATOL = 1e-4
# What /model_info and /v1/models say of the models whose values are known here.
MODELS = {
    ("qwen3", 512): ("toy_teacher", ROOT / "assets" / "toy" / "teacher"),
    ("llama", 8192): ("smollm2", CACHE / "smollm2-135m-instruct"),
}


@dataclass(frozen=True)
class Server:
    """One server of a known model, as plain HTTP."""

    url: str
    name: str
    folder: Path
    context: int

    def ask(self, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and decoded reply; the words themselves where it is not JSON."""
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data=data, headers={"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=300) as reply:
                status, content = reply.status, reply.read()
        except HTTPError as error:
            with error:
                status, content = error.code, error.read()
        try:
            return status, json.loads(content)
        except json.JSONDecodeError:
            return status, content.decode()

    def generate(self, **body: Any) -> Any:
        """The reply to a request that is in order."""
        status, reply = self.ask("/generate", body)
        assert status == 200, reply
        return reply


@pytest.fixture(scope="session")
def genuine() -> Server:
    """The genuine server."""
    url = os.environ.get(URL_VARIABLE, "").rstrip("/")
    if not url:
        pytest.skip(f"{URL_VARIABLE} is not set; run these with: python scripts/sglang_cpu.py run ...")
    try:
        with urlopen(f"{url}/model_info", timeout=30) as reply:
            info = json.loads(reply.read())
        with urlopen(f"{url}/v1/models", timeout=30) as reply:
            context = json.loads(reply.read())["data"][0]["max_model_len"]
    except (URLError, OSError) as error:
        pytest.fail(f"{URL_VARIABLE}={url} does not answer: {error}")
    known = MODELS.get((info["model_type"], context))
    if known is None:
        pytest.fail(f"{url} serves {info['model_path']}; these tests know {sorted(MODELS)}")
    return Server(url, *known, context)


@pytest.fixture(scope="session")
def ours(genuine: Server) -> Iterator[Server]:
    """`jaxdistill.serve` of the same model."""
    command = [sys.executable, "-m", "jaxdistill.serve", "--model", str(genuine.folder), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            assert line.startswith("listening on "), f"jaxdistill.serve ended with {server.wait()}"
            url = line.removeprefix("listening on ").strip()
            yield Server(url, genuine.name, genuine.folder, genuine.context)
        finally:
            server.terminate()
            assert server.wait(timeout=30) == 0


@pytest.fixture(scope="session")
def expected(genuine: Server) -> dict[str, np.ndarray]:
    """What transformers computed for this model (`scripts/make_live_fixtures.py`)."""
    with np.load(GOLDEN / "live" / f"{genuine.name}.npz") as stored:
        return dict(stored)


@pytest.fixture(scope="session")
def rows(expected: dict[str, np.ndarray]) -> list[list[int]]:
    """The token ids `expected` is of."""
    lengths = expected["lengths"].tolist()
    return [ids[:n].tolist() for ids, n in zip(expected["tokens"], lengths, strict=True)]


def need(server: Server, name: str) -> None:
    """Skip a test that is of another model than the one served."""
    if server.name != name:
        pytest.skip(f"this is about {name}, and the server at {server.url} has {server.name}")


def train(run_dir: Path, *overrides: str, config: str = "configs/quickstart.yaml") -> list[dict[str, Any]]:
    """A run of five steps in a process of its own; the rows of its metrics."""
    small = (
        "run.steps=5", "data.prompts_per_step=4", "rollout.samples_per_prompt=2", "eval.prompts=4",
        "eval.every=5", "checkpoint.every=5", "run.tensorboard=false",
    )  # fmt: skip
    command = [sys.executable, "-m", "jaxdistill.train", "--config", config, f"run.dir={run_dir}"]
    began = time.monotonic()
    result = subprocess.run(
        [*command, *small, *overrides],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, f"after {time.monotonic() - began:.0f} s: {result.stderr[-3000:]}"
    table = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in table] == list(range(6))
    for row in table[:-1]:
        assert np.isfinite([row["loss"], row["reverse_kl_per_byte"]]).all()
        assert row["coverage"] > 0.9 and row["recompiles"] == 0
    return table


def with_teacher(server: Server, folder: Path) -> str:
    """The quickstart's file, written into `folder` with the genuine server in the place of the embedded."""
    lines = (ROOT / "configs" / "quickstart.yaml").read_text().splitlines()
    (at,) = (number for number, line in enumerate(lines) if line.startswith("teacher:"))
    lines[at] = f'teacher: {{kind: sglang, endpoint: "{server.url}", tokenizer: {server.folder}}}'
    changed = folder / "run.yaml"
    changed.write_text("\n".join(lines) + "\n")
    return str(changed)
