"""Checkpoints of a state of one number: what a seal left over from another one does."""

import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxdistill.checkpoint import CheckpointConfig, Checkpoints
from jaxdistill.data import PromptStream
from jaxdistill.step import TrainState


class Prompts(PromptStream):
    """Has a place in the data, and no data."""

    def __init__(self) -> None:
        pass

    def restore(self, state: Any) -> None:
        assert state == {"at": 1}


def state_of(value: float) -> TrainState:
    return TrainState(jnp.asarray(2), {"weight": jnp.full(3, value)}, ())


def test_a_seal_does_not_outlive_its_checkpoint(tmp_path: Path) -> None:
    """A checkpoint that was removed by hand is made again, by a run that is killed before it is sealed."""
    prompts = Prompts()
    first = Checkpoints(tmp_path, CheckpointConfig())
    first.save(2, state_of(1.0), {"at": 1})
    first.close()
    assert (tmp_path / "seals/2.json").is_file()
    shutil.rmtree(tmp_path / "checkpoints/2")

    second = Checkpoints(tmp_path, CheckpointConfig())
    state = state_of(0.0)
    assert second.restore_or(state, prompts) is state
    second.save(2, state_of(5.0), {"at": 1})
    second._manager.wait_until_finished()

    third = Checkpoints(tmp_path, CheckpointConfig())
    assert float(third.restore_or(state_of(0.0), prompts).params["weight"][0]) == 5.0
    for checkpoints in (second, third):
        checkpoints.close()
