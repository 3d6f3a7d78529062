"""A feed-forward of experts against a plain loop, and what must not change it.

Letters: B rows, T positions, D hidden, N experts, K experts of a token, F width of an expert, L layers.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from jaxdistill.errors import ConfigError
from jaxdistill.parallel.mesh import AXES
from jaxdistill.students import Decoder, load_decoder, parse_config
from jaxdistill.students.architecture import Experts
from jaxdistill.students.experts import Load, _chosen_experts, expert_shapes, load_balance, mixture, route

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 40,
    "hidden_size": 12,
    "intermediate_size": 99,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 6,
    "norm_topk_prob": True,
}
HIDDEN = 12
PARITY = Path(__file__).parents[2] / "golden" / "parity"


def parameters(experts: Experts) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = expert_shapes(experts, HIDDEN)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, (shape, _) in shapes.items()}


def inputs() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (2, 7, HIDDEN))


def plain(experts: Experts, p: dict[str, jax.Array], x: jax.Array) -> np.ndarray:
    """The formula in float64, token by token and expert by expert."""
    router, gate, up, down = (np.asarray(p[name], np.float64) for name in expert_shapes(experts, HIDDEN))
    y = np.zeros(x.shape)
    for at in np.ndindex(x.shape[:2]):
        token = np.asarray(x[at], np.float64)
        probabilities = np.exp(token @ router)
        probabilities /= probabilities.sum()
        best = np.argsort(-probabilities)[: experts.per_token]
        total = probabilities[best].sum() if experts.normalised else 1.0
        for e in best:
            hidden = token @ gate[e]
            hidden = hidden / (1 + np.exp(-hidden)) * (token @ up[e])
            y[at] += probabilities[e] / total * (hidden @ down[e])
    return y


@pytest.mark.parametrize("per_token", [1, 2, 5])
@pytest.mark.parametrize("normalised", [False, True])
def test_a_mixture_is_the_weighted_sum_over_the_chosen_experts(per_token, normalised):
    experts = Experts(count=5, per_token=per_token, width=6, normalised=normalised)
    p, x = parameters(experts), inputs()
    y, routing = mixture(experts, jax.nn.silu, p, x, None)
    np.testing.assert_allclose(np.asarray(y), plain(experts, p, x), rtol=1e-4, atol=1e-4)
    assert routing.chosen.shape == (2, 7, per_token)
    np.testing.assert_allclose(np.asarray(routing.probabilities.sum(axis=-1)), 1.0, rtol=1e-5)


def test_in_bfloat16_the_router_still_chooses_in_float32():
    experts = Experts(count=5, per_token=2, width=6, normalised=True)
    p = {name: value.astype(jnp.bfloat16) for name, value in parameters(experts).items()}
    x = inputs().astype(jnp.bfloat16)
    y, routing = mixture(experts, jax.nn.silu, p, x, None)
    assert y.dtype == jnp.bfloat16 and routing.probabilities.dtype == jnp.float32
    wanted = plain(experts, p, x)
    np.testing.assert_allclose(np.asarray(y, np.float64), wanted, atol=0.02 * np.abs(wanted).max())


def test_experts_that_nobody_or_everybody_chooses():
    experts = Experts(count=5, per_token=2, width=6, normalised=True)
    p, x = parameters(experts), inputs().at[..., 0].set(1.0)
    p["router"] = p["router"].at[0].set(jnp.array([50.0, 0.0, 0.0, -50.0, 0.0]))
    y, routing = mixture(experts, jax.nn.silu, p, x, None)
    chosen = np.asarray(routing.chosen)
    assert (chosen[..., 0] == 0).all() and not (chosen == 3).any()
    np.testing.assert_allclose(np.asarray(y), plain(experts, p, x), rtol=1e-4, atol=1e-4)


@jax.custom_vjp
def leaving_rubbish(rows: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    """A grouped product as a kernel may compute it: rows behind the last group are not written, neither here
    nor in the gradient."""
    return _rubbish(jax.lax.ragged_dot(rows, kernels, sizes), sizes)


def _rubbish(rows: jax.Array, sizes: jax.Array) -> jax.Array:
    return jnp.where((jnp.arange(rows.shape[0]) < sizes.sum())[:, None], rows, jnp.nan)


def _rubbish_backward(kept: Any, cotangent: jax.Array) -> Any:
    rows, kernels, sizes = kept
    clean = [jnp.nan_to_num(rows), jnp.nan_to_num(cotangent)]
    _, vjp = jax.vjp(lambda a, b: _RAGGED_DOT(a, b, sizes), clean[0], kernels)
    d_rows, d_kernels = vjp(clean[1])
    return _rubbish(d_rows, sizes), d_kernels, None


_RAGGED_DOT = jax.lax.ragged_dot
leaving_rubbish.defvjp(lambda *args: (_rubbish(_RAGGED_DOT(*args), args[2]), args), _rubbish_backward)


def test_the_parts_of_several_devices_add_up_whatever_stands_behind_their_groups(monkeypatch):
    experts = Experts(count=5, per_token=2, width=6, normalised=True)
    p, x = parameters(experts), inputs()

    def whole(p: Any, x: jax.Array) -> jax.Array:
        return mixture(experts, jax.nn.silu, p, x, None)[0].reshape(-1, HIDDEN)

    def in_parts(p: Any, x: jax.Array) -> jax.Array:
        routing, weights = route(experts, p["router"], x)
        total = jnp.zeros((x.shape[0] * x.shape[1], HIDDEN))
        for first, last in ((0, 2), (2, 3), (3, 5)):
            mine = {name: value[first:last] for name, value in p.items() if name != "router"}
            chosen = routing.chosen.reshape(-1, 2) - first
            part = _chosen_experts(jax.nn.silu, mine, x.reshape(-1, HIDDEN), weights.reshape(-1, 2), chosen)
            total += part
        return total

    def value_and_gradient(run: Any) -> Any:
        return jax.value_and_grad(lambda p, x: (run(p, x) ** 2).sum(), argnums=(0, 1))(p, x)

    wanted = value_and_gradient(whole)
    monkeypatch.setattr(jax.lax, "ragged_dot", leaving_rubbish)
    got = value_and_gradient(in_parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), got, wanted)


def test_padding_changes_no_real_token():
    decoder = Decoder(parse_config(CONFIG, where="the test"), rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 40, (2, 8)).astype(np.int32)
    other = tokens.copy()
    other[0, 5:], other[1, 3:] = 39, 0
    read = nnx.jit(lambda decoder, tokens: decoder(tokens))
    one, two = (np.asarray(read(decoder, jnp.asarray(each))) for each in (tokens, other))
    assert np.abs(one[0, 5:] - two[0, 5:]).max() > 1e-2
    np.testing.assert_allclose(two[0, :5], one[0, :5], atol=1e-6)
    np.testing.assert_allclose(two[1, :3], one[1, :3], atol=1e-6)


def test_the_balance_is_k_where_experts_are_equally_busy_and_n_where_one_does_it_all():
    n, k, tokens = 4, 2, 10.0
    even = Load(jnp.full((3, n), tokens * k / n), jnp.full((3, n), tokens / n), jnp.full(3, tokens))
    assert float(load_balance(even)) == pytest.approx(k)
    # Another expert in each layer: together they look balanced, each layer is not.
    alone = Load(jnp.eye(n) * tokens, jnp.eye(n) * tokens, jnp.full(n, tokens))
    assert float(load_balance(alone)) == pytest.approx(n)
    assert float(load_balance(jax.tree.map(jnp.zeros_like, even))) == 0.0


def test_the_balance_is_of_real_tokens_alone():
    decoder = Decoder(parse_config(CONFIG, where="the test"), rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 8)), jnp.int32)
    real = jnp.arange(8)[None] < jnp.array([5, 0])[:, None]
    read = nnx.jit(Decoder.read)
    _, padded = read(decoder, tokens, real)
    _, alone = read(decoder, tokens[:1, :5], jnp.ones((1, 5), bool))
    assert padded is not None and padded.tokens.tolist() == [5.0, 5.0]
    np.testing.assert_array_equal(np.asarray(padded.chosen), np.asarray(alone.chosen))
    np.testing.assert_allclose(np.asarray(padded.probability), np.asarray(alone.probability), atol=1e-5)


def test_the_number_of_experts_under_either_name():
    renamed = {("num_local_experts" if k == "num_experts" else k): v for k, v in CONFIG.items()}
    assert parse_config(renamed, where="x") == parse_config(CONFIG, where="x")
    plain = parse_config({k: v for k, v in CONFIG.items() if k != "norm_topk_prob"}, where="x")
    assert plain.experts == Experts(count=5, per_token=2, width=6, normalised=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2; only 1 is implemented"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]; only \[\] is implemented"),
        ({"num_experts_per_tok": 6}, "num_experts_per_tok is 6, expected at most the 5 experts"),
        ({"num_experts": 0}, "num_experts is 0, expected a whole number"),
        ({"num_local_experts": 4}, "num_experts is 5, expected 4, as num_local_experts says"),
        ({"norm_topk_prob": "false"}, "norm_topk_prob is 'false', expected true or false"),
    ],
)
def test_a_config_that_is_not_implemented_is_refused_by_name(change, words):
    with pytest.raises(ConfigError, match=words):
        parse_config(CONFIG | change, where="x")


def test_a_mesh_that_cannot_share_out_the_experts_is_refused():
    def mesh(expert: int) -> Mesh:
        return Mesh(np.array(jax.devices()[:1] * expert).reshape(1, 1, expert, 1), AXES)

    with pytest.raises(ConfigError, match=r"mesh\.expert=3 does not divide the 8 experts"):
        load_decoder(PARITY / "qwen3_moe", mesh=mesh(3))
    with pytest.raises(ConfigError, match=r"mesh\.expert=2, but .* has no experts; .* mesh\.fsdp"):
        load_decoder(PARITY / "qwen3", mesh=mesh(2))


@pytest.mark.parametrize("name", ["num_experts", "num_experts_per_tok", "moe_intermediate_size"])
def test_a_missing_size_is_named(name):
    with pytest.raises(ConfigError, match=f"field '{name}' is missing"):
        parse_config({k: v for k, v in CONFIG.items() if k != name}, where="x")
