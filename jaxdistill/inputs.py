"""What a run reads: data, student, tokenizers. Loaded and checked before anything is written or asked."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxdistill.data import PromptStream, read_prompts
from jaxdistill.errors import ConfigError, DataError, TooLongError
from jaxdistill.losses import Objective, Vocabularies, build_objective
from jaxdistill.metrics import check_installed
from jaxdistill.model_folders import hub_name, model_folder
from jaxdistill.parallel import make_mesh, processes
from jaxdistill.parallel.rules import AnyMesh, idle_axes
from jaxdistill.records import Prompt, Rollout
from jaxdistill.run_config import RunConfig, StudentConfig
from jaxdistill.samplers import ReferenceSampler, RolloutConfig, render_prompt
from jaxdistill.scorers import load_scorer
from jaxdistill.students import (
    Decoder,
    DecoderConfig,
    abstract_decoder,
    check_folder,
    choose_attention,
    load_decoder,
    read_config,
    trained_and_frozen,
)
from jaxdistill.students.attention import Attention
from jaxdistill.teachers import Routes
from jaxdistill.text import Tokenizer

logger = logging.getLogger(__name__)


class LeftOut(NamedTuple):
    """A row of `file` that there is no room for, and why, for people."""

    file: Path
    row: Prompt
    detail: str

    def kept(self) -> dict[str, Any]:
        """What quarantine.jsonl keeps of it."""
        about = {"source": self.row.source, "index": self.row.index}
        return {"step": 0, "kind": "too_long", "detail": self.detail, "file": str(self.file), **about}


class Heldout(NamedTuple):
    """The held-out prompts, this process's share of their references, and the rows without room for one of
    the two."""

    prompts: list[Prompt]
    references: list[Rollout]
    left_out: list[LeftOut]


@dataclass(frozen=True)
class Student:
    """The model that learns, on its mesh, with its tokenizer."""

    tokenizer: Tokenizer
    decoder: Decoder
    mesh: Mesh


@dataclass(frozen=True)
class Inputs(Student):
    """What a run reads: the student and the data, loaded and checked; nothing in it has side effects.
    `prompts` goes through `rows`, `left_out` are the others, by `rollout.too_long`; `heldout.references` are
    there if `eval.references` asks for them; `vocabularies` has the teachers' tokenizers in the config's
    order."""

    rows: list[Prompt]
    left_out: list[LeftOut]
    prompts: PromptStream
    heldout: Heldout
    references: ReferenceSampler
    vocabularies: Vocabularies
    objective: Objective


def read_inputs(config: RunConfig, *, shapes_only: bool = False) -> Inputs:
    """Load the data, the student (`shapes_only` as in `read_student`) and the tokenizers, and build the
    objective. Raises `ConfigError` or `DataError`."""
    check_installed(config.run.projects)
    everything = read_prompts(config.data.path)
    if config.data.prompts_per_step % processes.count():
        raise ConfigError(
            f"data.prompts_per_step={config.data.prompts_per_step} is no multiple of the {processes.count()} "
            "processes of this run, which answer as many prompts each; change one of them"
        )
    student = read_student(config, shapes_only=shapes_only)
    heldout = read_heldout(config, student.tokenizer)
    references = ReferenceSampler(student.tokenizer, config.rollout, scored=config.objective.needs_teacher)
    checks: list[Callable[[Prompt], Any]] = []
    if config.origins.most("student") or config.origins.most("teacher"):  # answered from the prompt alone
        checks.append(lambda row: render_prompt(student.tokenizer, row, config.rollout))
    if config.origins.most("reference"):
        checks.append(lambda row: references.rollout(row, step=0))
    rows, left_out = fitting(
        config.data.path, everything, checks, config.rollout, least=config.data.prompts_per_step
    )
    warn_of_overlap(everything, heldout.prompts)
    prompts = PromptStream(rows, config.data, seed=config.run.seed)
    if config.reward is not None:
        scorer = load_scorer(config.reward.scorer)
        if not any([scorer.judges(row) for row in rows]):
            raise ConfigError(
                f"reward.scorer={scorer.name}: no row of {config.data.path} has what it compares with (an "
                "answer, or for reasoning_gym its metadata); add it, or leave reward: out"
            )
    if config.all_teachers:
        sources = [row.source for row in [*everything, *heldout.prompts]]
        Routes(config.all_teachers, config.run.seed).check(sources)
    theirs = tuple(one.load_tokenizer() for one in config.all_teachers)
    vocabularies = Vocabularies(student.tokenizer, theirs)
    return Inputs(
        tokenizer=student.tokenizer,
        decoder=student.decoder,
        mesh=student.mesh,
        rows=rows,
        left_out=left_out,
        prompts=prompts,
        heldout=heldout,
        references=references,
        vocabularies=vocabularies,
        objective=build_objective(config.objective, vocabularies),
    )


def warn_of_overlap(trained: Sequence[Prompt], heldout: Sequence[Prompt]) -> None:
    """Say how many of the held-out prompts are trained on as well."""
    if not heldout or not processes.leads():
        return
    # Of what is trained on there may be much: nothing is kept of it.
    asked = {_chat(row) for row in heldout}
    known = {chat for row in trained if (chat := _chat(row)) in asked}
    if shared := sum(_chat(row) in known for row in heldout):
        logger.warning(
            "%d of the %d held-out prompts are in data.path too: figures on them say nothing about others",
            shared,
            len(heldout),
        )


def _chat(row: Prompt) -> str:
    return json.dumps(row.messages, sort_keys=True)


def read_student(config: RunConfig, *, shapes_only: bool = False) -> Student:
    """Load the student and its tokenizer; with `shapes_only` a decoder of shapes, for which of the weights'
    files only the headers are read and nothing is put on a device (of a model of the hub no weights are
    fetched for it). Raises `ConfigError` where they do not fit each other, or the rows of the run."""
    if config.run.compilation_cache is not None:
        # Before anything is compiled: jax asks for the folder once.
        jax.config.update("jax_compilation_cache_dir", str(config.run.compilation_cache.expanduser()))
    mesh = make_mesh(config.mesh)
    dtype = compute_dtype(config.student)
    lengths = sorted({config.rollout.max_prompt_tokens, *config.buckets})
    folder = model_folder(config.student.path, weights=not shapes_only)
    shape = read_config(folder)
    attention = choose_attention(config.student.attention, shape, lengths, dtype, mesh)
    if shapes_only:
        decoder = student_shapes(config.student, shape, mesh, attention)
        if hub_name(config.student.path) is None:
            check_folder(folder, decoder, mesh)
        elif processes.leads():
            logger.warning(
                "%s: its weights were not fetched from the hub for this; a run fetches them, and finds out "
                "then whether they fit its config",
                config.student.path,
            )
    else:
        decoder = load_decoder(
            folder,
            mesh=mesh,
            compute_dtype=dtype,
            remat=config.student.remat,
            attention=attention,
            lora=config.student.lora,
            seed=config.run.seed,
        )
    check_mesh(decoder, mesh)
    tokenizer = Tokenizer.load(
        str(folder), roles=config.student.roles, chat_template=config.student.chat_template
    )
    if tokenizer.vocab_size > decoder.config.vocab_size:
        raise ConfigError(
            f"student.path={config.student.path}: the tokenizer has {tokenizer.vocab_size} ids, the model "
            f"only {decoder.config.vocab_size}; they do not belong together"
        )
    if config.student.router_aux_coefficient and decoder.config.experts is None:
        raise ConfigError(
            f"student.router_aux_coefficient={config.student.router_aux_coefficient}, but the model in "
            f"student.path={config.student.path} has no experts; leave the coefficient out"
        )
    if config.buckets[-1] > decoder.config.max_length:
        raise ConfigError(
            f"rows of {config.buckets[-1]} tokens, but the student reads at most "
            f"{decoder.config.max_length}; lower rollout.max_prompt_tokens, rollout.max_new_tokens or "
            "shapes.buckets"
        )
    return Student(tokenizer, decoder, mesh)


def check_mesh(decoder: Decoder, mesh: AnyMesh) -> None:
    """Raise `ConfigError` where `mesh.tensor` splits no parameter of `decoder`: all its devices would do the
    same work. Where `mesh.fsdp` splits none, which costs only memory, say so."""
    idle, shape = idle_axes(nnx.state(decoder, nnx.Param), mesh), decoder.config
    widths = (
        f"hidden {shape.hidden_size}, intermediate {shape.intermediate_size}, heads {shape.num_heads}, "
        f"key/value heads {shape.num_kv_heads}, vocabulary {shape.vocab_size}"
    )
    if "tensor" in idle:
        raise ConfigError(
            f"mesh.tensor={mesh.shape['tensor']} divides none of the model's widths ({widths}), so its "
            "devices would all do the same; choose a number that does, or give them to mesh.data"
        )
    if "fsdp" in idle and processes.leads():
        logger.warning(
            "mesh.fsdp=%d divides none of the model's widths (%s): every device keeps all parameters and "
            "moments; a number that does would share them out",
            mesh.shape["fsdp"],
            widths,
        )


def student_shapes(config: StudentConfig, shape: DecoderConfig, mesh: Mesh, attention: Attention) -> Decoder:
    """The decoder that `load_decoder` would make of a model of this `shape`, its parameters as shapes in the
    dtypes they would have: beside adapters, matrices are kept in the compute dtype."""
    dtype = compute_dtype(config)
    decoder = abstract_decoder(
        shape, mesh=mesh, compute_dtype=dtype, remat=config.remat, attention=attention, lora=config.lora
    )
    graphdef, variables = nnx.split(decoder, nnx.Param)
    trained, frozen = trained_and_frozen(nnx.to_pure_dict(variables))

    def kept(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return leaf if path[-1].key.endswith("_norm") else jax.ShapeDtypeStruct(leaf.shape, dtype)

    return nnx.merge(graphdef, trained | jax.tree_util.tree_map_with_path(kept, frozen))


def compute_dtype(config: StudentConfig) -> Any:
    """What the student's products run in: as the config says, or else by the kind of device."""
    if config.compute_dtype != "auto":
        return jnp.dtype(config.compute_dtype)
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def fitting(
    path: Path,
    rows: Sequence[Prompt],
    checks: Sequence[Callable[[Prompt], Any]],
    rollout: RolloutConfig,
    *,
    least: int,
) -> tuple[list[Prompt], list[LeftOut]]:
    """The `rows` of the file at `path` that there is room for, which none of the `checks` raises
    `TooLongError` for, and the others. All of them are rendered for it, before the run: a row that does not
    fit is found now, not after hours.

    Raises `DataError` where there are others and `rollout.too_long` says "stop", `ConfigError` where leaving
    them out leaves fewer than `least`, and what else the checks raise.
    """
    kept, left_out = [], []
    worst: dict[str, TooLongError] = {}  # of each limit, which a setting of its own would raise
    for row in rows:
        found = [error for check in checks if (error := _too_long(check, row)) is not None]
        for error in found:
            worst[error.limit] = max(worst.get(error.limit, error), error, key=lambda one: one.by)
        if found:
            left_out.append(LeftOut(path, row, str(found[0])))
        else:
            kept.append(row)
    if not left_out:
        return kept, left_out
    longest = "; ".join(map(str, worst.values()))
    what = f"{len(left_out)} of {len(rows)} rows are longer than there is room for, the longest: {longest}"
    if rollout.too_long == "stop":
        raise DataError(
            f"{what}; raise that, or leave such rows out by rollout.too_long=drop (truncate: also cut "
            "references where their room ends)"
        )
    what += f"; by rollout.too_long={rollout.too_long} they are left out"
    if len(kept) < least:
        raise ConfigError(
            f"{what}, and {len(kept)} that remain are too few, expected at least {least}; make more room"
        )
    if processes.leads():
        logger.warning(what)
    return kept, left_out


def _too_long(check: Callable[[Prompt], Any], row: Prompt) -> TooLongError | None:
    try:
        check(row)
    except TooLongError as error:
        return error
    return None


def read_heldout(config: RunConfig, tokenizer: Tokenizer) -> Heldout:
    """The held-out prompts, and where `eval.references` asks for them the references of those that have one:
    the last assistant turn, which is what the teacher reads too.

    Raises `ConfigError` where references are asked for and none is there, `DataError` for a row that the
    scorer cannot use, and what `fitting` raises.
    """
    path, rollout = config.eval.path, config.rollout
    if path is None:
        prompts, left_out = [], []
    else:
        prompts, left_out = fitting(
            path,
            read_prompts(path)[: config.eval.prompts],
            [lambda row: render_prompt(tokenizer, row, rollout)],
            rollout,
            least=1,
        )
    scorer = load_scorer(config.eval.scorer)
    judged = sum([scorer.judges(row) for row in prompts])
    wanted = config.eval.scorer != type(config.eval).model_fields["scorer"].default
    if judged < len(prompts) and wanted and processes.leads():
        logger.warning(
            "eval.scorer=%s judges %d of the %d held-out prompts; the others lack what it compares with",
            config.eval.scorer,
            judged,
            len(prompts),
        )
    if not config.eval.references:
        return Heldout(prompts, [], left_out)
    answered = [row for row in prompts if row.response is not None]
    if path is None or not answered:
        raise ConfigError(
            f"eval.references=true, but no row of eval.path={path} has a reference: messages that end with "
            "the assistant's turn, or a 'response'; add them, or set eval.references=false"
        )
    references = ReferenceSampler(tokenizer, rollout, scored=True)
    answered, unmeasured = fitting(
        path, answered, [lambda row: references.rollout(row, step=0)], rollout, least=1
    )
    return Heldout(prompts, references.sample(answered, step=0), left_out + unmeasured)
