"""Loading a student: bytes a second from a checkpoint into device memory, beside reading the files alone.

`python benchmarks/load.py [--model DIR] [--smoke] [--out FILE]`

Without --model a model of SmolLM2-135M's shape with random weights is written first, in float32 and in
bfloat16. Both sides find the files in the system's cache, and take turns; CPU seconds are the least of the
rounds. The peer copies every file into memory once, the limit is that loading takes at most `MOST` times as
long: each weight is read, turned (kernels are stored [out, in]) and handed to the device. `peak` is the host
memory loading took beyond the parameters themselves.
"""

import json
import resource
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from measure import Report, figure, in_turns, options, timed
from shapes import SMOLLM2_135M, TINY

from jaxdistill.parallel import MeshConfig, make_mesh
from jaxdistill.students import Decoder, load_decoder, parse_config, save_decoder

ROUNDS = 5
MOST = 4.0


def write_models(folder: Path, raw: dict[str, Any]) -> dict[str, Path]:
    """Model folders of random weights by the dtype they are stored in; `raw` is their config."""
    source = folder / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(raw))
    decoder = Decoder(parse_config(raw, "this benchmark"), rngs=nnx.Rngs(0))
    folders = {"float32": folder / "float32", "bfloat16": folder / "bfloat16"}
    save_decoder(decoder, folders["float32"], source=source)
    save_decoder(decoder, folders["bfloat16"], source=source, dtype="bfloat16")
    return folders


def measure(name: str, model: Path, rounds: int) -> dict[str, Any]:
    """One folder loaded and read in turns."""
    files = sorted(model.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    mesh = make_mesh(MeshConfig())

    def load() -> None:
        jax.block_until_ready(nnx.state(load_decoder(model, mesh=mesh), nnx.Param))

    def read() -> None:
        for file in files:
            np.fromfile(file, np.uint8)

    read()
    before = peak()
    load()
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(load_decoder(model, mesh=mesh))))
    extra = peak() - before - parameters
    taken = in_turns({"load": partial(timed, load), "read": partial(timed, read)}, rounds=rounds)
    ratio = taken["load"].cpu / taken["read"].cpu
    return {
        **figure(f"load_{name}_ratio", ratio, "CPU seconds of loading over those of reading", MOST),
        "file_bytes": size,
        "load_bytes_per_second": round(size / taken["load"].wall),
        "read_bytes_per_second": round(size / taken["read"].wall),
        "load_cpu_seconds": round(taken["load"].cpu, 3),
        "read_cpu_seconds": round(taken["read"].cpu, 3),
        "peak_extra_bytes": max(extra, 0),
    }


def peak() -> int:
    """The most memory this process has held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(argv: Sequence[str] | None = None) -> int:
    parser = options(__doc__)
    parser.add_argument("--model", type=Path, help="a model folder of your own")
    arguments = parser.parse_args(argv)
    report = Report("load", arguments)
    raw = SMOLLM2_135M | (TINY if arguments.smoke else {})
    with tempfile.TemporaryDirectory() as made:
        own = {arguments.model.name: arguments.model} if arguments.model else write_models(Path(made), raw)
        for name, folder in own.items():
            report.add(measure(name, folder, 1 if arguments.smoke else ROUNDS))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
