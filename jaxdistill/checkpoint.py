"""Checkpoints by Orbax: the trained parameters, optimizer, step, and the position in the data.

A checkpoint of step k is the state BEFORE step k, data position included: a run resumed from it does
what the uninterrupted run did from step k on. Saving goes on in the background; Orbax publishes a
checkpoint by an atomic rename, so a killed run leaves the previous one whole.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, EveryNSteps, LatestN
from pydantic import Field

from jaxdistill.config import StrictConfig
from jaxdistill.data import PromptStream
from jaxdistill.errors import CheckpointError, ConfigError
from jaxdistill.parallel import processes
from jaxdistill.seals import Seals
from jaxdistill.step import TrainState

logger = logging.getLogger(__name__)


class CheckpointConfig(StrictConfig):
    """Save before every `every`-th step and at the end; keep the last `keep`, and each whose step
    `keep_every` divides.

    `best` is a metric of the evaluation, such as eval/accuracy: where it is better than in any checkpoint
    (`best_mode`: the most or the least) one is saved, and kept until there is a better one."""

    every: int = Field(default=50, ge=1)
    keep: int = Field(default=3, ge=1)
    keep_every: int | None = Field(default=None, ge=1)
    best: str | None = None
    best_mode: Literal["max", "min"] = "max"

    @property
    def worst(self) -> float:
        """What a checkpoint without the metric counts as."""
        return -math.inf if self.best_mode == "max" else math.inf

    def options(self) -> ocp.CheckpointManagerOptions:
        """What Orbax is to keep, and by what it finds the best."""
        policies: list[Any] = [LatestN(self.keep)]
        if self.keep_every is not None:
            policies.append(EveryNSteps(self.keep_every))
        if (name := self.best) is None:
            return ocp.CheckpointManagerOptions(preservation_policy=AnyPreservationPolicy(policies))

        def value(metrics: Mapping[str, float]) -> float:
            return metrics.get(name, self.worst)

        policies.append(BestN(get_metric_fn=value, reverse=self.best_mode == "min", n=1))
        return ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies), best_fn=value, best_mode=self.best_mode
        )


class Checkpoints:
    """The checkpoints of one run folder, `folder`/checkpoints. Several processes make one checkpoint, each of
    what its devices hold, and must all call `save` and `restore_or`; process 0 alone seals and checks it."""

    def __init__(self, folder: Path, config: CheckpointConfig):
        self.config = config
        self.folder = folder / "checkpoints"
        self._damaged = folder / "damaged"
        self._seals = Seals(folder / "seals")
        self._unsealed: int | None = None
        self._manager = ocp.CheckpointManager(self.folder.absolute(), options=config.options())

    def due(self, step: int, evaluated: Mapping[str, float]) -> bool:
        """Whether to save before `step`, of which an evaluation (if there was one) said `evaluated`."""
        return (step > 0 and step % self.config.every == 0) or self._is_best(evaluated)

    def _is_best(self, evaluated: Mapping[str, float]) -> bool:
        name = self.config.best
        if name is None or not evaluated:
            return False
        if name not in evaluated:
            raise ConfigError(f"checkpoint.best={name} is not among what is evaluated: {sorted(evaluated)}")
        best, step = self.config.worst, self._manager.best_step()
        if step is not None:
            best = (self._manager.metrics(step) or {}).get(name, best)
        better = evaluated[name] > best if self.config.best_mode == "max" else evaluated[name] < best
        return better and math.isfinite(evaluated[name])

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: TrainState,
        position: Mapping[str, Any],
        evaluated: Mapping[str, float] | None = None,
    ) -> None:
        """Start saving the state before `step`, with the data's position (`PromptStream.state`) at that
        time and what an evaluation of it said; a failure of the save before surfaces here."""
        if self.latest() == step:  # resumed exactly here: it is already on disk
            return
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(_as_dict(state)), data=ocp.args.JsonSave(dict(position))
        )
        metrics = {name: value for name, value in (evaluated or {}).items() if math.isfinite(value)}
        with processes.together(f"the checkpoint before step {step}"), self._failures(step):
            self.settle()
            if not self._manager.save(step, args=items, metrics=metrics if self.config.best else None):
                raise CheckpointError(f"Orbax declined to save step {step} into {self.folder}")
        self._unsealed = step

    def settle(self) -> None:
        """Wait until the save that goes on behind is whole, and have it sealed; raises its failure."""
        with self._failures(None):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        if self._unsealed is not None:
            if processes.leads():
                self._seals.drop_others(self._manager.all_steps())
                self._seals.make(self._unsealed, self.folder / str(self._unsealed))
            self._unsealed = None

    def restore_or(self, state: TrainState, prompts: PromptStream) -> TrainState:
        """The newest checkpoint laid out like `state`, which is freed, with `prompts` moved to its
        position; `state` itself when there is none.

        One that is damaged is put aside into `damaged` and the one before it taken. Raises `CheckpointError`
        where none can be read: a run never starts anew by itself."""
        steps = sorted(self._manager.all_steps(), reverse=True)
        with processes.together("the seals of the checkpoints"):
            if processes.leads():  # that of one removed by hand would call the next of its step damaged
                self._seals.drop_others(steps)
        if not steps:
            return state
        template = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), _as_dict(state)
        )
        failures: dict[int, CheckpointError] = {}
        for step in steps:
            try:
                with processes.together(f"the check of checkpoint {step}"):
                    if processes.leads():
                        self._seals.check(step, self.folder / str(step))
                with processes.together(f"the reading of checkpoint {step}"):
                    restored = _restore(self._manager, self.folder, step, template, partial=False)
                break
            except CheckpointError as error:
                failures[step] = error
        else:
            raise failures[steps[0]]
        with processes.together(f"the move of checkpoints {sorted(failures)}"):
            if processes.leads():
                self._put_aside(failures, step)
                self._seals.drop_others(set(steps) - failures.keys())
        if failures:
            self._manager.reload()
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

    def _put_aside(self, failures: Mapping[int, CheckpointError], step: int) -> None:
        """Move what could not be read out of the way of the same steps made again from `step` on."""
        for damaged, error in failures.items():
            self._damaged.mkdir(exist_ok=True)
            place = self._damaged / str(damaged)
            number = 1
            while place.exists():
                number += 1
                place = self._damaged / f"{damaged}-{number}"
            (self.folder / str(damaged)).rename(place)
            logger.warning("%s; it is now %s, and the run goes on from step %s", error, place, step)

    def close(self) -> None:
        """Wait for the last save and surface its failure, if it had one."""
        try:
            self.settle()
        finally:
            self._seals.close()
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


def restore_params(run: Path, step: int | None, template: Any) -> tuple[int, Any]:
    """The trained parameters alone of checkpoint `step` (default: the newest) of the run folder `run`, in the
    shapes of `template`.

    Raises `ConfigError` if there is no such checkpoint, `CheckpointError` if it cannot be read.
    """
    folder = run / "checkpoints"
    steps = sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())
    if not steps:
        raise ConfigError(
            f"no checkpoint in {folder}: the run has not saved one yet; wait for step checkpoint.every, or "
            "for its end"
        )
    chosen = steps[-1] if step is None else step
    if chosen not in steps:
        raise ConfigError(f"no checkpoint of step {chosen} in {folder}; there are: {steps}")
    Seals(run / "seals").check(chosen, folder / str(chosen))
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
    except Exception as error:  # of a truncated file Orbax says so by a plain Exception
        raise CheckpointError(
            f"checkpoint {folder / str(step)} cannot be read into this student and optimizer ({error}); it "
            "is damaged, or they were changed: use a new run.dir, or remove that folder to use an older one"
        ) from error


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}
