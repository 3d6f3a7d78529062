"""The training step of a student with experts: what the router's loss adds, and over which tokens."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxdistill.losses.sft import SFT, SFTConfig
from jaxdistill.parallel import MeshConfig, make_mesh
from jaxdistill.parallel.rules import rows_sharding
from jaxdistill.step import initial_state, make_train_step, read_tokens
from jaxdistill.students import Decoder, parse_config
from jaxdistill.students.experts import load_balance
from tests.unit.losses.batches import VOCAB, make_batch

CONFIG = parse_config(
    {
        "model_type": "qwen3_moe",
        "vocab_size": VOCAB,
        "hidden_size": 12,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 6,
        "norm_topk_prob": True,
    },
    where="the test",
)


def test_what_is_read_is_all_up_to_the_last_token_of_the_response():
    batch = make_batch()
    response = np.zeros_like(batch.response_mask)
    response[0, [2, 4]] = True  # a turn of the user between two of the assistant
    response[1, 1] = True
    got = read_tokens(jax.tree.map(jnp.asarray, replace(batch, response_mask=response)))
    lengths = np.array([5, 2, 0, 0])
    np.testing.assert_array_equal(np.asarray(got), np.arange(response.shape[1]) < lengths[:, None])


def test_the_coefficient_times_the_gradient_of_the_balance_joins_the_objective_s():
    mesh = make_mesh(MeshConfig(fsdp=1))
    batch = jax.tree.map(jnp.asarray, make_batch())
    stepped, balances = [], []
    for coefficient in (0.0, 0.5):
        decoder = Decoder(CONFIG, rngs=nnx.Rngs(0), activation_sharding=rows_sharding(mesh, 3))
        graphdef, variables = nnx.split(decoder, nnx.Param)
        before = jax.tree.map(np.array, nnx.to_pure_dict(variables))
        state, frozen = initial_state(decoder, optax.sgd(1.0), mesh)
        objective = SFT(SFTConfig())
        step = make_train_step(
            graphdef, objective, optax.sgd(1.0), state, mesh, router_aux_coefficient=coefficient
        )
        state, metrics = step(state, frozen, batch)
        stepped.append(jax.tree.map(np.array, state.params))
        balances.append(metrics["router_balance"].value)

    alone = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0)), nnx.Param)[0]

    @jax.jit
    @jax.value_and_grad
    def balance(params):
        _, load = nnx.merge(alone, params).read(batch.tokens, read_tokens(batch))
        return load_balance(load)

    value, gradient = balance(before)
    assert balances == pytest.approx([float(value)] * 2)
    assert np.abs(gradient["layers"]["router"]).max() > 1e-3
    moved = jax.tree.map(lambda without, with_it: without - with_it, *stepped)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 0.5 * b, atol=1e-6), moved, gradient)
