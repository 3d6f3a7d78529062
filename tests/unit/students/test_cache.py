"""What an eight-bit cache loses."""

import jax.numpy as jnp
import numpy as np

from jaxdistill.students.cache import Quantized, restored, stored, written


def test_an_integer_is_worth_the_same_everywhere_in_a_head_and_rounds_to_the_nearest():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 16)).astype(np.float32)
    x[0, 0] *= 1e3
    x[1, 2, 3] = 0
    buffer = stored(jnp.asarray(x), jnp.int8)
    assert isinstance(buffer, Quantized) and buffer.integers.dtype == jnp.int8
    unit = np.abs(x).max(axis=-1, keepdims=True) / 127
    got = np.asarray(restored(buffer, jnp.float32))
    assert (np.abs(got - x) <= unit / 2 * (1 + 1e-5)).all()
    np.testing.assert_array_equal(got[1, 2, 3], 0)
    largest = np.abs(x).argmax(axis=-1)[..., None]
    np.testing.assert_allclose(
        np.take_along_axis(got, largest, -1), np.take_along_axis(x, largest, -1), rtol=1e-6
    )


def test_what_is_written_stands_in_its_slot_alone():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 16)).astype(np.float32)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int8):
        buffer = stored(jnp.pad(x, [(0, 0), (0, 3), (0, 0), (0, 0)]), dtype)
        more = written(buffer, jnp.asarray(x[:, :1]), jnp.int32(4))
        before, after = np.asarray(restored(buffer, jnp.float32)), np.asarray(restored(more, jnp.float32))
        np.testing.assert_array_equal(np.delete(after, 4, axis=1), np.delete(before, 4, axis=1))
        np.testing.assert_array_equal(after[:, 4], before[:, 0])
        np.testing.assert_array_equal(before[:, 3:], 0)
