"""`python -m jaxdistill.export --run DIR [--step N] [--dtype bfloat16 | --adapters] --out DIR`: a checkpoint
as a Hugging Face folder, or its adapters alone as one of PEFT."""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from jaxdistill.cli import CommandParser, exit_code_of
from jaxdistill.config import dump, load
from jaxdistill.errors import ConfigError
from jaxdistill.model_folders import model_folder, without_revision

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jaxdistill.run_config import RunConfig
    from jaxdistill.students import Decoder, StoredDtype

PROVENANCE = "jaxdistill.json"  # in every export: which run and step it is, and that it may be replaced


def parser() -> CommandParser:
    """What the command takes."""
    parser = CommandParser("export", "Write a run's student as a Hugging Face folder.")
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="the run folder")
    parser.add_argument("--step", type=int, metavar="N", help="which checkpoint (default: the newest)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),  # of StoredDtype
        default="float32",
        help="of the weights",
    )
    parser.add_argument(
        "--adapters",
        action="store_true",
        help="only the adapters of a student.lora run, in PEFT's format and float32, not merged",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, export; the exit code (see `cli.exit_code_of`)."""
    options = parser()
    arguments = options.read(argv)
    if arguments.adapters and arguments.dtype != "float32":
        options.error("--dtype is of whole models; --adapters writes what was trained, in float32")

    def body() -> None:
        step = export(
            arguments.run,
            arguments.step,
            arguments.out,
            dtype=arguments.dtype,
            adapters=arguments.adapters,
        )
        print(f"step {step} of {arguments.run} -> {arguments.out}")

    return exit_code_of(body, arguments)


def export(
    run: Path, step: int | None, out: Path, *, dtype: "StoredDtype" = "float32", adapters: bool = False
) -> int:
    """Write checkpoint `step` (default: the newest) of `run` to `out`, weights in `dtype`; returns the step.
    The adapters of a run that has them are merged into its student's weights, or with `adapters` written
    alone. Beside whole weights stand the tokenizer, the chat template and generation_config.json; beside both
    a model card (`report.model_card`).

    An earlier export at `out` is replaced once the new one is whole. Raises `ConfigError` if `run` is no
    run folder, has no such checkpoint, chat template or adapters, or has adapters to other weights than
    `student.path` has now, or if `out` is that student or anything but an export, `CheckpointError` if the
    checkpoint cannot be read, `DataError` if the manifest or the metrics cannot.
    """
    # Imported here, not above: jax takes seconds to import, and `--help` needs none of it.
    import jax
    from flax import nnx

    from jaxdistill.checkpoint import restore_params
    from jaxdistill.manifest import check_base
    from jaxdistill.parallel import MeshConfig, make_mesh, param_shardings
    from jaxdistill.report import model_card
    from jaxdistill.run_config import RunConfig
    from jaxdistill.run_folder import config_of
    from jaxdistill.students import (
        abstract_decoder,
        read_config,
        save_adapters,
        save_decoder,
        trained_and_frozen,
    )

    resolved = config_of(run)
    if out.exists() and not (out / PROVENANCE).is_file():
        raise ConfigError(f"{out} exists and is no export (no {PROVENANCE}); choose another --out")
    config = load(resolved, [], RunConfig)
    chat_template = _chat_template(config)
    lora, source = config.student.lora, model_folder(config.student.path)
    if adapters and lora is None:
        raise ConfigError(f"{run} has no adapters: it was made without student.lora; leave --adapters out")
    if out.exists() and out.resolve() == source.resolve():
        raise ConfigError(f"--out {out} is the student that {run} began from; choose another folder")
    check_base(run, config)
    # Over all devices that are there: no host holds more than the tensor that is being written.
    mesh = make_mesh(MeshConfig())
    blank = abstract_decoder(read_config(source), lora=lora)
    variables = nnx.state(blank, nnx.Param)
    template, _ = trained_and_frozen(
        jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            nnx.to_pure_dict(variables),
            param_shardings(variables, mesh),
        )
    )
    chosen, trained = restore_params(run, step, template)
    # All that can still be wrong is found before gigabytes are written.
    beside = {
        "README.md": model_card(
            run,
            yaml.safe_load(dump(config)),
            step=chosen,
            name=out.resolve().name,
            place=out,
            dtype=dtype,
            adapters=adapters,
            taught=config.objective.needs_teacher or bool(config.origins.most("teacher")),
        )
    }
    if not adapters:
        beside["generation_config.json"] = json.dumps(generation_config(config, source), indent=2) + "\n"
    fresh, old = (out.with_name(f".{out.name}.{word}") for word in ("new", "old"))
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    if adapters and lora is not None:
        save_adapters(
            trained["adapters"],
            fresh,
            config=blank.config,
            lora=lora,
            base=without_revision(config.student.path),
        )
    else:
        save_decoder(_whole(config, trained, mesh), fresh, source=source, dtype=dtype)
    if chat_template is not None:  # what it learned to read is part of the model
        (fresh / "chat_template.jinja").write_bytes(chat_template)
    for name, text in beside.items():
        (fresh / name).write_text(text)
    (fresh / PROVENANCE).write_text(json.dumps({"run": str(run), "step": chosen}, indent=2) + "\n")
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    return chosen


def generation_config(config: "RunConfig", source: Path) -> dict[str, Any]:
    """generation_config.json of the result: the student's own, or where there is none the run's own sampling.

    In both `eos_token_id` are the ids that ended a response of the run: a base model that learned to end its
    turns would otherwise be served without an end."""
    from jaxdistill.text import Tokenizer  # as in `export`

    tokenizer = Tokenizer.load(
        str(source), roles=config.student.roles, chat_template=config.student.chat_template
    )
    ends = {"eos_token_id": sorted(tokenizer.stop_ids)}
    if (own := source / "generation_config.json").is_file():
        return json.loads(own.read_text()) | ends  # which the tokenizer has read too
    model, rollout = json.loads((source / "config.json").read_text()), config.rollout
    special = {name: model[name] for name in ("bos_token_id", "pad_token_id") if model.get(name) is not None}
    if rollout.temperature == 0:
        return special | ends | {"do_sample": False}
    # Where nothing is said transformers takes the 50 likeliest, and SGLang refuses 0 for all of them.
    top_k = rollout.top_k or tokenizer.vocab_size
    sampling = {"temperature": rollout.temperature, "top_k": top_k, "top_p": rollout.top_p}
    return special | ends | {"do_sample": True, **sampling, "min_p": rollout.min_p}


def _whole(config: "RunConfig", trained: Any, mesh: "Mesh") -> "Decoder":
    """The student on `mesh` as a model of its family: what was trained, merged into the rest where there is
    a rest."""
    from flax import nnx  # as in `export`

    from jaxdistill.students import abstract_decoder, load_decoder, merge, read_config

    source = model_folder(config.student.path)
    if config.student.lora is None:
        return nnx.merge(nnx.split(abstract_decoder(read_config(source)), nnx.Param)[0], trained)
    graphdef, base = nnx.split(load_decoder(source, mesh=mesh), nnx.Param)
    return nnx.merge(graphdef, merge(nnx.to_pure_dict(base) | trained, config.student.lora))


def _chat_template(config: "RunConfig") -> bytes | None:
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
