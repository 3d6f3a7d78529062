"""Adam with moments in fewer bits: what is stored is right in the mean, and training hardly notices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.moments import from_levels, scale_by_adam, to_bfloat16, to_levels


def of_many_sizes(signed: bool) -> np.ndarray:
    """Magnitudes over nine decades, some 0, one row of nothing but 0."""
    random = np.random.default_rng(0)
    x = np.exp(random.uniform(-20, 1, (6, 64))) * (random.choice([-1, 1], (6, 64)) if signed else 1)
    x[:, 5], x[3] = 0.0, 0.0
    return x.astype(np.float32)


def test_bfloat16_is_one_of_the_neighbours_and_right_in_the_mean():
    x = of_many_sizes(True)
    made = np.stack(
        [
            np.asarray(to_bfloat16(jnp.asarray(x), key), np.float32)
            for key in jax.random.split(jax.random.key(1), 400)
        ]
    )
    assert (np.abs(made - x) <= np.abs(x) * 2.0**-7).all()
    np.testing.assert_allclose(
        made.mean(axis=0), x, rtol=2.0**-7 / 400**0.5 * 3
    )  # six standard errors at most
    exact = jnp.asarray(x, jnp.bfloat16)
    assert (to_bfloat16(exact.astype(jnp.float32), jax.random.key(2)) == exact).all()


@pytest.mark.parametrize("signed", [True, False])
def test_levels_are_neighbours_and_right_in_the_mean(signed):
    x = of_many_sizes(signed)
    made = np.stack(
        [
            np.asarray(from_levels(to_levels(jnp.asarray(x), key, signed=signed), signed=signed))
            for key in jax.random.split(jax.random.key(1), 400)
        ]
    )
    most = np.abs(x).max(axis=-1, keepdims=True)
    above = np.abs(x) >= most * 2.0 ** (-20 if signed else -40)  # the least level
    assert (np.abs(made - x) <= 0.12 * np.abs(x))[:, above].all()
    np.testing.assert_allclose(made.mean(axis=0)[above], x[above], rtol=0.12 / 400**0.5 * 3)
    assert (made[:, x == 0] == 0).all()
    assert (np.sign(made) == np.sign(x))[:, above].all()
    np.testing.assert_allclose(np.abs(made).max(axis=(0, 2)), most[:, 0], rtol=1e-6)


def test_a_second_moment_never_becomes_zero_by_rounding():
    x = jnp.asarray([[1.0, 1e-30, 1e-37, 0.0]], jnp.float32)
    made = from_levels(to_levels(x, jax.random.key(0), signed=False), signed=False)
    assert (np.asarray(made) > 0).tolist() == [[True, True, True, False]]


def steps(dtype: str, count: int) -> tuple[np.ndarray, list[float]]:
    """A badly scaled quadratic, minimised from noisy gradients."""
    target = {"w": jnp.linspace(-1, 1, 96).reshape(4, 24), "b": jnp.ones(8)}
    curvature = jax.tree.map(lambda t: jnp.exp(jnp.linspace(-4, 2, t.size)).reshape(t.shape), target)
    optimizer = optax.chain(scale_by_adam(0.9, 0.95, 1e-8, dtype), optax.scale(-0.02))
    params = jax.tree.map(jnp.zeros_like, target)

    @jax.jit
    def step(params, state, key):
        gradients = jax.tree.map(
            lambda p, t, c: c * (p - t + 0.1 * jax.random.normal(key, p.shape)), params, target, curvature
        )
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state, losses = optimizer.init(params), []
    for key in jax.random.split(jax.random.key(3), count):
        params, state = step(params, state, key)
        losses.append(
            float(
                sum(
                    jnp.mean((p - t) ** 2)
                    for p, t in zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True)
                )
            )
        )
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(params)]), losses


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_it_trains_as_with_exact_moments(dtype):
    (exact, losses), (stored, others) = steps("float32", 150), steps(dtype, 150)
    assert losses[-1] < 0.01 * losses[0] and others[-1] < 1.25 * losses[-1]
    assert 0 < np.abs(exact - stored).max() < 0.1  # it is another computation, and about the same one


@pytest.mark.parametrize(("dtype", "bytes_each"), [("float32", 8), ("bfloat16", 4), ("int8", 2)])
def test_what_a_parameter_takes(dtype, bytes_each):
    params = {"w": jnp.zeros((64, 1024))}
    state = jax.eval_shape(scale_by_adam(0.9, 0.95, 1e-8, dtype).init, params)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert bytes_each <= size / params["w"].size < bytes_each * 1.005


def test_the_rounding_is_that_of_the_update_s_count():
    first, second = (steps("int8", 5)[0] for _ in range(2))
    assert (first == second).all()
