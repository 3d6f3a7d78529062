"""One update: forward, tiled head, gradient, optax; one compiled program per batch shape.

Letters: B rows, T positions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32

from jaxdistill.batch import Batch, Mean
from jaxdistill.losses import LossOutput, Objective, evaluate_objective
from jaxdistill.parallel.rules import param_shardings, row_shards
from jaxdistill.students.decoder import Decoder

Metrics = dict[str, Mean]


class TrainState(NamedTuple):
    """What changes from step to step; `params` and `opt_state` are sharded alike."""

    step: Int32[Array, ""]
    params: Any
    opt_state: Any


def initial_state(decoder: Decoder, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state before the first step, on `mesh`; takes over the decoder's (placed) parameters."""
    variables = nnx.state(decoder, nnx.Param)
    params, shardings = nnx.to_pure_dict(variables), param_shardings(variables, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    structure = jax.tree.structure(params)

    def is_moment(node: Any) -> bool:
        return jax.tree.structure(node) == structure

    # Moments lie where the parameters they follow lie; counters lie everywhere.
    opt_shardings = jax.tree.map(
        lambda node: shardings if is_moment(node) else replicated,
        jax.eval_shape(optimizer.init, params),
        is_leaf=is_moment,
    )
    opt_state = jax.jit(optimizer.init, out_shardings=opt_shardings)(params)
    return TrainState(jax.device_put(jnp.int32(0), replicated), params, opt_state)


def make_train_step(
    graphdef: nnx.GraphDef[Decoder],
    objective: Objective,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    mesh: Mesh,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A jitted step that consumes (donates) the state it is given and returns the next one on the same
    devices as `state`, so that no later call meets another layout and compiles again.

    Metrics: `loss`, `grad_norm` and the objective's own, each a `Mean` over the global batch.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        prepared = objective.prepare(batch)

        def loss(params: Any) -> tuple[Array, LossOutput]:
            decoder = nnx.merge(graphdef, params)
            hidden = decoder(batch.tokens)
            out = evaluate_objective(
                objective, prepared, hidden, decoder.output_embedding, row_shards=row_shards(mesh)
            )
            return jnp.asarray(out.objective.total / out.objective.weight), out

        (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = out.metrics | {
            "loss": out.objective,
            "grad_norm": Mean(optax.global_norm(gradients), jnp.float32(1)),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))
