"""The tiled head beside the materialised one: seconds of value and gradient, and temporary bytes.

`python benchmarks/head.py [--rows 4 --length 256 --hidden 576 --vocab 49152 --dtype float32] [--smoke]
[--out FILE]`. Both compute the same objective, `reverse_kl`, of the same numbers, which is checked first. On
a CPU its seconds are counted, on any other device the wall's. Two JSON lines: the ratio of the seconds (at
most 1.2), and in float32 that of the tiled form's bytes to the formula of `shapes.head_bytes` (at most 1.3).
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import cpu_seconds, figure, finish
from shapes import head_bytes

from jaxdistill.losses.head import tile_length, tile_objective
from jaxdistill.losses.reverse_kl import ReverseKL, ReverseKLConfig

SLOWER, LARGER = 1.2, 1.3
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


def materialised(hidden: jax.Array, matrix: jax.Array, targets: Any) -> jax.Array:
    """The objective from all logits at once."""
    logits = jnp.einsum("btd,vd->btv", hidden, matrix, preferred_element_type=jnp.float32)
    return jnp.sum(TILE(logits, targets)[0])


def tiled(width: int, hidden: jax.Array, matrix: jax.Array, targets: Any) -> jax.Array:
    return tile_objective(TILE, width, None, False, hidden, matrix, targets)[0]


def seconds(work: Callable[[], Any], rounds: int) -> float:
    """Of one call: the CPU's where that computes, else the wall's; the least of the rounds."""
    if jax.default_backend() == "cpu":
        return cpu_seconds(lambda: jax.block_until_ready(work()), repeats=1, rounds=rounds)
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        jax.block_until_ready(work())
        best = min(best, time.perf_counter() - begin)
    return best


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="a tiny shape: does it run at all; no limits")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    sizes = (
        (2, 64, 32, 512) if options.smoke else (options.rows, options.length, options.hidden, options.vocab)
    )
    rows, length, hidden, vocab = sizes
    inputs = make_inputs(*sizes, jnp.dtype(options.dtype))
    width = length // 4 if options.smoke else tile_length(rows, length, vocab)
    forms = {"tiled": partial(tiled, width), "materialised": materialised}
    values, taken, bytes_ = {}, {}, {}
    for name, form in forms.items():
        compiled = jax.jit(jax.value_and_grad(form, (0, 1))).lower(*inputs).compile()
        values[name] = compiled(*inputs)
        taken[name] = seconds(
            lambda compiled=compiled: compiled(*inputs), 1 if options.smoke else options.rounds
        )
        bytes_[name] = compiled.memory_analysis().temp_size_in_bytes
    tolerance = 1e-4 if options.dtype == "float32" else 5e-2
    for got, expected in zip(*map(jax.tree.leaves, values.values()), strict=True):
        got, expected = (np.asarray(x, np.float32) for x in (got, expected))
        np.testing.assert_allclose(got, expected, atol=tolerance * float(np.abs(expected).max()))
    formula = head_bytes(rows, length, hidden, vocab, gathered=False)
    row = figure(
        "head: tiled over materialised",
        taken["tiled"] / taken["materialised"],
        "ratio of seconds",
        None if options.smoke else SLOWER,
    )
    bounded = figure(
        "head: temporary bytes and formula",
        max(bytes_["tiled"] / formula, formula / bytes_["tiled"]),
        "ratio",
        None if options.smoke or options.dtype != "float32" else LARGER,
    )
    row |= {
        "shape": dict(zip(("rows", "length", "hidden", "vocab"), sizes, strict=True)),
        "dtype": options.dtype,
        "device": jax.devices()[0].device_kind,
        "seconds": {name: float(f"{value:.4g}") for name, value in taken.items()},
        "temporary_bytes": bytes_ | {"formula": formula},
    }
    print(json.dumps(row), flush=True)
    print(json.dumps(bounded), flush=True)
    return finish([row, bounded], options.out)


if __name__ == "__main__":
    sys.exit(main())
