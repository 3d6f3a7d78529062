"""Checkpoints by Orbax: the trained parameters, optimizer, step, and the position in the data.

A checkpoint of step k is the state BEFORE step k, data position included: a run resumed from it does
what the uninterrupted run did from step k on. Saving goes on in the background; Orbax publishes a
checkpoint by an atomic rename, so a killed run leaves the previous one whole.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from pydantic import Field

from jaxdistill.config import StrictConfig
from jaxdistill.data import PromptStream
from jaxdistill.errors import CheckpointError, ConfigError
from jaxdistill.step import TrainState


class CheckpointConfig(StrictConfig):
    """Save before every `every`-th step and at the end; keep the last `keep`."""

    every: int = Field(default=50, ge=1)
    keep: int = Field(default=3, ge=1)


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path, config: CheckpointConfig):
        self.config = config
        self.folder = folder
        self._manager = ocp.CheckpointManager(
            folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=config.keep)
        )

    def due(self, step: int) -> bool:
        return step > 0 and step % self.config.every == 0

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, position: Mapping[str, Any]) -> None:
        """Start saving the state before `step`, with the data's position (`PromptStream.state`) at that
        time; a failure of the save before surfaces here."""
        if self.latest() == step:  # resumed exactly here: it is already on disk
            return
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(_as_dict(state)), data=ocp.args.JsonSave(dict(position))
        )
        with self._failures(step):
            self._manager.check_for_errors()
            if not self._manager.save(step, args=items):
                raise CheckpointError(f"Orbax declined to save step {step} into {self.folder}")

    def restore_or(self, state: TrainState, prompts: PromptStream) -> TrainState:
        """The newest checkpoint laid out like `state`, which is freed, with `prompts` moved to its
        position; `state` itself when there is none."""
        step = self.latest()
        if step is None:
            return state
        template = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), _as_dict(state)
        )
        restored = _restore(self._manager, self.folder, step, template, partial=False)
        prompts.restore(restored["data"])
        fields = restored["state"]
        # The optimizer state comes back as plain lists and dicts; its own structure holds the types.
        opt_state = jax.tree.unflatten(
            jax.tree.structure(state.opt_state), jax.tree.leaves(fields["opt_state"])
        )
        # The arrays of `state` would stay on the devices for the whole run beside the restored ones.
        for leaf in jax.tree.leaves(state):
            leaf.delete()
        return TrainState(fields["step"], fields["params"], opt_state)

    def close(self) -> None:
        """Wait for the last save and surface its failure, if it had one."""
        with self._failures(None):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        self._manager.close()

    @contextmanager
    def _failures(self, step: int | None) -> Iterator[None]:
        """A save that failed, now or in the background, as one `CheckpointError`."""
        try:
            yield
        except (OSError, ValueError) as error:
            what = "the last checkpoint" if step is None else f"a checkpoint before step {step}"
            raise CheckpointError(
                f"{what} could not be written to {self.folder} ({error}); the newest whole one is of step "
                f"{self.latest()}: make room or fix the folder, and run the same command again"
            ) from error


def restore_params(folder: Path, step: int | None, template: Any) -> tuple[int, Any]:
    """The trained parameters alone of checkpoint `step` (default: the newest), in the shapes of `template`.

    Raises `ConfigError` if there is no such checkpoint, `CheckpointError` if it cannot be read.
    """
    steps = sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())
    if not steps:
        raise ConfigError(f"no checkpoint in {folder}; the run has not saved one yet")
    chosen = steps[-1] if step is None else step
    if chosen not in steps:
        raise ConfigError(f"no checkpoint of step {chosen} in {folder}; there are: {steps}")
    options = ocp.CheckpointManagerOptions(create=False)
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        restored = _restore(manager, folder, chosen, {"params": template}, partial=True)
    return chosen, restored["state"]["params"]


def _restore(manager: ocp.CheckpointManager, folder: Path, step: int, template: Any, *, partial: bool) -> Any:
    """State (and, unless `partial`, the data's position) of one checkpoint."""
    arguments: dict[str, Any] = {
        "state": ocp.args.PyTreeRestore(
            template,
            restore_args=ocp.checkpoint_utils.construct_restore_args(template),
            partial_restore=partial,
        )
    }
    if not partial:
        arguments["data"] = ocp.args.JsonRestore()
    try:
        return manager.restore(step, args=ocp.args.Composite(**arguments))
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"checkpoint {folder / str(step)} cannot be read into this student and optimizer ({error}); it "
            "is damaged, or they were changed: use a new run.dir, or remove that folder to use an older one"
        ) from error


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}
