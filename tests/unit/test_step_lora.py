"""Steps of a student with adapters: what moves, what has moments, and what is as it was."""

import jax
import numpy as np
import optax
from flax import nnx

from jaxdistill.losses.gkd import GKD, GKDConfig
from jaxdistill.optimizer import OptimizerConfig, make_optimizer
from jaxdistill.parallel import MeshConfig, make_mesh, param_shardings, place_batch
from jaxdistill.step import initial_state, make_train_step
from jaxdistill.students import Decoder, LoraConfig, merge
from tests.unit.losses.batches import make_batch
from tests.unit.test_step import CONFIG

LORA = LoraConfig(rank=4, alpha=8.0)
RATE = 1e-2


def steps(count: int, optimizer, *, accumulation: int = 1):
    """All parameters before, and the state and the frozen parameters after."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    graphdef, variables = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0), lora=LORA), nnx.Param)
    placed = jax.device_put(nnx.to_pure_dict(variables), param_shardings(variables, mesh))
    before = jax.tree.map(np.array, placed)
    state, frozen = initial_state(nnx.merge(graphdef, placed), optimizer, mesh)
    step = make_train_step(graphdef, GKD(GKDConfig()), optimizer, state, mesh, accumulation=accumulation)
    for seed in range(count):
        state, _ = step(state, frozen, place_batch(make_batch(seed), mesh))
    return before, state, frozen


def test_adapters_alone_move_and_have_moments_in_parts_as_whole():
    # A large epsilon: Adam turns rounding of a zero gradient into a full step.
    settings = OptimizerConfig(learning_rate=RATE, eps=1e-3, weight_decay=0.1)
    before, state, frozen = steps(2, make_optimizer(settings, 10))
    adapters = before.pop("adapters")
    assert state.params.keys() == {"adapters"} and frozen.keys() == before.keys()
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), state.params["adapters"], adapters)
    assert min(moved.values()) > 1e-4
    sizes = {leaf.shape for leaf in jax.tree.leaves(adapters)} | {()}
    assert {leaf.shape for leaf in jax.tree.leaves(state.opt_state)} <= sizes
    _, parts, _ = steps(2, make_optimizer(settings, 10), accumulation=2)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), state.params, parts.params)


def test_the_first_step_of_b_is_that_of_the_whole_weights_through_a():
    """B is zero, so that the merged weights are the base, and dB = s A' dW of its full gradient."""
    before, state, _ = steps(1, optax.sgd(1.0))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    plain = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0)), nnx.Param)[0]
    params = jax.tree.map(jax.numpy.asarray, merge(before, LORA))
    full, nothing = initial_state(nnx.merge(plain, params), optax.sgd(1.0), mesh)
    assert nothing == {}
    step = make_train_step(plain, GKD(GKDConfig()), optax.sgd(1.0), full, mesh)
    start = jax.tree.map(np.array, full.params["layers"])
    after, _ = step(full, {}, place_batch(make_batch(0), mesh))
    for target in LORA.targets:
        d = start[target] - np.asarray(after.params["layers"][target])
        want = LORA.scale * np.einsum("lir,lio->lro", before["adapters"][f"{target}_lora_a"], d)
        got = -np.asarray(state.params["adapters"][f"{target}_lora_b"])
        assert np.abs(want).max() > 1e-4
        np.testing.assert_allclose(got, want, atol=1e-6)
        a = f"{target}_lora_a"
        np.testing.assert_array_equal(state.params["adapters"][a], before["adapters"][a])
