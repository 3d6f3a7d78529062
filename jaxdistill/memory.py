"""The bytes of a device that a run's programs take: compiled, not run, and asked by `memory_analysis()`.

Letters: B rows, T positions, D hidden, V vocabulary, S cache slots, K key/value heads, E head dimension.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxdistill.batch import Batch
from jaxdistill.losses import Objective, Prepared, evaluate_objective
from jaxdistill.parallel.rules import padded_rows, param_shardings, partition, place_batch, rows_sharding
from jaxdistill.samplers import Generator, RolloutConfig, sampling_params
from jaxdistill.samplers.decoding import SEGMENT
from jaxdistill.step import make_train_step, state_shapes
from jaxdistill.students import Decoder


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
    them, for the length of a call, the `rows` with their keys and values, and what is `temporary`: the most
    that a program of the sampler takes beside these."""

    weights: int
    rows: int
    temporary: int


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


def sampling_memory(decoder: Decoder, config: RolloutConfig, mesh: Mesh, *, prompts: int) -> SamplingMemory:
    """Compile what `Generator` runs to answer `prompts` prompts (of this process) as `config` says, for a
    `decoder` of which nothing but shapes matters, and see what `memory_analysis()` says. Nothing is run."""
    graphdef, variables = nnx.split(decoder, nnx.Param)
    params = jax.tree.map(_shape, nnx.to_pure_dict(variables), param_shardings(variables, mesh))
    count, width = padded_rows(prompts, mesh) * jax.process_count(), config.max_prompt_tokens
    kv_dtype = None if config.kv_dtype is None else jnp.dtype(config.kv_dtype)
    programs = Generator(graphdef, mesh=mesh, kv_dtype=kv_dtype, ahead=True)

    def given(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows_sharding(mesh, len(shape)))

    weights = _Program(programs._weights.lower(params))
    numbers = given(jnp.int32, count)
    keys = given(jax.random.key(0).dtype, count * config.samples_per_prompt)
    begin = _Program(
        programs._begin.lower(
            params,
            given(jnp.int32, count, width),
            numbers,
            numbers,
            keys,
            samples=config.samples_per_prompt,
            capacity=width + config.max_new_tokens,
        )
    )
    steps = min(SEGMENT, config.max_new_tokens)
    sampling = sampling_params(config.temperature, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p)

    def advance(rows: Any) -> _Program:
        lowered = programs._advance.lower(
            params,
            weights.out,
            rows,
            given(jnp.bool_, len(rows.lengths)),
            np.int32(0),
            sampling=sampling,
            steps=steps,
            stop_ids=(0,),
            prompt_length=width,
        )
        return _Program(lowered)

    rows = of_device(begin.out)
    taken = [weights.new - of_device(weights.out) - rows, begin.new - rows, advance(begin.out).new]
    # The smaller batches: their programs are first run beside the rows of the whole one.
    present, held = begin.out, 0
    for _ in range(min(2, -(-config.max_new_tokens // steps) - 1)):  # what follows is smaller
        size = programs._smaller(len(present.lengths))
        if size == len(present.lengths):
            break
        half = _Program(programs._taken.lower(present, given(jnp.int32, size)))
        taken += [held + half.new]
        present, held = half.out, of_device(half.out)
        taken += [held + advance(present).new]
    return SamplingMemory(of_device(weights.out), rows, max(0, *taken))


class _Program:
    """A compiled program: the shapes it gives `out`, with their shardings, and the bytes that are `new` on a
    device while it runs, beside what it is given."""

    def __init__(self, lowered: Any):
        compiled = lowered.compile()
        memory = compiled.memory_analysis()
        self.out = jax.tree.map(_shape, lowered.out_info, compiled.output_shardings)
        self.new = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def of_device(shapes: Any) -> int:
    """Bytes that one device holds of arrays, or of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(shapes)
    )


def _shape(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
