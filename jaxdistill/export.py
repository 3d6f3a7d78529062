"""`python -m jaxdistill.export --run DIR [--step N] --out DIR`: a checkpoint as a Hugging Face folder."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from flax import nnx

from jaxdistill.checkpoint import restore_params
from jaxdistill.cli import exit_code_of
from jaxdistill.config import load
from jaxdistill.errors import ConfigError
from jaxdistill.run_config import RunConfig
from jaxdistill.students import load_decoder, save_decoder


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, export; the exit code (see `cli.exit_code_of`)."""
    parser = argparse.ArgumentParser(prog="jaxdistill export", description="Export a run's student.")
    parser.add_argument("--run", type=Path, required=True, help="the run folder")
    parser.add_argument("--step", type=int, default=None, help="which checkpoint (default: the newest)")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    arguments = parser.parse_args(argv)

    def body() -> None:
        step = export(arguments.run, arguments.step, arguments.out)
        print(f"step {step} of {arguments.run} -> {arguments.out}")

    return exit_code_of(body)


def export(run: Path, step: int | None, out: Path) -> int:
    """Write checkpoint `step` (default: the newest) of `run` to `out`; returns the step.

    Raises `ConfigError` if `run` is no run folder or `out` exists and is not an export, `CheckpointError`
    if there is no such checkpoint.
    """
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run} is no run folder: it has no config.yaml")
    if out.exists() and not (out / "config.json").is_file():
        raise ConfigError(f"{out} exists and is not an exported model; choose another --out")
    config = load(run / "config.yaml", [], RunConfig)
    decoder = load_decoder(config.student.path)
    graphdef, variables = nnx.split(decoder, nnx.Param)
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        nnx.to_pure_dict(variables),
    )
    chosen, params = restore_params(run / "checkpoints", step, template)
    save_decoder(nnx.merge(graphdef, params), out, source=Path(config.student.path))
    return chosen


if __name__ == "__main__":
    sys.exit(main())
