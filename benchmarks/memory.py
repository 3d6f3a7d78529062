"""Bytes of a device at real shapes, as the compiler counts them, beside the formula.

`python benchmarks/memory.py [--only NAME]... [--smoke] [--out FILE]`. Whole steps of Qwen3-8B and
Qwen3-30B-A3B and the head alone at two vocabularies are compiled for eight virtual devices from shapes alone;
nothing is placed or run. Each line says how far `memory_analysis()` and the formula of `shapes.py` are
apart: the larger over the smaller, at most 1.3.

Everything is compiled in float32. XLA's CPU backend has no bfloat16 products: it widens what goes into them,
weights included, and its count of a bfloat16 step is of those copies.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

DEVICES = 8
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"

# How many devices there are is settled as jax starts.
import jax  # noqa: E402
from measure import Report, figure, options  # noqa: E402
from shapes import FLOAT, PUBLISHED, head_bytes, parameter_count, temporary_bytes  # noqa: E402

from jaxdistill.losses.reverse_kl import ReverseKL, ReverseKLConfig  # noqa: E402
from jaxdistill.memory import head_memory, step_memory, target_shapes  # noqa: E402
from jaxdistill.optimizer import OptimizerConfig, make_optimizer  # noqa: E402
from jaxdistill.packing import blank  # noqa: E402
from jaxdistill.parallel import MeshConfig, make_mesh  # noqa: E402
from jaxdistill.students import abstract_decoder, parse_config  # noqa: E402

LIMIT = 1.3
SMALL = {"num_hidden_layers": 3, "vocab_size": 4096}  # of --smoke
OBJECTIVE = ReverseKL(ReverseKLConfig(credit="lookahead"))


def apart(measured: int, formula: int) -> float:
    """The larger over the smaller."""
    return max(measured / formula, formula / measured)


def step_row(name: str, raw: dict[str, Any], mesh_sizes: dict[str, int], length: int) -> dict[str, Any]:
    """The whole step, one row of `length` tokens on each device: everything a device holds."""
    config, mesh = parse_config(raw, where=name), make_mesh(MeshConfig(**mesh_sizes))
    memory = step_memory(
        abstract_decoder(config, mesh=mesh),
        OBJECTIVE,
        make_optimizer(OptimizerConfig(), 10),
        blank(DEVICES, length, {}),
        mesh,
    )
    parts = temporary_bytes(config, 1, length, DEVICES, expert=mesh.shape["expert"])
    parameters = FLOAT * parameter_count(config) // DEVICES
    formula = {"parameters": parameters, "optimizer": 2 * parameters, **parts}
    measured = {
        "parameters": memory.parameters,
        "optimizer": memory.optimizer,
        "batch": memory.batch,
        "temporary": memory.temporary,
        "head_alone": memory.head,
    }
    row = figure(f"{name}: step and formula", apart(memory.total, sum(formula.values())), "ratio", LIMIT)
    shape = {"mesh": mesh_sizes, "rows_of_device": 1, "length": length}
    return row | {"shape": shape, "bytes": measured, "formula": formula}


def head_row(vocab: int, hidden: int, length: int) -> dict[str, Any]:
    """The head alone on one device."""
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    targets = target_shapes(OBJECTIVE, blank(1, length, {}))
    measured = head_memory(OBJECTIVE, targets, (vocab, hidden), jax.numpy.float32, mesh)
    formula = head_bytes(1, length, hidden, vocab, gathered=False)
    row = figure(f"head, V={vocab}: temporary and formula", apart(measured, formula), "ratio", LIMIT)
    shape = {"rows": 1, "length": length, "hidden": hidden}
    return row | {"shape": shape, "bytes": measured, "formula": formula}


def main(argv: Sequence[str] | None = None) -> int:
    parser = options(__doc__)
    parser.add_argument("--only", action="append", help="part of a name; may be given several times")
    arguments = parser.parse_args(argv)
    small, length = (SMALL, 256) if arguments.smoke else ({}, 3072)
    work = {
        "head 151936": lambda: head_row(151_936, 4096, length),
        "head 262144": lambda: head_row(262_144, 4096, length),
        "Qwen3-8B": lambda: step_row("Qwen3-8B", PUBLISHED["Qwen3-8B"] | small, {"fsdp": DEVICES}, length),
        "Qwen3-30B-A3B": lambda: step_row(
            "Qwen3-30B-A3B", PUBLISHED["Qwen3-30B-A3B"] | small, {"fsdp": 1, "expert": DEVICES}, length
        ),
    }
    report = Report("memory", arguments)
    for name, measure in work.items():
        if arguments.only is None or any(part in name for part in arguments.only):
            report.add(measure())
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
