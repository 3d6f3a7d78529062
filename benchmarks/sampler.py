"""Sampling: CPU seconds beside transformers' generate; on an accelerator, the share of the bandwidth bound.

`python benchmarks/sampler.py [--torch-python PATH] [--smoke] [--out FILE]`

On a CPU a model of SmolLM2-135M's shape (--config: another) with random weights answers 16 prompts of 128
tokens with 128 tokens each, at temperature 1, in float32; no response ends early. With --torch-python, a
Python that has torch and transformers, both take turns and CPU seconds are the least of the rounds:
transformers' over ours must be at least 1. Ours also give the log-probability of every token.

On an accelerator it is Qwen3-1.7B's shape in bfloat16, 64 prompts of 256 tokens, 8 samples of 256 tokens of
each. What is measured is the time it takes to read weights and cache once a step, by the memory's peak
(devices.py, or --peak-bandwidth), over the wall time of decoding: the whole call less one that stops after
a token.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from devices import peak, platform
from flax import nnx
from measure import Report, Seconds, figure, in_turns, options, peer_process, timed
from shapes import QWEN3_1_7B, SMOLLM2_135M, TINY

from jaxdistill.samplers import Generator, sampling_params
from jaxdistill.students import Decoder, parse_config, save_decoder

FASTER, SHARE = 1.0, 0.5
MODELS = {"cpu": SMOLLM2_135M, "accelerator": QWEN3_1_7B}
SIZES = {
    "cpu": {"prompts": 16, "samples": 1, "prompt_tokens": 128, "new_tokens": 128, "dtype": "float32"},
    "accelerator": {
        "prompts": 64,
        "samples": 8,
        "prompt_tokens": 256,
        "new_tokens": 256,
        "dtype": "bfloat16",
    },
}
SMOKE = {"prompts": 2, "prompt_tokens": 8, "new_tokens": 8, "rounds": 1, "peak_bandwidth": 1e11}


def ours(decoder: Decoder, arguments: argparse.Namespace) -> Callable[[int], Seconds]:
    """A call that samples so many tokens of each row, its programs compiled."""
    graphdef, params = nnx.split(decoder)
    kv_dtype = None if arguments.kv_dtype is None else jnp.dtype(arguments.kv_dtype)
    generator = Generator(graphdef, kv_dtype=kv_dtype)
    prompts, length, samples = arguments.prompts, arguments.prompt_tokens, arguments.samples
    ids = np.random.default_rng(0).integers(0, decoder.config.vocab_size, (prompts, length), np.int32)
    keys = jax.random.split(jax.random.key(0), prompts * samples)

    def sample(tokens: int) -> None:
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

    sample(arguments.new_tokens)
    return lambda tokens: timed(lambda: sample(tokens))


def torch_peer(
    decoder: Decoder, source: dict[str, Any], arguments: argparse.Namespace, stack: ExitStack
) -> Callable[[], Seconds]:
    """A call of transformers' generate in a process of its own."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    (folder / "source").mkdir()
    (folder / "source" / "config.json").write_text(json.dumps(source))
    save_decoder(decoder, folder / "model", source=folder / "source")
    shape = (arguments.prompts * arguments.samples, arguments.prompt_tokens, arguments.new_tokens)
    script = Path(__file__).with_name("sampler_torch.py")
    command = [arguments.torch_python, str(script), str(folder / "model"), arguments.dtype, *map(str, shape)]
    call = peer_process(command, stack)
    call()
    return lambda: Seconds(**call())


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


def measure(arguments: argparse.Namespace, report: Report) -> None:
    source = json.loads(arguments.config.read_text()) if arguments.config else MODELS[platform()]
    source = source | (TINY if arguments.smoke else {})
    decoder = Decoder(
        parse_config(source, "this benchmark"), rngs=nnx.Rngs(0), compute_dtype=jnp.dtype(arguments.dtype)
    )
    bandwidth = None
    if platform() == "accelerator" or arguments.peak_bandwidth is not None:
        bandwidth = peak("bandwidth", arguments.peak_bandwidth)
    with ExitStack() as stack:
        call = ours(decoder, arguments)
        works = {"ours": partial(call, arguments.new_tokens), "first token": partial(call, 1)}
        if arguments.torch_python is not None:
            works["torch"] = torch_peer(decoder, source, arguments, stack)
        taken = in_turns(works, rounds=arguments.rounds)
    cpu, wall = taken["ours"]
    rows = arguments.prompts * arguments.samples
    shape = f"{rows} x ({arguments.prompt_tokens}+{arguments.new_tokens}), {arguments.dtype}"
    tokens = rows * arguments.new_tokens
    report.add(
        figure("sampler_tokens_per_cpu_second", tokens / cpu, f"sampled tokens, {shape}", None)
        | {"cpu_seconds": round(cpu, 3), "wall_seconds": round(wall, 3)}
    )
    if "torch" in taken:
        theirs = taken["torch"]
        unit = f"transformers' CPU seconds over ours, {shape}"
        report.add(
            figure("sampler_over_transformers", theirs.cpu / cpu, unit, FASTER, least=True)
            | {
                "transformers_cpu_seconds": round(theirs.cpu, 3),
                "transformers_wall_seconds": round(theirs.wall, 3),
            }
        )
    if bandwidth is not None:
        decoding = wall - taken["first token"].wall
        bound = bytes_read(decoder, arguments) / bandwidth
        unit = f"seconds of reading weights and cache once a step over those of decoding, {shape}"
        report.add(
            figure("sampler_share_of_bandwidth", bound / decoding, unit, SHARE, least=True)
            | {
                "tokens_per_second": round(tokens / wall),
                "decoding_seconds": round(decoding, 4),
                "bound_seconds": round(bound, 4),
            }
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = options(__doc__)
    parser.set_defaults(**SIZES[platform()])
    parser.add_argument("--torch-python", metavar="PATH", help="a Python with torch and transformers")
    parser.add_argument("--config", type=Path, help="config.json of another model's shape")
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--samples", type=int, help="of each prompt")
    parser.add_argument("--prompt-tokens", type=int)
    parser.add_argument("--new-tokens", type=int)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--kv-dtype", choices=["float32", "bfloat16", "int8"], help="default: --dtype")
    parser.add_argument("--peak-bandwidth", type=float, help="of the accelerator's memory, bytes a second")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        vars(arguments).update(SMOKE)
    if arguments.torch_python is not None and platform() != "cpu":
        parser.error("--torch-python is a peer for CPUs, and jax computes on an accelerator; leave it out")
    report = Report("sampler", arguments)
    measure(arguments, report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
