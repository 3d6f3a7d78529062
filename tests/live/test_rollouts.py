"""A genuine server that samples for the student, and is given its weights after every step.

The toy teacher is the student here, since it is what the server was started with; it learns from the toy
student.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from jaxdistill.data import read_prompts
from jaxdistill.evaluation import StudentLogprobs
from jaxdistill.parallel import MeshConfig, make_mesh
from jaxdistill.samplers import RolloutConfig, SGLangSampler, SGLangSamplerConfig
from jaxdistill.students import load_decoder, save_params
from jaxdistill.text import Tokenizer

from .conftest import ROOT, Server, need, train

pytestmark = pytest.mark.live

ATOL = 1e-3  # nats


@pytest.fixture
def lent(genuine: Server) -> Iterator[Server]:
    """The server, which afterwards has its own weights again."""
    need(genuine, "toy_teacher")
    yield genuine
    own = {"model_path": str(genuine.folder), "weight_version": "default"}
    assert genuine.ask("/update_weights_from_disk", own)[0] == 200


def sampler_of(server: Server, folder: Path, **rollout: Any) -> SGLangSampler:
    tokenizer = Tokenizer.load(str(server.folder))
    config = load_decoder(server.folder).config
    return SGLangSampler(
        SGLangSamplerConfig(endpoint=server.url, weights=folder, dtype="float32"),
        RolloutConfig(max_prompt_tokens=96, max_new_tokens=48, samples_per_prompt=8, **rollout),
        tokenizer,
        partial(save_params, config=config, lora=None, source=server.folder, dtype="float32"),
        folder / "run",
        vocabulary=config.vocab_size,
        seed=0,
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_its_logprobs_are_those_of_the_trainer(lent: Server, tmp_path: Path, temperature: float) -> None:
    """Of weights that are not those it was started with."""
    sampler = sampler_of(lent, tmp_path, temperature=temperature)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1), jax.devices()[:1])
    graphdef, variables = nnx.split(load_decoder(lent.folder, mesh=mesh), nnx.Param)
    key = jax.random.key(0)
    params = jax.tree.map(
        lambda leaf: leaf + 0.5 * leaf.std() * jax.random.normal(key, leaf.shape), nnx.to_pure_dict(variables)
    )
    prompts = read_prompts(ROOT / "assets/toy/heldout.jsonl")[:6]
    try:
        sampler.check()
        sampler.push(params, 1)
        rows = sampler.sample(prompts, 1)
        assert len(rows) == 48 and {row.policy_version for row in rows} == {1}
        ours = StudentLogprobs(graphdef, mesh, [144], len(rows))(params, rows)
        for row, forward in zip(rows, ours, strict=True):
            np.testing.assert_allclose(row.own_logprobs, forward.logprobs, atol=ATOL)
        if temperature == 0.7:  # no distribution gives its own samples a smaller mean than another does
            assert sum(row.logprobs.sum() for row in rows) > sum(row.own_logprobs.sum() for row in rows)
        if temperature == 0.0:
            assert all(
                np.array_equal(a.response.ids, b.response.ids)
                for a, b in zip(rows[::8], rows[1::8], strict=True)
            )
        sampler.push(nnx.to_pure_dict(variables), 2)
        after = sampler.sample(prompts, 1)
        assert {row.policy_version for row in after} == {2}
        means = [np.concatenate([row.own_logprobs for row in some]).mean() for some in (rows, after)]
        assert abs(means[0] - means[1]) > 100 * ATOL  # other weights, which are less sure
    finally:
        sampler.close()


def settings(server: Server, weights: Path) -> tuple[str, ...]:
    return (
        f"student.path={server.folder}",
        "teacher.model=assets/toy/student",
        "sampler.kind=sglang",
        f"sampler.endpoint={server.url}",
        f"sampler.weights={weights}",
        "sampler.dtype=float32",
        "objective.importance=clip",
        "objective.baseline=none",  # the samples of one prompt are often the same
        "optimizer.learning_rate=1.0e-3",
    )


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_samples_on_it_and_pushes_every_step(lent: Server, tmp_path: Path, staleness: int) -> None:
    weights = tmp_path / "weights"
    table = train(tmp_path / "run", *settings(lent, weights), f"rollout.max_staleness={staleness}")
    for row in table[:5]:
        assert row["staleness"] <= staleness
        if not staleness:
            assert row["logprob_mismatch"] <= ATOL, row
    assert max(row["grad_norm"] for row in table[:5]) > 0
    assert sum(row["sampler/requests"] for row in table[:5]) >= 5
    _, info = lent.ask("/model_info")
    run, _, version = info["weight_version"].partition(".")
    assert version == "5" and len(run) == 8
    assert not any(weights.iterdir())


def test_two_processes_push_the_weights_that_each_holds_a_part_of(lent: Server, tmp_path: Path) -> None:
    """Each samples its own share of the prompts; the first one writes and tells the server."""
    small = ("run.steps=3", "data.prompts_per_step=4", "rollout.samples_per_prompt=2", "eval.path=null")
    command = ["bash", "launch/local.sh", "2", "--config", "configs/quickstart.yaml", *small]
    command += [f"run.dir={tmp_path}/run", "run.tensorboard=false", *settings(lent, tmp_path / "weights")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHON": sys.executable}
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    table = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["staleness"] for row in table[:3]] == [0, 0, 0]
    assert max(row["logprob_mismatch"] for row in table[:3]) <= ATOL
    assert max(row["grad_norm"] for row in table[:3]) > 0
    assert lent.ask("/model_info")[1]["weight_version"].endswith(".3")
