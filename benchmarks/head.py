"""The tiled head beside the materialised one: seconds of value and gradient, and temporary bytes.

`python benchmarks/head.py [--rows --length --hidden --vocab --dtype] [--smoke] [--out FILE]`. Both compute
the same objective, `reverse_kl`, of the same numbers, which is checked first. On a CPU the head is
SmolLM2-135M's over 4 x 256 tokens in float32 and its seconds are counted; on an accelerator it is
Qwen3-1.7B's over 4 x 2,048 tokens in bfloat16 and the wall's are. Two JSON lines: the ratio of the seconds
(at most 1.2), and in float32 that of the tiled form's bytes to the formula of `shapes.head_bytes` (at most
1.3).
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from devices import platform, spent
from measure import Report, figure, in_turns, options, timed
from shapes import head_bytes

from jaxdistill.losses.head import tile_length, tile_objective
from jaxdistill.losses.reverse_kl import ReverseKL, ReverseKLConfig

SLOWER, LARGER = 1.2, 1.3
SIZES = {
    "cpu": {"rows": 4, "length": 256, "hidden": 576, "vocab": 49_152, "dtype": "float32"},
    "accelerator": {"rows": 4, "length": 2048, "hidden": 2048, "vocab": 151_936, "dtype": "bfloat16"},
}
SMOKE = {"rows": 2, "length": 64, "hidden": 32, "vocab": 512, "rounds": 1}
TILE = ReverseKL(ReverseKLConfig(credit="lookahead")).tile


def make_inputs(rows: int, length: int, hidden: int, vocab: int, dtype: Any) -> tuple[Any, Any, Any]:
    """Hidden states, matrix and targets; the student is near the policy that sampled."""
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (rows, length)
    targets = {
        "tokens": jax.random.randint(keys[2], shape, 0, vocab, dtype=jnp.int32),
        "mask": jnp.ones(shape, bool),
        "behavior": jnp.full(shape, -np.log(vocab), jnp.float32),
        "weight": jnp.ones(shape, jnp.float32),
        "advantage": jax.random.normal(keys[3], shape),
    }
    states = jax.random.normal(keys[0], (*shape, hidden), dtype)
    matrix = jax.random.normal(keys[1], (vocab, hidden), dtype) * jnp.asarray(hidden**-0.5 / 4, dtype)
    return states, matrix, targets


def materialised(hidden: jax.Array, matrix: jax.Array, targets: Any) -> tuple[jax.Array, Any]:
    """Value and gradients from all logits at once. The gradient's products are written out: left to
    differentiation they would run in float32 whatever the dtype."""
    logits = jnp.einsum("btd,vd->btv", hidden, matrix, preferred_element_type=jnp.float32)
    value, d_logits = jax.value_and_grad(lambda logits: jnp.sum(TILE(logits, targets)[0]))(logits)
    d_logits = d_logits.astype(hidden.dtype)
    gradients = jnp.einsum("btv,vd->btd", d_logits, matrix), jnp.einsum("btv,btd->vd", d_logits, hidden)
    return value, gradients


def tiled(width: int, hidden: jax.Array, matrix: jax.Array, targets: Any) -> tuple[jax.Array, Any]:
    def value(hidden: jax.Array, matrix: jax.Array) -> jax.Array:
        return tile_objective(TILE, width, None, False, hidden, matrix, targets)[0]

    return jax.value_and_grad(value, (0, 1))(hidden, matrix)


def main(argv: Sequence[str] | None = None) -> int:
    parser = options(__doc__)
    parser.set_defaults(**SIZES[platform()])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        vars(arguments).update(SMOKE)
    report = Report("head", arguments)
    sizes = {name: getattr(arguments, name) for name in ("rows", "length", "hidden", "vocab")}
    rows, length, hidden, vocab = sizes.values()
    inputs = make_inputs(**sizes, dtype=jnp.dtype(arguments.dtype))
    width = length // 4 if arguments.smoke else tile_length(rows, length, vocab)
    values, works, bytes_ = {}, {}, {}
    for name, form in {"tiled": partial(tiled, width), "materialised": materialised}.items():
        compiled = jax.jit(form).lower(*inputs).compile()
        values[name] = compiled(*inputs)
        bytes_[name] = compiled.memory_analysis().temp_size_in_bytes
        works[name] = lambda compiled=compiled: timed(lambda: jax.block_until_ready(compiled(*inputs)))
    tolerance = 1e-4 if arguments.dtype == "float32" else 5e-2
    for got, expected in zip(*map(jax.tree.leaves, values.values()), strict=True):
        got, expected = (np.asarray(x, np.float32) for x in (got, expected))
        np.testing.assert_allclose(got, expected, atol=tolerance * float(np.abs(expected).max()))
    taken = {name: spent(s) for name, s in in_turns(works, rounds=arguments.rounds).items()}
    row = figure(
        "head_over_materialised", taken["tiled"] / taken["materialised"], "times the seconds", SLOWER
    )
    report.add(
        row
        | {
            "shape": sizes,
            "dtype": arguments.dtype,
            "seconds": {name: float(f"{value:.4g}") for name, value in taken.items()},
        }
    )
    formula = head_bytes(rows, length, hidden, vocab, gathered=False)
    apart = max(bytes_["tiled"] / formula, formula / bytes_["tiled"])
    limit = LARGER if arguments.dtype == "float32" else None
    row = figure("head_bytes_and_formula", apart, "the larger over the smaller", limit)
    report.add(row | {"temporary_bytes": bytes_ | {"formula": formula}})
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
