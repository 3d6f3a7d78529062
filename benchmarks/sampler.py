"""Sampling: CPU seconds beside transformers' generate, and what the memory's bandwidth would allow.

`python benchmarks/sampler.py [--torch-python PATH] [--smoke] [--out FILE]`

A model of SmolLM2-135M's shape (--config: another) with random weights answers 16 prompts of 128 tokens with
128 tokens each, at temperature 1, in float32; no response ends early. With --torch-python, a Python that has
torch and transformers, both take turns and CPU seconds are the least of the rounds: transformers' over ours
must be at least 1. Ours also give the log-probability of every token.

On an accelerator CPU seconds say nothing: --bandwidth BYTES_PER_SECOND gives the wall time of decoding over
the time it takes to read weights and cache once a step. --smoke runs a tiny shape, to see that the script
works.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from measure import figure, finish
from shapes import SMOLLM2_135M

from jaxdistill.samplers import Generator, sampling_params
from jaxdistill.students import Decoder, parse_config, save_decoder

TINY = SMOLLM2_135M | {"vocab_size": 512, "hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 2}
ROUNDS = 3
LEAST = 1.0

Seconds = dict[str, float]


def ours(decoder: Decoder, arguments: argparse.Namespace) -> Callable[[int], Seconds]:
    """A call that samples so many tokens of each row, its programs compiled; CPU and wall seconds."""
    graphdef, params = nnx.split(decoder)
    kv_dtype = None if arguments.kv_dtype is None else jnp.dtype(arguments.kv_dtype)
    generator = Generator(graphdef, kv_dtype=kv_dtype)
    prompts, length, samples = arguments.prompts, arguments.prompt_tokens, arguments.samples
    ids = np.random.default_rng(0).integers(0, decoder.config.vocab_size, (prompts, length), np.int32)
    keys = jax.random.split(jax.random.key(0), prompts * samples)

    def call(tokens: int) -> Seconds:
        begin, cpu = time.perf_counter(), time.process_time()
        out = generator(
            params,
            ids,
            np.full(prompts, length, np.int32),
            np.full(prompts, tokens, np.int32),
            keys,
            sampling_params(1.0),
            samples=samples,
            max_new_tokens=arguments.new_tokens,
            stop_ids=(),
        )
        assert (out.lengths == tokens).all()
        return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - begin}

    call(arguments.new_tokens)
    return call


def peer(model: Path, arguments: argparse.Namespace, stack: ExitStack) -> Callable[[], Seconds]:
    """A call of transformers' generate in a process of its own."""
    shape = (arguments.prompts * arguments.samples, arguments.prompt_tokens, arguments.new_tokens)
    script = Path(__file__).with_name("sampler_peer.py")
    command = [arguments.torch_python, str(script), str(model), arguments.dtype, *map(str, shape)]
    process = stack.enter_context(
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    )
    assert process.stdin is not None and process.stdout is not None
    stack.callback(process.stdin.close)

    def call() -> Seconds:
        process.stdin.write("\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(command)} ended without an answer; what it said is above")
        return json.loads(line)

    call()
    return call


def bytes_read(decoder: Decoder, arguments: argparse.Namespace) -> float:
    """What decoding must read from the second token on: in each step every matrix once (the output embedding
    among them), and the keys and values of what each row has read so far."""
    c = decoder.config
    weights = jax.eval_shape(lambda: decoder.weights())
    matrices = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
    size = jnp.dtype(arguments.kv_dtype or arguments.dtype).itemsize
    position = 2 * c.num_layers * c.num_kv_heads * c.head_dim * size
    rows, steps = arguments.prompts * arguments.samples, arguments.new_tokens - 1
    positions = steps * arguments.prompt_tokens + steps * (steps + 1) // 2
    return steps * matrices + rows * positions * position


def measurements(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    source = json.loads(arguments.config.read_text()) if arguments.config else SMOLLM2_135M
    config = parse_config(TINY if arguments.smoke else source, "this benchmark")
    decoder = Decoder(config, rngs=nnx.Rngs(0), compute_dtype=jnp.dtype(arguments.dtype))
    rows = arguments.prompts * arguments.samples
    shape = f"{rows} x ({arguments.prompt_tokens}+{arguments.new_tokens}), {arguments.dtype}"
    with ExitStack() as stack:
        theirs = None
        if arguments.torch_python is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            (folder / "source").mkdir()
            written = json.dumps(TINY if arguments.smoke else source)
            (folder / "source" / "config.json").write_text(written)
            save_decoder(decoder, folder / "model", source=folder / "source")
            theirs = peer(folder / "model", arguments, stack)
        call = ours(decoder, arguments)
        own, other, first = [], [], []
        for _ in range(arguments.rounds):
            own.append(call(arguments.new_tokens))
            first.append(call(1))
            if theirs is not None:
                other.append(theirs())
    cpu, wall = (min(one[name] for one in own) for name in ("cpu", "wall"))
    tokens = rows * arguments.new_tokens
    found = [
        {
            **figure("sampler_tokens_per_cpu_second", tokens / cpu, f"sampled tokens, {shape}", None),
            "cpu_seconds": round(cpu, 3),
            "wall_seconds": round(wall, 3),
        }
    ]
    if other:
        least = min(one["cpu"] for one in other)
        found.append(
            {
                **figure(
                    "sampler_over_transformers",
                    least / cpu,
                    f"transformers' CPU seconds over ours, {shape}",
                    None if arguments.smoke else LEAST,
                    least=True,
                ),
                "transformers_cpu_seconds": round(least, 3),
                "transformers_wall_seconds": round(min(one["wall"] for one in other), 3),
            }
        )
    if arguments.bandwidth is not None:
        decoding = wall - min(one["wall"] for one in first)
        bound = bytes_read(decoder, arguments) / arguments.bandwidth
        found.append(
            {
                **figure(
                    "sampler_over_bandwidth_bound",
                    decoding / bound,
                    f"wall seconds of decoding over reading weights and cache once a step, {shape}",
                    None,
                ),
                "decoding_seconds": round(decoding, 4),
                "bound_seconds": round(bound, 4),
                "device": jax.devices()[0].device_kind,
            }
        )
    return [{"benchmark": "sampler", **one} for one in found]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch-python", metavar="PATH", help="a Python with torch and transformers")
    parser.add_argument("--config", type=Path, help="config.json of another model's shape")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=1, help="of each prompt")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--kv-dtype", choices=["float32", "bfloat16", "int8"], help="default: --dtype")
    parser.add_argument("--bandwidth", type=float, help="of the device's memory, bytes a second")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, no limit")
    parser.add_argument("--out", type=Path, help="also write everything to this JSON file")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.prompts, arguments.prompt_tokens, arguments.new_tokens = 2, 8, 8
    rows = measurements(arguments)
    for row in rows:
        print(json.dumps(row), flush=True)
    return finish(rows, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
