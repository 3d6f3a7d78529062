"""The tiled head against the plain [B, T, V] product: values, gradients, and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.losses import head
from jaxdistill.losses.base import logprob_and_entropy
from jaxdistill.losses.xtoken import XToken, XTokenConfig
from tests.unit.losses.batches import VOCAB as BATCH_VOCAB
from tests.unit.losses.batches import make_batch, on_device

ROWS, LENGTH, HIDDEN, VOCAB = 3, 12, 8, 50


@pytest.fixture
def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (ROWS, LENGTH, HIDDEN))
    embedding = jax.random.normal(keys[1], (VOCAB, HIDDEN))
    targets = {
        "tokens": jax.random.randint(keys[2], (ROWS, LENGTH), 0, VOCAB, dtype=jnp.int32),
        "mask": jax.random.bernoulli(keys[3], 0.6, (ROWS, LENGTH)),
    }
    return hidden, embedding, targets


def objective(logits, targets):
    logprob, entropy = logprob_and_entropy(logits, targets["tokens"])
    return jnp.where(targets["mask"], -(logprob + 0.1 * jnp.square(logprob)), 0.0), {
        "entropy": jnp.where(targets["mask"], entropy, 0.0)
    }


def plain(hidden, embedding, targets):
    return jax.tree.map(jnp.sum, objective(jnp.einsum("btd,vd->btv", hidden, embedding), targets))


@pytest.mark.parametrize("tile", [1, 2, 5, 12])
def test_value_metrics_and_gradient_equal_the_plain_product(inputs, tile):
    hidden, embedding, targets = inputs

    def tiled(h, e):
        return head.tile_objective(objective, tile, None, False, h, e, targets)

    (value, sums), gradients = jax.value_and_grad(tiled, (0, 1), has_aux=True)(hidden, embedding)
    (expected, expected_sums), expected_gradients = jax.value_and_grad(plain, (0, 1), has_aux=True)(
        hidden, embedding, targets
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(tiled(hidden, embedding)[0], expected, rtol=1e-5)
    np.testing.assert_allclose(sums["entropy"], expected_sums["entropy"], rtol=1e-5)
    for got, want in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_the_gradient_follows_the_scale_of_the_loss(inputs):
    hidden, embedding, targets = inputs

    def scaled(h, scale):
        return scale * head.tile_objective(objective, 5, None, False, h, embedding, targets)[0]

    one, three = (jax.grad(scaled)(hidden, jnp.float32(s)) for s in (1, 3))
    np.testing.assert_allclose(three, 3 * one, rtol=1e-6)


def test_a_frozen_matrix_costs_no_gradient(inputs):
    """The same gradient of the hidden states, without a product or an array for the matrix's."""
    hidden, embedding, targets = inputs
    gradients, programs = [], []
    for frozen in (True, False):

        def tiled(h, e, frozen=frozen):
            return head.tile_objective(objective, 5, None, frozen, h, e, targets)[0]

        gradients.append(jax.grad(tiled)(hidden, embedding))
        programs.append(str(jax.make_jaxpr(jax.grad(tiled))(hidden, embedding)))
    np.testing.assert_array_equal(*gradients)
    products = [program.count("dot_general[") for program in programs]
    assert products[1] - products[0] == 1
    assert [f":f32[{VOCAB},{HIDDEN}] = " in program for program in programs] == [False, True]


def test_a_tile_respects_the_bound_and_wastes_little():
    for length in (1, 7, 64, 97, 997, 4096):
        width = head.tile_length(8, length, 32_000)
        assert 1 <= width <= length
        assert width == 1 or 8 * width * 32_000 <= head.TILE_LOGITS
        tiles = -(-length // width)
        assert tiles * width - length < tiles  # the filling is less than one position a tile


def test_row_statistics_equal_log_softmax(inputs):
    hidden, embedding, targets = inputs
    chosen = jnp.asarray([[3, 4], [5, 3], [0, 49]], jnp.int32)
    got = head.row_statistics(hidden, embedding, targets["tokens"], top_k=5, chosen=chosen)
    logprobs = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, embedding))
    best, ids = jax.lax.top_k(logprobs, 5)
    np.testing.assert_allclose(
        got.logprob, jnp.take_along_axis(logprobs, targets["tokens"][..., None], -1)[..., 0], atol=1e-5
    )
    np.testing.assert_allclose(got.topk_logprobs, best, atol=1e-5)
    np.testing.assert_array_equal(got.topk_ids, ids)
    np.testing.assert_allclose(got.chosen_logprobs[1], logprobs[1][:, chosen[1]], atol=1e-5)


def test_temporary_memory_stays_far_below_the_logits():
    rows, length, hidden_size, vocab = 4, 1024, 64, 32_768

    def loss(h, e, tokens):
        targets = {"tokens": tokens, "mask": jnp.ones(tokens.shape, bool)}
        return head.tile_objective(objective, 32, None, False, h, e, targets)[0]

    compiled = (
        jax.jit(jax.grad(loss, (0, 1)))
        .lower(
            jax.ShapeDtypeStruct((rows, length, hidden_size), jnp.float32),
            jax.ShapeDtypeStruct((vocab, hidden_size), jnp.float32),
            jax.ShapeDtypeStruct((rows, length), jnp.int32),
        )
        .compile()
    )
    logits_bytes = 4 * rows * length * vocab
    assert compiled.memory_analysis().temp_size_in_bytes < logits_bytes / 4


def test_a_tile_of_xtoken_does_not_grow_with_the_teachers_vocabulary():
    """`tile_length` counts the student's ids alone, so nothing in a tile may be as wide as the teacher's."""
    batch = on_device(make_batch())

    def temporary_bytes(spread):
        first = tuple(range(0, spread * BATCH_VOCAB, spread))
        xtoken = XToken(XTokenConfig(), first, spread * BATCH_VOCAB)
        targets = xtoken.prepare(batch).targets

        def value(logits):
            return xtoken.tile(logits, targets)[0].sum()

        logits = jax.ShapeDtypeStruct((*batch.tokens.shape, BATCH_VOCAB), jnp.float32)
        return jax.jit(jax.grad(value)).lower(logits).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(500) == temporary_bytes(2)
