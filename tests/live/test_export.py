r"""What a run reports is what its export does where it is served: the quickstart's student, whole.

    python -m pytest -m live tests/live/test_export.py

starts its own genuine SGLang server, of the export (`scripts/sglang_cpu.py`).

A fair comparison asks the same prompts in the same way on both sides, often enough. The quickstart's own 256
responses at temperature 1 leave a standard deviation of more than a point (most prompts are always right or
always wrong), too much beside the two points asked for here. So both sides answer each of the 256 prompts 16
times: the run's held-out file has every row 16 times, and the difference of the two means has a standard
deviation of less than half a point. Of the quickstart only how much and how often it evaluates is changed.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

from jaxdistill.data import read_prompts
from jaxdistill.scorers import load_scorer
from jaxdistill.students import load_decoder
from scripts import sglang_cpu

from .conftest import ROOT

pytestmark = pytest.mark.live

HELDOUT = ROOT / "assets/toy/heldout.jsonl"
EACH = 16  # responses to a prompt, on both sides
POINTS = 0.02


def call(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jaxdistill", *words],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a quickstart."""
    folder = tmp_path_factory.mktemp("quickstart")
    rows = HELDOUT.read_text() * EACH
    (folder / "heldout.jsonl").write_text(rows)
    often = (f"eval.path={folder}/heldout.jsonl", f"eval.prompts={len(rows.splitlines())}", "eval.every=80")
    call("train", "--config", "configs/quickstart.yaml", f"run.dir={folder}/run", *often)
    return folder / "run"


@pytest.fixture(scope="module")
def model(run: Path) -> Path:
    """Its export."""
    out = run.parent / "model"
    call("export", "--run", str(run), "--out", str(out))
    return out


@pytest.fixture(scope="module")
def environment() -> Path:
    """Where SGLang is installed, which it is now."""
    folder = sglang_cpu.environment()
    sglang_cpu.install(folder)
    return folder


def generate(url: str, **body: Any) -> Any:
    request = Request(f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=600) as reply:
        return json.loads(reply.read())


@pytest.fixture(scope="module")
def served(model: Path, environment: Path) -> Iterator[str]:
    """The address of a server of the export."""
    with sglang_cpu.serving(environment, model, start_timeout_s=300) as url:
        yield url


def test_the_served_student_is_as_right_as_the_run_says(run: Path, model: Path, served: str) -> None:
    """Rendered, tokenized and ended by what stands in the export: no stop is named."""
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    reported = last["eval/accuracy"]
    assert last["step"] == 80 and reported > 0.8  # it has learned the task, whose accuracy was 9 %
    prompts = read_prompts(HELDOUT)
    tokenizer = AutoTokenizer.from_pretrained(model)
    chats = [
        tokenizer.apply_chat_template(list(one.messages), tokenize=False, add_generation_prompt=True)
        for one in prompts
    ]
    scorer = load_scorer("final_line").function
    right = 0.0
    for turn in range(EACH):
        sampling = [
            {"temperature": 1.0, "max_new_tokens": 48, "sampling_seed": turn * len(chats) + number}
            for number in range(len(chats))
        ]
        replies = generate(served, text=chats, sampling_params=sampling)
        for prompt, reply in zip(prompts, replies, strict=True):
            # As in the run: what was cut at the length limit has no answer.
            ended = reply["meta_info"]["finish_reason"]["type"] == "stop"
            right += float(scorer(reply["text"], prompt)) if ended else 0.0
    found = right / (EACH * len(chats))
    print(f"accuracy: {reported:.4f} in the run, {found:.4f} served")
    assert abs(found - reported) <= POINTS


def test_adapters_served_beside_their_base_are_the_merged_model(tmp_path: Path, environment: Path) -> None:
    """Its log-probabilities of a text, and of nobody who does not name the adapters."""
    small = ("run.steps=4", "data.prompts_per_step=8", "eval.path=null", "run.tensorboard=false")
    lora = ("student.lora.rank=8", "optimizer.learning_rate=5e-3", f"run.dir={tmp_path}/run")
    call("train", "--config", "configs/quickstart.yaml", *small, *lora)
    for out, flags in ((tmp_path / "merged", ()), (tmp_path / "adapters", ("--adapters",))):
        call("export", "--run", f"{tmp_path}/run", "--out", str(out), *flags)
    base = ROOT / "assets/toy/student"
    tokens = np.random.default_rng(0).integers(5, 400, 64)
    expected = {
        name: logprobs(folder, tokens) for name, folder in (("", base), ("mine", tmp_path / "merged"))
    }
    assert np.abs(expected["mine"] - expected[""]).max() > 0.1
    flags = ("--lora-paths", f"mine={tmp_path}/adapters", "--lora-backend", "torch_native")
    with sglang_cpu.serving(environment, base, *flags, start_timeout_s=300) as url:
        for name, wanted in expected.items():
            asked = {"input_ids": tokens.tolist(), "return_logprob": True, "logprob_start_len": 0}
            named = {"lora_path": name} if name else {}
            reply = generate(url, **asked, **named, sampling_params={"max_new_tokens": 1, "temperature": 0})
            found = [entry[0] for entry in reply["meta_info"]["input_token_logprobs"][1:]]
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3)


def logprobs(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """What the model in `folder` gives each of the tokens but the first, by our own forward pass."""
    decoder = load_decoder(folder)
    rows = jnp.asarray(tokens[None], jnp.int32)
    found = jax.nn.log_softmax(decoder.logits(decoder(rows))[0, :-1])
    return np.asarray(found[np.arange(len(tokens) - 1), tokens[1:]])
