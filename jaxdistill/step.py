"""One update: forward, tiled head, gradient, optax; one compiled program per batch shape.

Letters: B rows, M parts of a batch, T positions.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int32, Shaped

from jaxdistill.batch import Batch, Mean
from jaxdistill.losses import LossOutput, Objective, Prepared, evaluate_objective
from jaxdistill.optimizer import updates_made
from jaxdistill.parallel.rules import param_shardings
from jaxdistill.students.decoder import Decoder
from jaxdistill.students.experts import load_balance
from jaxdistill.students.lora import trained_and_frozen

Metrics = dict[str, Mean]


class TrainState(NamedTuple):
    """What changes from step to step: the parameters that are trained, and `opt_state`, sharded alike."""

    step: Int32[Array, ""]
    params: Any
    opt_state: Any


def state_shapes(
    decoder: Decoder, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, Any]:
    """The state of a run and its frozen parameters (`trained_and_frozen`) as shapes, each with its sharding
    on `mesh`; nothing is computed or placed."""
    variables = nnx.state(decoder, nnx.Param)
    replicated = NamedSharding(mesh, PartitionSpec())

    def shape(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    params, frozen = trained_and_frozen(
        jax.tree.map(shape, nnx.to_pure_dict(variables), param_shardings(variables, mesh))
    )
    structure = jax.tree.structure(params)

    def is_moment(node: Any) -> bool:
        return jax.tree.structure(node) == structure

    def beside(leaf: Any, param: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # A scale for each row of a parameter has a last axis of 1, which nothing splits.
        spec = [axes if n > 1 else None for n, axes in zip(leaf.shape, param.sharding.spec, strict=True)]
        return shape(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    # Moments lie where the parameters they follow lie; counters lie everywhere.
    opt_state = jax.tree.map(
        lambda node: jax.tree.map(beside, node, params) if is_moment(node) else shape(node, replicated),
        jax.eval_shape(optimizer.init, params),
        is_leaf=is_moment,
    )
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    return TrainState(step, params, opt_state), frozen


def initial_state(
    decoder: Decoder, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, Any]:
    """The state before the first step and the frozen parameters, on `mesh`; takes over the decoder's (placed)
    parameters."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state_shapes(decoder, optimizer, mesh)[0])
    params, frozen = trained_and_frozen(nnx.to_pure_dict(nnx.state(decoder, nnx.Param)))
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    return TrainState(jax.device_put(jnp.int32(0), shardings.step), params, opt_state), frozen


def make_train_step(
    graphdef: nnx.GraphDef[Decoder],
    objective: Objective,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    mesh: Mesh,
    *,
    accumulation: int = 1,
    router_aux_coefficient: float = 0.0,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """A jitted step, called with the state, the frozen parameters and a batch. It consumes (donates) the
    state and returns the next one on the same devices as `state` (or `state_shapes`), so that no later call
    meets another layout and compiles again. Frozen parameters have no gradient, and stay as they are.

    With `accumulation` M above 1 the model reads the batch in M parts, one after the other, and their
    gradients are added up: the same update (what is normalised over the batch is settled before it is split)
    with the activations of one part. B must be a multiple of M times the devices that rows are split over.

    Where the loss or the gradient is not finite the update is skipped: parameters and optimizer stay as they
    are, bit for bit, and only the step is counted.

    Metrics: `loss`, `grad_norm`, `skipped` (1 for such an update), `updates` (made before this one, where
    the optimizer counts) and the objective's own, each a `Mean` over the global batch; of a student with
    experts also `router_balance` (`load_balance`, the mean over the parts). What is minimised is the loss
    plus `router_aux_coefficient` times that.
    """

    def sums(
        params: Any, frozen: Any, tokens: Int32[Array, "B T"], read: Bool[Array, "B T"], prepared: Prepared
    ) -> tuple[Array, LossOutput]:
        """What these rows add to what is minimised, and the objective's sums over them."""
        decoder = nnx.merge(graphdef, frozen | params)
        hidden, load = decoder.read(tokens, read)
        out = evaluate_objective(
            objective,
            prepared,
            hidden,
            decoder.output_embedding,
            softcap=decoder.config.logit_softcap,
            mesh=mesh,
            frozen=bool(frozen),
        )
        value = jnp.asarray(out.objective.total / out.objective.weight)  # the whole batch's weight
        if load is not None:
            balance = load_balance(load)
            value += router_aux_coefficient * balance / accumulation
            out = replace(out, metrics=out.metrics | {"router_balance": Mean(balance, jnp.float32(1))})
        return value, out

    def gradients_of(params: Any, frozen: Any, batch: Batch) -> tuple[Any, LossOutput]:
        gradient = jax.grad(sums, has_aux=True)
        prepared = objective.prepare(batch)
        if accumulation == 1:
            return gradient(params, frozen, batch.tokens, read_tokens(batch), prepared)

        def add(totals: Any, rows: tuple[Array, Array, Any]) -> tuple[Any, LossOutput]:
            tokens, read, targets = rows
            part = replace(prepared, targets=targets, metrics={})
            gradients, out = gradient(params, frozen, tokens, read, part)
            return jax.tree.map(jnp.add, totals, gradients), out

        rows = (batch.tokens, read_tokens(batch), prepared.targets)
        parts = jax.tree.map(lambda x: _parts(x, accumulation), rows)
        gradients, outs = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
        out: LossOutput = jax.tree.map(lambda x: x.sum(axis=0), outs)
        # Each part divided by the weight of all, which is therefore in the sum once too often.
        loss = Mean(out.objective.total, out.objective.weight / accumulation)
        return gradients, LossOutput(loss, out.metrics | prepared.metrics)

    def train_step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        gradients, out = gradients_of(state.params, frozen, batch)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(gradients)
        sound = jnp.isfinite(out.objective.total / out.objective.weight) & jnp.isfinite(norm)
        kept = jax.tree.map(
            lambda new, old: jnp.where(sound, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        one = jnp.float32(1)
        metrics = out.metrics | {
            "loss": out.objective,
            "grad_norm": Mean(norm, one),
            "skipped": Mean(jnp.where(sound, 0.0, one), one),
        }
        if (made := updates_made(state.opt_state)) is not None:
            metrics["updates"] = Mean(made, one)
        return TrainState(state.step + 1, *kept), metrics

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def _parts(x: Shaped[Array, "B ..."], count: int) -> Shaped[Array, "M B/M ..."]:
    """Rows m, m + M, m + 2M, ... as part m: every device splits the rows it has."""
    return jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)


def read_tokens(batch: Batch) -> Bool[Array, "B T"]:
    """The tokens of each row up to the last of its response: all that are not padding and can matter."""
    after = jnp.cumsum(batch.response_mask[:, ::-1], axis=1)[:, ::-1]
    return after > 0
