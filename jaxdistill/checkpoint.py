"""Checkpoints by Orbax: parameters, optimizer, step, and the position in the data.

A checkpoint of step k is the state BEFORE step k, data position included: a run resumed from it does
what the uninterrupted run did from step k on. Saving goes on in the background; Orbax publishes a
checkpoint by an atomic rename, so a killed run leaves the previous one whole.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from pydantic import Field

from jaxdistill.config import StrictConfig
from jaxdistill.data import PromptStream
from jaxdistill.errors import CheckpointError
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
        self._manager.check_for_errors()
        if self.latest() == step:  # resumed exactly here: it is already on disk
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(_as_dict(state)), data=ocp.args.JsonSave(dict(position))
            ),
        )

    def restore_or(self, state: TrainState, prompts: PromptStream) -> TrainState:
        """The newest checkpoint laid out like `state`, with `prompts` moved to its position; `state`
        itself when there is none."""
        step = self.latest()
        if step is None:
            return state
        template = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), _as_dict(state)
        )
        restore_args = ocp.checkpoint_utils.construct_restore_args(template)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(template, restore_args=restore_args),
                    data=ocp.args.JsonRestore(),
                ),
            )
        except (ValueError, KeyError, OSError) as error:
            raise CheckpointError(
                f"checkpoint {self.folder / str(step)} cannot be restored into this run ({error}); was "
                "the student or the optimizer changed? Use a new run.dir, or remove that folder to go on "
                "from an older one"
            ) from error
        prompts.restore(restored["data"])
        fields = restored["state"]
        # The optimizer state comes back as plain lists and dicts; its own structure holds the types.
        opt_state = jax.tree.unflatten(
            jax.tree.structure(state.opt_state), jax.tree.leaves(fields["opt_state"])
        )
        return TrainState(fields["step"], fields["params"], opt_state)

    def close(self) -> None:
        """Wait for the last save and surface its failure, if it had one."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        self._manager.close()


def restore_params(folder: Path, step: int | None, template: Any) -> tuple[int, Any]:
    """The parameters alone of checkpoint `step` (default: the newest), laid out like `template`."""
    manager = ocp.CheckpointManager(folder.absolute())
    steps = sorted(manager.all_steps())
    if not steps:
        raise CheckpointError(f"no checkpoint in {folder}; is that the folder of a run?")
    chosen = steps[-1] if step is None else step
    if chosen not in steps:
        raise CheckpointError(f"no checkpoint of step {chosen} in {folder}; there are: {steps}")
    restored = manager.restore(
        chosen,
        args=ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
                {"params": template},
                restore_args=ocp.checkpoint_utils.construct_restore_args({"params": template}),
                partial_restore=True,
            )
        ),
    )
    manager.close()
    return chosen, restored["state"]["params"]


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}
