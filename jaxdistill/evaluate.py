"""`python -m jaxdistill.evaluate --run DIR [--step N]` or `--config FILE [--model DIR]`: the held-out figures
of a checkpoint, or of a model folder."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxdistill.cli import CommandParser, exit_code_of, overrides
from jaxdistill.config import load
from jaxdistill.errors import ConfigError
from jaxdistill.records import Prompt
from jaxdistill.teachers import ReplayConfig, Routes, Teachers, build_all

if TYPE_CHECKING:
    from jaxdistill.run_config import RunConfig


def parser() -> CommandParser:
    """What the command takes."""
    parser = CommandParser("evaluate", "Evaluate a student on the held-out prompts of its config.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--run", type=Path, metavar="DIR", help="a run folder: its config, and one of its checkpoints"
    )
    what.add_argument("--config", type=Path, metavar="FILE", help="a YAML file, see configs/")
    parser.add_argument(
        "--step", type=int, metavar="N", help="which checkpoint of --run (default: the newest)"
    )
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="a model folder in place of the student of --config"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    overrides(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, evaluate, print; the exit code (see `cli.exit_code_of`)."""
    options = parser()
    arguments = options.read(argv)
    if arguments.step is not None and arguments.run is None:
        options.error("--step names a checkpoint of --run")
    if arguments.model is not None and arguments.config is None:
        options.error("--model goes with --config; --run has its own checkpoints")

    def body() -> None:
        given = list(arguments.overrides)
        if arguments.model is not None:
            given.append(f"student.path={json.dumps(str(arguments.model))}")
        result = evaluate(arguments.run, arguments.step, arguments.config, given)
        print(table(result))
        if arguments.json is not None:
            write(arguments.json, result)

    return exit_code_of(body, arguments)


def evaluate(
    run: Path | None, step: int | None, config_file: Path | None, overrides: Sequence[str]
) -> dict[str, Any]:
    """The figures of checkpoint `step` (default: the newest) of `run`, or of the student of `config_file`:
    `student`, `step`, `prompts`, and `metrics` by the names they have under `eval/` during a run (null where
    nothing was weighed).

    The samples are those the run itself drew at that step, so that with the same config the figures are too.
    Nothing is written into the run folder. Raises `ConfigError` for no run, no checkpoint, no held-out
    prompts, and what loading and asking the teachers raise.
    """
    # Imported here, not above: jax takes seconds to import, and `--help` needs none of it.
    from flax import nnx

    from jaxdistill.assemble import build_evaluator
    from jaxdistill.checkpoint import restore_params
    from jaxdistill.inputs import read_heldout, read_student
    from jaxdistill.manifest import check_base
    from jaxdistill.run_config import RunConfig
    from jaxdistill.run_folder import config_of
    from jaxdistill.samplers import LocalSampler
    from jaxdistill.students import trained_and_frozen

    file = config_file if run is None else config_of(run)
    assert file is not None  # one of the two is given
    config = load(file, overrides, RunConfig)
    if run is not None and config.student.lora != load(file, (), RunConfig).student.lora:
        raise ConfigError(
            f"student.lora is part of the checkpoints of {run} and cannot be another here; leave it out"
        )
    student = read_student(config)
    heldout, references, _ = read_heldout(config, student.tokenizer)
    if not heldout:
        raise ConfigError(f"{file}: no held-out prompts; name a file with eval.path=...")
    graphdef, variables = nnx.split(student.decoder, nnx.Param)
    params, at = nnx.to_pure_dict(variables), 0
    if run is not None:
        check_base(run, config)
        trained, frozen = trained_and_frozen(params)
        at, trained = restore_params(run, step, like(trained))
        params = frozen | trained
    sampler = LocalSampler(graphdef, student.tokenizer, config.rollout, student.mesh, seed=config.run.seed)
    sampler.push(params, version=at)
    with ExitStack() as stack:
        teachers = build_teachers(config, heldout)
        if teachers is not None:
            stack.callback(teachers.close)
        evaluator = build_evaluator(config, student, graphdef, heldout, references, teachers)
        evaluation = evaluator(sampler, params, at)
        if teachers is not None and evaluation.scored is not None:
            teachers.check_share(evaluation.scored.scores)
    values = {name: mean.value for name, mean in evaluation.metrics.items()}
    return {
        "student": config.student.path if run is None else str(run),
        "step": at,
        "prompts": len(heldout),
        "metrics": {name: value if math.isfinite(value) else None for name, value in values.items()},
    }


def like(params: Any) -> Any:
    """Shapes, dtypes and places of `params`, for a checkpoint to be restored into."""
    import jax  # as in `evaluate`

    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), params
    )


def build_teachers(config: "RunConfig", heldout: Sequence[Prompt]) -> Teachers | None:
    """The teachers of a config, None without any; a recording gets nothing of what they are asked here."""
    if not config.all_teachers:
        return None
    settings = [
        one if isinstance(one, ReplayConfig) else one.model_copy(update={"record": None})
        for one in config.all_teachers
    ]
    # A teacher for sources that are only trained on is no mistake here.
    named = [source for one in settings for source in one.sources]
    Routes(settings, config.run.seed).check([*named, *(row.source for row in heldout)])
    return build_all(settings, [one.load_tokenizer() for one in settings], seed=config.run.seed)


def table(result: Mapping[str, Any]) -> str:
    """The figures as text, one a line."""
    width = max(map(len, result["metrics"]), default=0)
    figures = [
        f"  {name:<{width}}  {'nothing to measure' if value is None else f'{value:.4f}'}"
        for name, value in result["metrics"].items()
    ]
    head = f"{result['student']}, step {result['step']}, {result['prompts']} held-out prompts"
    return "\n".join([head, *figures])


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write the figures as JSON. Raises `ConfigError` where the file cannot be written."""
    from jaxdistill.metrics import write_atomically  # as in `evaluate`

    try:
        write_atomically(path, json.dumps(result, indent=2).encode() + b"\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another --json") from error


if __name__ == "__main__":
    sys.exit(main())
