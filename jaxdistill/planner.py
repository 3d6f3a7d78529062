"""What a run takes of a device's memory, told by its compiled step before anything runs.

Letters: B rows, T positions, D hidden, V vocabulary, S cache slots, K key/value heads, E head dimension.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxdistill.batch import Batch
from jaxdistill.inputs import Inputs
from jaxdistill.losses import Objective, Prepared, evaluate_objective
from jaxdistill.losses.head import rows_of_device
from jaxdistill.optimizer import make_optimizer
from jaxdistill.packing import blank
from jaxdistill.parallel.rules import (
    padded_rows,
    param_shardings,
    partition,
    place_batch,
    row_shards,
    rows_sharding,
)
from jaxdistill.run_config import RunConfig
from jaxdistill.step import make_train_step, state_shapes
from jaxdistill.students import Decoder
from jaxdistill.students.cache import stored

# The share of a device that is left free: fragments, the programs themselves, the collectives' own buffers.
RESERVE = 0.1


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one device. `parameters` (trained and frozen), `optimizer` and `batch` are there before the
    step; `temporary` is the most it takes beside them, of which `gradients` is that of the trained parameters
    and `head` what the head takes by itself."""

    parameters: int
    optimizer: int
    batch: int
    temporary: int
    gradients: int
    head: int

    @property
    def state(self) -> int:
        """What is there all the time."""
        return self.parameters + self.optimizer

    @property
    def activations(self) -> int:
        """What is temporary, and neither gradients nor the head's: activations for the most part."""
        return max(0, self.temporary - self.gradients - self.head)

    @property
    def total(self) -> int:
        return self.state + self.batch + self.temporary


class SamplingMemory(NamedTuple):
    """Bytes of one device that sampling takes beside the state of the run: the `weights` as decoding reads
    them, for the length of a call, and the keys and values."""

    weights: int
    cache: int


def step_memory(
    decoder: Decoder,
    objective: Objective[Any],
    optimizer: optax.GradientTransformation,
    batch: Batch,
    mesh: Mesh,
    *,
    accumulation: int = 1,
) -> StepMemory:
    """Compile the step for a `decoder` and a (host's) `batch`, of which nothing but shapes matters, and see
    what `memory_analysis()` says of it. The head is compiled once more by itself. Nothing is run."""
    state, frozen = state_shapes(decoder, optimizer, mesh)
    graphdef = nnx.split(decoder, nnx.Param)[0]
    rows = place_batch(batch, mesh)
    step = make_train_step(graphdef, objective, optimizer, state, mesh, accumulation=accumulation)
    compiled = step.lower(state, frozen, rows).compile()
    return StepMemory(
        parameters=of_device((state.params, frozen)),
        optimizer=of_device((state.step, state.opt_state)),
        batch=of_device(rows),
        temporary=compiled.memory_analysis().temp_size_in_bytes,
        gradients=of_device(state.params),
        head=head_memory(
            objective,
            target_shapes(objective, batch),
            (decoder.config.vocab_size, decoder.config.hidden_size),
            decoder.compute_dtype,
            mesh,
            accumulation=accumulation,
            softcap=decoder.config.logit_softcap,
            frozen=bool(frozen),
        ),
    )


def head_memory(
    objective: Objective[Any],
    targets: Any,
    matrix: tuple[int, int],
    dtype: Any,
    mesh: Mesh,
    *,
    accumulation: int = 1,
    softcap: float | None = None,
    frozen: bool = False,
) -> int:
    """Temporary bytes of one device for an objective and its gradient with respect to hidden states and,
    unless it is `frozen`, the `matrix` [V, D], in one of `accumulation` parts of the rows of the `targets`,
    which are shapes."""

    def rows_of(leaf: Any) -> jax.ShapeDtypeStruct:
        part = jax.ShapeDtypeStruct((leaf.shape[0] // accumulation, *leaf.shape[1:]), leaf.dtype)
        return _shape(part, rows_sharding(mesh, leaf.ndim))

    targets = jax.tree.map(rows_of, targets)
    rows, length = jax.tree.leaves(targets)[0].shape[:2]
    spec = partition(matrix, ("vocab", "embed"), mesh)
    shapes = (
        jax.ShapeDtypeStruct((rows, length, matrix[1]), dtype, sharding=rows_sharding(mesh, 3)),
        jax.ShapeDtypeStruct(matrix, dtype, sharding=NamedSharding(mesh, spec)),
    )

    def value(hidden: jax.Array, embedding: jax.Array, targets: Any) -> jax.Array:
        part = Prepared(targets, jnp.float32(1), {})
        out = evaluate_objective(
            objective, part, hidden, embedding, softcap=softcap, mesh=mesh, frozen=frozen
        )
        return jnp.asarray(out.objective.total)

    by = (0,) if frozen else (0, 1)
    places = tuple(shapes[number].sharding for number in by)
    compiled = jax.jit(jax.grad(value, by), out_shardings=places).lower(*shapes, targets).compile()
    memory = compiled.memory_analysis()
    assert memory is not None  # CPUs, GPUs and TPUs all say
    return memory.temp_size_in_bytes


def target_shapes(objective: Objective[Any], batch: Batch) -> Any:
    """The shapes of what the objective's tiles read beside logits."""
    return jax.eval_shape(lambda rows: objective.prepare(rows).targets, batch)


def cache_memory(decoder: Decoder, mesh: Mesh, *, rows: int, slots: int, kv_dtype: Any = None) -> int:
    """Bytes of one device for the keys and values of `rows` rows with `slots` positions each:
    2 * layers * B * S * K * E numbers, kept in `kv_dtype` (None: the compute dtype)."""
    c = decoder.config
    tensor = mesh.shape["tensor"]
    heads = c.num_kv_heads // tensor if c.num_kv_heads % tensor == 0 else c.num_kv_heads
    shape = (rows_of_device(rows, mesh), slots, heads, c.head_dim)
    dtype = decoder.compute_dtype if kv_dtype is None else kv_dtype
    buffer = jax.eval_shape(lambda: stored(jnp.zeros(shape), dtype))
    return 2 * c.num_layers * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(buffer))


def weights_memory(decoder: Decoder, mesh: Mesh) -> int:
    """Bytes of one device for `Decoder.weights`: the layers once more, in the compute dtype but for norms,
    and the output embedding where that is kept in another."""
    variables = nnx.state(decoder, nnx.Param)
    params, places = nnx.to_pure_dict(variables), param_shardings(variables, mesh)
    output = "embedding" if decoder.config.tied_embeddings else "head"

    def made(path: Any, leaf: Any, place: NamedSharding) -> jax.ShapeDtypeStruct | None:
        parts, name = [key.key for key in path], path[-1].key
        dtype = leaf.dtype if name.endswith("_norm") else jnp.dtype(decoder.compute_dtype)
        copied = parts[0] in ("layers", "adapters") or (parts == [output] and leaf.dtype != dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place) if copied else None

    return of_device(jax.tree_util.tree_map_with_path(made, params, places))


def of_device(shapes: Any) -> int:
    """Bytes that one device holds of arrays, or of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(shapes)
    )


def memory_plan(config: RunConfig, inputs: Inputs) -> list[str]:
    """What `--dry-run` says of memory: the step of the longest rows, the cache of the student's samples, and
    what to change where they do not fit. Compiles, and runs nothing."""
    schedule, mesh, accumulation = (
        config.origin_schedule,
        inputs.mesh,
        config.optimizer.gradient_accumulation_steps,
    )
    top_k = max((teacher.top_k for teacher in config.all_teachers), default=0)
    rows, length = padded_rows(schedule.rows, mesh, accumulation), config.buckets[-1]
    memory = step_memory(
        inputs.decoder,
        inputs.objective,
        make_optimizer(config.optimizer, config.run.steps),
        blank(rows, length, dict.fromkeys(config.objective.needs, top_k)),
        mesh,
        accumulation=accumulation,
    )
    students = schedule.most_students * schedule.samples
    cache = cache_memory(
        inputs.decoder,
        mesh,
        rows=students,
        slots=config.rollout.max_prompt_tokens + config.rollout.max_new_tokens,
        kv_dtype=config.rollout.kv_dtype,
    )
    sampling = SamplingMemory(weights_memory(inputs.decoder, mesh) if students else 0, cache)
    in_parts = "" if accumulation == 1 else f" in {accumulation} parts"
    limit = (mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit")
    found = table(memory, sampling, limit)
    if limit is not None:
        found += advice(config, memory, sampling, (1 - RESERVE) * limit, rows // row_shards(mesh))
    return [
        f"memory of each device, {rows} rows of {length} tokens{in_parts} (compiled, not run):",
        *(f"  {line}" for line in found),
    ]


def table(memory: StepMemory, sampling: SamplingMemory, limit: int | None) -> list[str]:
    """The bytes as a reader wants them; `limit` is what the device has, None where it does not say."""
    return [
        f"parameters {size(memory.parameters)}, optimizer {size(memory.optimizer)}, "
        f"batch {size(memory.batch)}",
        f"temporary {size(memory.temporary)}: gradients {size(memory.gradients)}, head {size(memory.head)}, "
        f"activations and the rest {size(memory.activations)}",
        f"a step takes {size(memory.total)}; sampling {size(memory.state + sum(sampling))}, of it weights "
        f"once more {size(sampling.weights)}, keys and values {size(sampling.cache)}",
        "the device does not say how much it has" if limit is None else f"the device has {size(limit)}",
    ]


def advice(
    config: RunConfig, memory: StepMemory, sampling: SamplingMemory, room: int | float, rows: int
) -> list[str]:
    """What of a run with `rows` rows on a device does not fit into `room` bytes, and the settings that help,
    with the bytes they save."""
    accumulation = config.optimizer.gradient_accumulation_steps
    found = []
    if memory.total > room:
        found.append(f"a step does NOT FIT into the {size(room)} that may be used; what helps:")
        if config.student.remat != "layer":
            found.append("  student.remat=layer: each layer's input alone is kept")
        part = rows // accumulation
        parts = [n for n in range(2, part + 1) if part % n == 0]
        if parts:
            enough = (n for n in parts if memory.activations * (1 - 1 / n) >= memory.total - room)
            n = next(enough, part)
            saved = size(memory.activations * (1 - 1 / n))
            found.append(f"  optimizer.gradient_accumulation_steps={accumulation * n}: about {saved}")
        else:
            saved = size(memory.activations / 2)
            found.append(f"  half of rollout.max_new_tokens and shapes.buckets: at least {saved}")
        saved = size((memory.state + memory.gradients) / 2)
        found.append(f"  twice as many devices on mesh.fsdp: {saved} of parameters, gradients and optimizer")
    if memory.state + sum(sampling) > room:
        found.append(f"sampling does NOT FIT into the {size(room)} that may be used; what helps:")
        found.append(
            "  half of data.prompts_per_step, rollout.samples_per_prompt or rollout.max_new_tokens: up to "
            f"{size(sampling.cache / 2)}"
        )
    return found or [f"fits into the {size(room)} that may be used"]


def size(count: int | float) -> str:
    """Bytes in words."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"


def _shape(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
