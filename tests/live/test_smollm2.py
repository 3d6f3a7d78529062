"""The genuine server with SmolLM2: as the teacher of a run, and against replies of two recorded releases."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from .conftest import GOLDEN, Server, need, train, with_teacher
from .test_scoring import close

pytestmark = pytest.mark.live

RECORDED = [
    "score_single_mnt0", "score_batch_mnt0", "score_batch_mnt1_perreq", "score_start_3", "score_no_top",
    "score_start_len_minus1pos", "score_default_start", "score_text_in_logprobs", "one_token",
]  # fmt: skip


def test_it_teaches_the_toy_student(genuine: Server, tmp_path: Path) -> None:
    need(genuine, "smollm2")
    small = ("data.prompts_per_step=2", "rollout.max_new_tokens=16", "objective.credit=broadcast")
    train(tmp_path / "run", *small, config=with_teacher(genuine, tmp_path))


@pytest.fixture(scope="module")
def rounded(genuine: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server with its weights rounded to bfloat16, as the recorded ones had them (they computed in
    float32); the server changes them while it runs, and back again."""
    need(genuine, "smollm2")
    folder = tmp_path_factory.mktemp("rounded")
    for file in genuine.folder.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(genuine.folder / "model.safetensors")
    for name in weights:
        weights[name] = np.asarray(jnp.asarray(weights[name]).astype(jnp.bfloat16).astype(jnp.float32))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    original = genuine.ask("/model_info")[1]["model_path"]
    try:
        load(genuine, str(folder), "rounded")
        yield genuine
    finally:
        load(genuine, original, "default")
        (folder / "model.safetensors").unlink()


def load(server: Server, folder: str, version: str) -> None:
    update = {"model_path": folder, "weight_version": version, "flush_cache": True}
    status, reply = server.ask("/update_weights_from_disk", update)
    assert status == 200 and reply["success"] is True, reply


def recorded(version: str, name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / "sglang" / version / f"{name}.json").read_text())


@pytest.mark.parametrize("version", ["0.5.15", "0.5.23"])
@pytest.mark.parametrize("name", RECORDED)
def test_it_answers_as_recorded(rounded: Server, version: str, name: str) -> None:
    record = recorded(version, name)
    got, wanted = rounded.generate(**record["request"]), record["response"]
    pairs = zip(got, wanted, strict=True) if isinstance(wanted, list) else [(got, wanted)]
    for own, theirs in pairs:
        assert (own["output_ids"], own["text"]) == (theirs["output_ids"], theirs["text"])
        assert own["meta_info"]["weight_version"] == "rounded"
        for field, values in theirs["meta_info"].items():
            if field.endswith("_logprobs"):
                close(own["meta_info"][field], values, field)
