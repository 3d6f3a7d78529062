"""What a run would take of a device's memory, said before anything runs, and what to change where that is too
much."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast, get_args

import optax
from jax.sharding import AbstractMesh, Mesh

from jaxdistill.inputs import Inputs, compute_dtype, student_shapes
from jaxdistill.losses import Objective
from jaxdistill.memory import SamplingMemory, StepMemory, of_device, sampling_memory, step_memory
from jaxdistill.optimizer import make_optimizer
from jaxdistill.packing import blank
from jaxdistill.parallel import MeshConfig, make_mesh
from jaxdistill.parallel.rules import AnyMesh, padded_rows, row_shards
from jaxdistill.run_config import RunConfig
from jaxdistill.scoring import part_columns
from jaxdistill.step import TrainState, state_shapes
from jaxdistill.students import Decoder, DecoderConfig, LoraConfig
from jaxdistill.students.attention import Attention
from jaxdistill.students.layer import layer_shapes
from jaxdistill.students.lora import Target

# The share of a device that is left free: fragments, the programs themselves, the collectives' own buffers.
RESERVE = 0.1
# What numbers can be kept in instead.
_SMALLER = {"float32": "bfloat16", "bfloat16": "int8"}


@dataclass(frozen=True)
class Shapes:
    """All that a run's memory hangs on: its config, and what was read and chosen for it."""

    config: RunConfig
    model: DecoderConfig
    attention: Attention
    objective: Objective[Any]
    mesh: Mesh

    @property
    def decoder(self) -> Decoder:
        return student_shapes(self.config.student, self.model, self.mesh, self.attention)

    @property
    def rows(self) -> int:
        """Rows of a batch, padding included."""
        parts = self.config.optimizer.gradient_accumulation_steps
        return padded_rows(self.config.origin_schedule.rows, self.mesh, parts)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self.config.optimizer, self.config.run.steps)

    def state(self, mesh: AnyMesh | None = None) -> int:
        """Bytes of one device for parameters and optimizer, on another `mesh` if one is given."""
        return of_device(self._states(mesh))

    def gradients(self, mesh: AnyMesh | None = None) -> int:
        """Bytes of one device for the gradients of what is trained."""
        return of_device(self._states(mesh)[0].params)

    def _states(self, mesh: AnyMesh | None) -> tuple[TrainState, Any]:
        return state_shapes(self.decoder, self.optimizer, cast(Mesh, mesh or self.mesh))

    def step(self) -> StepMemory:
        """The step of the longest rows."""
        columns = part_columns(self.config.all_teachers)
        return step_memory(
            self.decoder,
            self.objective,
            self.optimizer,
            blank(self.rows, self.config.buckets[-1], dict.fromkeys(self.config.objective.needs, columns)),
            self.mesh,
            accumulation=self.config.optimizer.gradient_accumulation_steps,
        )

    def sampling(self) -> SamplingMemory:
        """The student's samples of a step that has the most of them; nothing where servers make them."""
        prompts = self.config.origin_schedule.most_students
        if not prompts or self.config.sampler.kind != "local":
            return SamplingMemory(0, 0, 0)
        return sampling_memory(self.decoder, self.config.rollout, self.mesh, prompts=prompts)

    def having(self, section: str, **values: Any) -> "Shapes":
        """The same with other values in a section of the config."""
        changed = getattr(self.config, section).model_copy(update=values)
        return replace(self, config=self.config.model_copy(update={section: changed}))


class MemoryPlan(NamedTuple):
    """What `--dry-run` says of memory; `fits` unless it is known not to."""

    lines: list[str]
    fits: bool


def memory_plan(config: RunConfig, inputs: Inputs, limit: float | None = None) -> MemoryPlan:
    """The step of the longest rows, the student's sampling, and what to change where they do not fit into
    devices of `limit` bytes (None: what the device says it has). Compiles, and runs nothing."""
    decoder = inputs.decoder
    run = Shapes(config, decoder.config, decoder.attention, inputs.objective, inputs.mesh)
    memory, sampling = run.step(), run.sampling()
    parts = config.optimizer.gradient_accumulation_steps
    in_parts = "" if parts == 1 else f" in {parts} parts"
    if limit is None:
        limit = (run.mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit")
    room = None if limit is None else (1 - RESERVE) * limit
    found = table(memory, sampling, limit)
    if room is not None:
        found += advice(run, memory, sampling, room)
    head = (
        f"memory of each device, {run.rows} rows of {config.buckets[-1]} tokens{in_parts} "
        "(compiled, not run):"
    )
    return MemoryPlan(
        [head, *(f"  {line}" for line in found)], room is None or _most(memory, sampling) <= room
    )


def _most(memory: StepMemory, sampling: SamplingMemory) -> int:
    """Bytes of one device that a run needs at its worst time."""
    return max(memory.total, memory.state + sum(sampling))


def table(memory: StepMemory, sampling: SamplingMemory, limit: float | None) -> list[str]:
    """The bytes as a reader wants them; `limit` is what the device has, None where it does not say."""
    return [
        f"parameters {size(memory.parameters)}, optimizer {size(memory.optimizer)}, "
        f"batch {size(memory.batch)}",
        f"temporary {size(memory.temporary)}: gradients {size(memory.gradients)}, head {size(memory.head)}, "
        f"activations and the rest {size(memory.activations)}",
        f"a step takes {size(memory.total)}; "
        + (
            f"sampling {size(memory.state + sum(sampling))}, of it weights once more "
            f"{size(sampling.weights)}, keys and values {size(sampling.rows)}, temporary "
            f"{size(sampling.temporary)}"
            if any(sampling)
            else "nothing is sampled here"
        ),
        "the device does not say how much it has; --device-memory GiB does"
        if limit is None
        else f"the device has {size(limit)}",
    ]


def advice(run: Shapes, memory: StepMemory, sampling: SamplingMemory, room: int | float) -> list[str]:
    """What of a run does not fit into `room` bytes, and the settings that help, with the bytes they save:
    where the devices here can say so, those of the changed programs, which are compiled."""
    found, samples = [], memory.state + sum(sampling)
    if (lacking := memory.total - room) > 0:
        found.append(f"a step does NOT FIT into the {size(room)} that may be used; what helps:")
        found += _helping(_of_step(run, memory.total, lacking), lacking)
    if (lacking := samples - room) > 0:
        found.append(f"sampling does NOT FIT into the {size(room)} that may be used; what helps:")
        found += _helping(_of_sampling(run, sum(sampling)), lacking)
    return found or [f"fits into the {size(room)} that may be used"]


def _helping(savings: Iterable[tuple[str, int]], lacking: float) -> list[str]:
    """Those settings that save a hundredth of what is `lacking` or more, the best first."""
    helping = sorted(((saved, what) for what, saved in savings if saved >= lacking / 100), reverse=True)
    lines = [f"  {what}: {size(saved)}" for saved, what in helping]
    if not helping or helping[0][0] < lacking:
        lines.append(f"  none of them is enough alone: {size(lacking)} is lacking")
    return lines


def _of_step(run: Shapes, now: int, lacking: float) -> Iterator[tuple[str, int]]:
    """Settings, and the bytes of one device by which they make a step smaller that takes `now`."""
    student, optimizer, rollout = run.config.student, run.config.optimizer, run.config.rollout
    if student.remat != "layer":
        yield "student.remat=layer", now - run.having("student", remat="layer").step().total
    done, rows = optimizer.gradient_accumulation_steps, run.rows // row_shards(run.mesh)
    parts = [n for n in range(done + 1, rows + 1) if rows % n == 0 and n % done == 0]

    def in_parts(n: int) -> int:
        return now - run.having("optimizer", gradient_accumulation_steps=n).step().total

    saved = in_parts(parts[-1]) if parts else 0
    while saved >= lacking and len(parts) > 1:  # the fewest that are enough, halving what is in question
        middle = (len(parts) - 1) // 2
        less = in_parts(parts[middle])
        if less >= lacking:
            parts, saved = parts[: middle + 1], less
        else:
            parts = parts[middle + 1 :]
    if parts:
        yield f"optimizer.gradient_accumulation_steps={parts[-1]}", saved
    if (new := rollout.max_new_tokens // 2) and saved < lacking:
        shorter = run.having("rollout", max_new_tokens=new).having("shapes", buckets=())
        yield f"rollout.max_new_tokens={new} and shapes.buckets", now - shorter.step().total
    for what, changed in _of_state(run):
        yield what, now - changed.step().total
    for what, mesh in _more_devices(run):
        saved = run.state() + run.gradients() - run.state(mesh) - run.gradients(mesh)
        yield f"{what}, of parameters, optimizer and gradients alone", saved


def _of_sampling(run: Shapes, now: int) -> Iterator[tuple[str, int]]:
    """Settings, and the bytes of one device by which they make sampling smaller, which takes `now` beside the
    state of the run."""
    rollout, prompts = run.config.rollout, run.config.data.prompts_per_step
    kept = rollout.kv_dtype or compute_dtype(run.config.student).name
    if smaller := _SMALLER.get(kept):
        yield f"rollout.kv_dtype={smaller}", now - sum(run.having("rollout", kv_dtype=smaller).sampling())
    if prompts > 1:
        fewer = run.having("data", prompts_per_step=prompts // 2)
        yield f"data.prompts_per_step={prompts // 2}", now - sum(fewer.sampling())
    elif samples := rollout.samples_per_prompt // 2:
        fewer = run.having("rollout", samples_per_prompt=samples)
        yield f"rollout.samples_per_prompt={samples}", now - sum(fewer.sampling())
    if new := rollout.max_new_tokens // 2:
        shorter = run.having("rollout", max_new_tokens=new)
        yield f"rollout.max_new_tokens={new}", now - sum(shorter.sampling())
    for what, changed in _of_state(run):
        yield f"{what}, of parameters and optimizer alone", run.state() - changed.state()
    for what, mesh in _more_devices(run):
        yield f"{what}, of parameters and optimizer alone", run.state() - run.state(mesh)


def _of_state(run: Shapes) -> Iterator[tuple[str, Shapes]]:
    """Settings that make parameters and optimizer smaller on the same devices."""
    if smaller := _SMALLER.get(run.config.optimizer.moment_dtype):
        yield f"optimizer.moment_dtype={smaller}", run.having("optimizer", moment_dtype=smaller)
    if run.config.student.lora is None:
        there = tuple(target for target in get_args(Target) if target in layer_shapes(run.model))
        lora = LoraConfig(targets=there)
        yield (
            f"student.lora={{rank: {lora.rank}, targets: [{', '.join(there)}]}}",
            run.having("student", lora=lora),
        )
    sizes = run.mesh.shape
    if sizes["data"] > 1:
        split = {"data": 1, "fsdp": sizes["data"] * sizes["fsdp"]}
        mesh = make_mesh(MeshConfig(**{**sizes, **split}), list(run.mesh.devices.flat))
        yield f"mesh.data=1 mesh.fsdp={split['fsdp']}", replace(run, mesh=mesh)


def _more_devices(run: Shapes) -> Iterator[tuple[str, AbstractMesh]]:
    """Meshes of twice the devices, which need not be here."""
    for axis in ("fsdp", "tensor"):
        sizes = {name: size * (2 if name == axis else 1) for name, size in run.mesh.shape.items()}
        mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
        yield f"mesh.{axis}={sizes[axis]} on twice the devices", mesh


def size(count: int | float) -> str:
    """Bytes in words."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"
