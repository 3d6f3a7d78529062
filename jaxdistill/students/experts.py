"""A feed-forward of experts: a router gives every token to a few of many gated units.

    p = softmax(x @ router)                                              (in float32)
    y = sum over the K likeliest experts e of  w_e * down_e(activation(gate_e(x)) * up_e(x))

with w_e = p_e, or p_e over the sum of the K chosen where the model is `normalised` (Shazeer et al. 2017,
equation 1; Qwen Team 2025, Qwen3 technical report, section 2). No token is dropped: rows are sorted by
expert, and a grouped product takes each expert's stretch of them, however long it is. So a row's result does
not depend on the other rows, and padding may stand among them.

Every device does this for its own rows, with its share of the experts (`mixture`).

What a grouped product (`jax.lax.ragged_dot`) costs is the compiler's doing. Where it has no kernel, it masks
all rows for every expert and multiplies them with each: N times the work, and N times the room. With jax 0.12
that is so on CPUs, and on CUDA, going by XLA's sources, at least for the weights' gradients.

Letters: B rows, T positions, D hidden, N experts, K experts of a token, M tokens, F width of an expert, L
layers.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxdistill.parallel.rules import ROWS, AnyMesh, partition
from jaxdistill.students.architecture import Experts

Shape = tuple[int, ...]
Axes = tuple[str | None, ...]
Params = Mapping[str, Array]
Activation = Callable[[Array], Array]


def expert_shapes(experts: Experts, hidden: int) -> dict[str, tuple[Shape, Axes]]:
    """Name -> (shape, logical axes) of one layer's router and experts; kernels are [in, out]."""
    count, width = experts.count, experts.width
    return {
        "router": ((hidden, count), ("embed", None)),
        "expert_gate": ((count, hidden, width), ("expert", "expert_embed", "mlp")),
        "expert_up": ((count, hidden, width), ("expert", "expert_embed", "mlp")),
        "expert_down": ((count, width, hidden), ("expert", "mlp", "expert_embed")),
    }


class Routing(NamedTuple):
    """The router's probability of every expert, and which were chosen, the likeliest first."""

    probabilities: Float32[Array, "B T N"]
    chosen: Int32[Array, "B T K"]


class Load(NamedTuple):
    """How tokens fall on the experts, summed over `tokens` of them: how many chose each, and the router's
    probability of each."""

    chosen: Float32[Array, "*L N"]
    probability: Float32[Array, "*L N"]
    tokens: Float32[Array, "*L"]


def mixture(
    experts: Experts, activation: Activation, p: Params, x: Float[Array, "B T D"], mesh: AnyMesh | None
) -> tuple[Float[Array, "B T D"], Routing]:
    """What the chosen experts add for each token; `p` has one layer's arrays of `expert_shapes`.

    With a mesh of E devices along `expert`, each holds N/E experts. Its group's rows are gathered, the
    device computes its own experts' part of all of them, and the parts are summed back to where the rows
    came from: each device receives (E - 1) times its own rows, and sends as much. An all-to-all would move
    no less as soon as K >= E, and could not be smaller than the worst case without dropping tokens. Room is
    taken for E * K times its own rows, in case all choose its experts. Weights are gathered over `fsdp`
    alone, as every layer's are, never over `expert`.
    """
    run = partial(_on_device, experts, activation)
    if mesh is None:
        return run(False, False, p, x)
    specs = {
        name: partition(shape, tuple(axis if axis in ("expert", "mlp") else None for axis in axes), mesh)
        for name, (shape, axes) in expert_shapes(experts, x.shape[-1]).items()
    }
    rows = PartitionSpec(ROWS)
    over_expert, _, over_tensor = specs["expert_gate"]
    run = partial(run, over_expert is not None, over_tensor is not None)
    own = {name: p[name] for name in specs}
    return jax.shard_map(run, mesh=mesh, in_specs=(specs, rows), out_specs=rows)(own, x)


def _on_device(
    experts: Experts,
    activation: Activation,
    over_expert: bool,
    over_tensor: bool,
    p: Params,
    x: Float[Array, "B T D"],
) -> tuple[Float[Array, "B T D"], Routing]:
    """`mixture` of one device's rows, together with the devices that hold other experts, or other parts of
    their width."""
    routing, weights = route(experts, p["router"], x)
    tokens = (
        x.reshape(-1, x.shape[-1]),
        weights.reshape(-1, experts.per_token),
        routing.chosen.reshape(-1, experts.per_token),
    )
    if over_expert:
        rows, weights, chosen = jax.lax.all_gather(tokens, "expert", tiled=True)
        first = jax.lax.axis_index("expert") * p["expert_gate"].shape[0]
        y = _chosen_experts(activation, p, rows, weights, chosen - first)
        y = jax.lax.psum_scatter(y, "expert", tiled=True)
    else:
        y = _chosen_experts(activation, p, *tokens)
    if over_tensor:
        y = jax.lax.psum(y, "tensor")
    return y.reshape(x.shape), routing


def route(
    experts: Experts, router: Float[Array, "D N"], x: Float[Array, "B T D"]
) -> tuple[Routing, Float32[Array, "B T K"]]:
    """Which experts each token is given to, and the weight of each."""
    logits = jnp.einsum("btd,dn->btn", x, router, preferred_element_type=jnp.float32)
    probabilities = jax.nn.softmax(logits, axis=-1)
    weights, chosen = jax.lax.top_k(probabilities, experts.per_token)
    if experts.normalised:
        weights /= weights.sum(axis=-1, keepdims=True)
    return Routing(probabilities, chosen), weights


def _chosen_experts(
    activation: Activation,
    p: Params,
    x: Float[Array, "M D"],
    weights: Float32[Array, "M K"],
    chosen: Int32[Array, "M K"],
) -> Float[Array, "M D"]:
    """The weighted sum over each token's chosen experts, as far as they are among those in `p`; experts are
    numbered from the first of `p`, and numbers outside of it are other devices'."""
    count = p["expert_gate"].shape[0]
    flat = chosen.reshape(-1)
    here = (flat >= 0) & (flat < count)
    group = jnp.where(here, flat, count)  # what is not here goes last
    order = jnp.argsort(group)
    sizes = jnp.bincount(group, length=count + 1)[:count]
    # Rows behind the last group are in no product: what stands there, and its gradient, may be anything.
    within = here[order][:, None]
    # Permutations, and no sums at repeated places: those would add up in another order each time on a GPU.
    rows = jnp.repeat(x, chosen.shape[1], axis=0).at[order].get(unique_indices=True)
    rows = jnp.where(within, rows, 0)
    gate = jax.lax.ragged_dot(rows, p["expert_gate"], sizes)
    up = jax.lax.ragged_dot(rows, p["expert_up"], sizes)
    down = jax.lax.ragged_dot(activation(gate) * up, p["expert_down"], sizes)
    added = jnp.where(within, down, 0).at[jnp.argsort(order)].get(unique_indices=True)
    added = added.reshape(*chosen.shape, -1).astype(jnp.float32)
    return (added * weights[:, :, None]).sum(axis=1).astype(x.dtype)


def load(routing: Routing, real: Bool[Array, "B T"]) -> Load:
    """How the tokens that are `real` fall on the experts."""
    counted = real.astype(jnp.float32)
    picks = jax.nn.one_hot(routing.chosen, routing.probabilities.shape[-1], dtype=jnp.float32).sum(axis=2)
    return Load(
        jnp.einsum("btn,bt->n", picks, counted),
        jnp.einsum("btn,bt->n", routing.probabilities, counted),
        counted.sum(),
    )


def load_balance(load: Load) -> Float32[Array, ""]:
    """The auxiliary loss that keeps experts equally busy, without its coefficient: mean over layers of

        N * sum over experts i of f_i * P_i

    with f_i how often a token chooses i, on average, and P_i the router's mean probability of it (Fedus et
    al. 2021, equations 4 to 6; with K experts a token the f_i sum to K, as in transformers'
    `load_balancing_loss_func`). It is K where every expert gets the same, and at most N. Only P has a
    gradient. The means are over the whole global batch (Qiu et al. 2025), each layer by itself: what
    transformers computes from several layers at once lets one layer make up for another.

    `load` has a leading axis of layers. Without a single token the loss is 0.
    """
    tokens = jnp.maximum(load.tokens, 1.0)[:, None]
    products = (load.chosen / tokens) * (load.probability / tokens)
    return products.shape[-1] * products.sum(axis=-1).mean()
