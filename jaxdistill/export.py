"""`python -m jaxdistill.export --run DIR [--step N] [--dtype bfloat16] --out DIR`: a checkpoint as a Hugging
Face folder."""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from flax import nnx

from jaxdistill.checkpoint import restore_params
from jaxdistill.cli import exit_code_of
from jaxdistill.config import load
from jaxdistill.errors import ConfigError
from jaxdistill.run_config import RunConfig
from jaxdistill.students import Decoder, StoredDtype, read_config, save_decoder

PROVENANCE = "jaxdistill.json"  # in every export: which run and step it is, and that it may be replaced


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, export; the exit code (see `cli.exit_code_of`)."""
    parser = argparse.ArgumentParser(prog="jaxdistill export", description="Export a run's student.")
    parser.add_argument("--run", type=Path, required=True, help="the run folder")
    parser.add_argument("--step", type=int, default=None, help="which checkpoint (default: the newest)")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--dtype",
        choices=get_args(StoredDtype),
        default="float32",
        help="of the weights (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)

    def body() -> None:
        step = export(arguments.run, arguments.step, arguments.out, dtype=arguments.dtype)
        print(f"step {step} of {arguments.run} -> {arguments.out}")

    return exit_code_of(body)


def export(run: Path, step: int | None, out: Path, *, dtype: StoredDtype = "float32") -> int:
    """Write checkpoint `step` (default: the newest) of `run` to `out`, weights in `dtype`; returns the step.

    An earlier export at `out` is replaced once the new one is whole. Raises `ConfigError` if `run` is no
    run folder, has no such checkpoint or chat template, or `out` is anything but an export, `CheckpointError`
    if the checkpoint cannot be read.
    """
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run} is no run folder: it has no config.yaml")
    if out.exists() and not (out / PROVENANCE).is_file():
        raise ConfigError(f"{out} exists and is no export (no {PROVENANCE}); choose another --out")
    config = load(run / "config.yaml", [], RunConfig)
    template = _template(config)
    source = Path(config.student.path)
    shape = read_config(source)
    blank = nnx.eval_shape(lambda: Decoder(shape, rngs=nnx.Rngs(0)))
    graphdef, variables = nnx.split(blank, nnx.Param)
    chosen, params = restore_params(run / "checkpoints", step, nnx.to_pure_dict(variables))
    fresh, old = (out.with_name(f".{out.name}.{word}") for word in ("new", "old"))
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    save_decoder(nnx.merge(graphdef, params), fresh, source=source, dtype=dtype)
    if template is not None:  # what it learned to read is part of the model
        (fresh / "chat_template.jinja").write_bytes(template)
    (fresh / PROVENANCE).write_text(json.dumps({"run": str(run), "step": chosen}, indent=2) + "\n")
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    return chosen


def _template(config: RunConfig) -> bytes | None:
    """The chat template the run put in the place of the student's own."""
    path = config.student.chat_template
    try:
        return None if path is None else path.expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(
            f"student.chat_template={path}: cannot be read ({error.strerror}); the run was made with it, put "
            "it back, or call this where the run was started"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
