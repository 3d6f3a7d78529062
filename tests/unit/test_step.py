"""One update by the jitted step: in parts as whole, whatever of a layer is kept, and what weight decay leaves
alone."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdistill.losses.alm import ALM, ALMConfig
from jaxdistill.losses.gkd import GKD, GKDConfig
from jaxdistill.losses.reverse_kl import ReverseKL, ReverseKLConfig
from jaxdistill.optimizer import OptimizerConfig, make_optimizer
from jaxdistill.parallel import MeshConfig, make_mesh, param_shardings, place_batch
from jaxdistill.step import initial_state, make_train_step
from jaxdistill.students import Decoder, parse_config
from tests.unit.losses.batches import LENGTH, ROWS, VOCAB, make_batch

CONFIG = parse_config(
    {
        "model_type": "qwen2",
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": LENGTH,
    },
    where="the test",
)
# Whatever is settled over the whole batch: a norm of the advantages, a baseline; and a first pass.
OBJECTIVES = {
    "reverse_kl": ReverseKL(ReverseKLConfig(credit="lookahead", baseline="batch")),
    "gkd": GKD(GKDConfig()),
    "alm": ALM(ALMConfig()),
}


def updates(objective, accumulation: int, *, steps: int = 2, **settings):
    """Parameters, and metrics of the last step."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    graphdef, variables = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0)), nnx.Param)
    placed = jax.device_put(nnx.to_pure_dict(variables), param_shardings(variables, mesh))
    # A large epsilon: Adam turns rounding of a zero gradient into a full step.
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, eps=1e-3, **settings), 10)
    state, frozen = initial_state(nnx.merge(graphdef, placed), optimizer, mesh)
    step = make_train_step(graphdef, objective, optimizer, state, mesh, accumulation=accumulation)
    metrics = {}
    for seed in range(steps):
        batch = replace(make_batch(seed), weight=np.array([1, 1, 0.5, 0], np.float32))  # a row of padding
        state, metrics = step(state, frozen, place_batch(batch, mesh))
    return state.params, {name: mean.value for name, mean in metrics.items()}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_in_parts_is_the_same_update(name):
    whole, metrics = updates(OBJECTIVES[name], 1)
    for parts in (2, ROWS):
        params, theirs = updates(OBJECTIVES[name], parts)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), params, whole)
        assert theirs.keys() == metrics.keys()
        for key, value in metrics.items():
            np.testing.assert_allclose(theirs[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


def test_weight_decay_is_of_matrices_alone():
    """Biases and norm scales move the same with and without it."""
    decayed, plain = (updates(OBJECTIVES["gkd"], 1, steps=1, weight_decay=d)[0] for d in (0.5, 0.0))
    moved = jax.tree.map(
        lambda x, y: bool(np.abs(np.asarray(x) - np.asarray(y)).max() > 1e-4), decayed, plain
    )
    layers = moved.pop("layers")
    assert moved == {"embedding": True, "final_norm": False, "head": True}
    kept = {name for name, x in layers.items() if not x}
    assert kept == {"attention_norm", "mlp_norm", "query_bias", "key_bias", "value_bias"}


def test_what_is_kept_of_a_layer_changes_work_alone():
    """The gradient of every remat policy is the same; the less is kept, the more products are computed."""
    tokens = jnp.asarray(make_batch().tokens)
    gradients, products = {}, {}
    for remat in ("layer", "dots", "none"):
        graphdef, params = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0), remat=remat), nnx.Param)

        def value(params, graphdef=graphdef):
            return jnp.square(nnx.merge(graphdef, params)(tokens)).sum()

        params = nnx.to_pure_dict(params)
        program = jax.make_jaxpr(jax.grad(value))(params)
        products[remat] = str(program).count("dot_general[")
        gradients[remat] = jax.jit(jax.grad(value))(params)
        if remat == "layer":
            # The pass over the layers gives its result and their inputs, and not the parameters again.
            scan = next(e for e in program.eqns if e.primitive.name == "scan")
            rows = (ROWS, LENGTH, CONFIG.hidden_size)
            assert [v.aval.shape for v in scan.outvars] == [rows, (CONFIG.num_layers, *rows)]
    assert products["layer"] > products["dots"] > products["none"]
    for remat in ("dots", "none"):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
            gradients[remat],
            gradients["layer"],
        )
