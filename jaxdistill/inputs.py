"""What a run reads: data, student, tokenizers. Loaded and checked before anything is written or asked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxdistill.data import PromptStream, read_prompts
from jaxdistill.errors import ConfigError
from jaxdistill.losses import Objective, Vocabularies, build_objective
from jaxdistill.parallel import make_mesh, processes
from jaxdistill.parallel.rules import AnyMesh
from jaxdistill.records import Prompt, Rollout
from jaxdistill.run_config import RunConfig, StudentConfig
from jaxdistill.samplers import ReferenceSampler, render_prompt
from jaxdistill.scorers import load_scorer
from jaxdistill.students import (
    Decoder,
    DecoderConfig,
    abstract_decoder,
    choose_attention,
    load_decoder,
    read_config,
    trained_and_frozen,
)
from jaxdistill.students.attention import Attention
from jaxdistill.students.checkpoint import layer_tensors
from jaxdistill.students.tensor_files import TensorFiles
from jaxdistill.students.weights import _check_experts, _Reader
from jaxdistill.teachers import Routes
from jaxdistill.text import Tokenizer


@dataclass(frozen=True)
class Student:
    """The model that learns, on its mesh, with its tokenizer."""

    tokenizer: Tokenizer
    decoder: Decoder
    mesh: Mesh


@dataclass(frozen=True)
class Inputs(Student):
    """What a run reads: the student and the data, loaded and checked; nothing in it has side effects.
    `heldout_references` are this process's share of the held-out rows' reference responses, if
    `eval.references` asks for them; `vocabularies` has the teachers' tokenizers in the config's order."""

    prompts: PromptStream
    heldout: list[Prompt]
    heldout_references: list[Rollout]
    references: ReferenceSampler
    vocabularies: Vocabularies
    objective: Objective


def read_inputs(config: RunConfig, *, shapes_only: bool = False) -> Inputs:
    """Load the data, the student (`shapes_only` as in `read_student`) and the tokenizers, and build the
    objective. Raises `ConfigError` or `DataError`."""
    rows = read_prompts(config.data.path)
    if config.data.prompts_per_step % processes.count():
        raise ConfigError(
            f"data.prompts_per_step={config.data.prompts_per_step} is no multiple of the {processes.count()} "
            "processes of this run, which answer as many prompts each; change one of them"
        )
    prompts = PromptStream(rows, config.data, seed=config.run.seed)
    student = read_student(config, shapes_only=shapes_only)
    heldout, heldout_references = read_heldout(config, student.tokenizer)
    # Every row is rendered once now: a row that does not fit is found here, not hours into the run.
    references = ReferenceSampler(student.tokenizer, config.rollout, scored=config.objective.needs_teacher)
    if config.origins.most("student") or config.origins.most("teacher"):  # answered from the prompt alone
        for row in rows:
            render_prompt(student.tokenizer, row, config.rollout)
    if config.origins.most("reference"):
        references.sample(rows, step=0)
    if config.reward is not None:
        scorer = load_scorer(config.reward.scorer)
        if not any([scorer.judges(row) for row in rows]):
            raise ConfigError(
                f"reward.scorer={scorer.name}: no row of {config.data.path} has what it compares with (an "
                "answer, or for reasoning_gym its metadata); add it, or leave reward: out"
            )
    if config.all_teachers:
        Routes(config.all_teachers, config.run.seed).check(row.source for row in [*rows, *heldout])
    theirs = tuple(one.load_tokenizer() for one in config.all_teachers)
    vocabularies = Vocabularies(student.tokenizer, theirs)
    return Inputs(
        tokenizer=student.tokenizer,
        decoder=student.decoder,
        mesh=student.mesh,
        prompts=prompts,
        heldout=heldout,
        heldout_references=heldout_references,
        references=references,
        vocabularies=vocabularies,
        objective=build_objective(config.objective, vocabularies),
    )


def read_student(config: RunConfig, *, shapes_only: bool = False) -> Student:
    """Load the student and its tokenizer; with `shapes_only` a decoder of shapes, for which of the weights'
    files only the headers are read and nothing is put on a device. Raises `ConfigError` where they do not fit
    each other, or the rows of the run."""
    if config.run.compilation_cache is not None:
        # Before anything is compiled: jax asks for the folder once.
        jax.config.update("jax_compilation_cache_dir", str(config.run.compilation_cache.expanduser()))
    mesh = make_mesh(config.mesh)
    dtype = compute_dtype(config.student)
    lengths = sorted({config.rollout.max_prompt_tokens, *config.buckets})
    shape = read_config(Path(config.student.path))
    attention = choose_attention(config.student.attention, shape, lengths, dtype, mesh)
    if shapes_only:
        decoder = student_shapes(config.student, shape, mesh, attention)
        check_folder(Path(config.student.path), decoder, mesh)
    else:
        decoder = load_decoder(
            config.student.path,
            mesh=mesh,
            compute_dtype=dtype,
            remat=config.student.remat,
            attention=attention,
            lora=config.student.lora,
            seed=config.run.seed,
        )
    tokenizer = Tokenizer.load(
        config.student.path, roles=config.student.roles, chat_template=config.student.chat_template
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


def check_folder(folder: Path, decoder: Decoder, mesh: AnyMesh) -> None:
    """Raise the `ConfigError` with which `load_decoder` would refuse the model in `folder` for this `decoder`
    of shapes: by the headers of its files alone, which say every tensor's name and shape."""
    if mesh.shape["expert"] > 1:
        _check_experts(decoder.config, mesh.shape["expert"], folder)
    shapes = nnx.to_pure_dict(nnx.state(decoder, nnx.Param))
    _Reader(TensorFiles(folder), layer_tensors(decoder.config), decoder.config.num_layers, shapes)


def compute_dtype(config: StudentConfig) -> Any:
    """What the student's products run in: as the config says, or else by the kind of device."""
    if config.compute_dtype != "auto":
        return jnp.dtype(config.compute_dtype)
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def read_heldout(config: RunConfig, tokenizer: Tokenizer) -> tuple[list[Prompt], list[Rollout]]:
    """The held-out prompts, and where `eval.references` asks for them the references of those that have one:
    the last assistant turn, which is what the teacher reads too.

    Raises `ConfigError` where references are asked for and none is there, `DataError` for a row that does not
    fit or that the scorer cannot use.
    """
    path = config.eval.path
    prompts = [] if path is None else read_prompts(path)[: config.eval.prompts]
    scorer = load_scorer(config.eval.scorer)
    for row in prompts:
        render_prompt(tokenizer, row, config.rollout)
        scorer.judges(row)
    if not config.eval.references:
        return prompts, []
    answered = [row for row in prompts if row.response is not None]
    if not answered:
        raise ConfigError(
            f"eval.references=true, but no row of eval.path={path} has a reference: messages that end with "
            "the assistant's turn, or a 'response'; add them, or set eval.references=false"
        )
    return prompts, ReferenceSampler(tokenizer, config.rollout, scored=True).sample(answered, step=0)
