"""`RunConfig` -> `Run`: the only place that builds things.

Everything that can be wrong with a config is found before the run folder is touched: data, tokenizers,
weights, mesh, and a teacher that answers. Only then is anything written.
"""

import json
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxdistill.checkpoint import Checkpoints
from jaxdistill.collect import Collector
from jaxdistill.config import dump
from jaxdistill.data import PromptStream, read_prompts
from jaxdistill.errors import ConfigError
from jaxdistill.evaluate import Evaluator
from jaxdistill.loop import Run
from jaxdistill.losses import OBJECTIVES, Objective
from jaxdistill.metrics import CompileCounter, MetricsLog, SampleLog, Stopwatch, write_atomically
from jaxdistill.optimizer import learning_rate, make_optimizer
from jaxdistill.parallel import make_mesh
from jaxdistill.records import Prompt
from jaxdistill.run_config import RunConfig
from jaxdistill.run_folder import open_run_folder
from jaxdistill.samplers import LocalSampler, ReferenceSampler, render_prompt
from jaxdistill.step import initial_state, make_train_step
from jaxdistill.students import Decoder, load_decoder, read_config
from jaxdistill.teachers import Teacher, TeacherConfig
from jaxdistill.teachers import build as build_teacher
from jaxdistill.text import Tokenizer


@dataclass(frozen=True)
class Inputs:
    """What a run reads, loaded and checked; nothing in it has side effects."""

    tokenizer: Tokenizer
    decoder: Decoder
    mesh: Mesh
    prompts: PromptStream
    heldout: list[Prompt]
    references: ReferenceSampler


def read_inputs(config: RunConfig) -> Inputs:
    """Load the data, the student and its tokenizer. Raises `ConfigError` or `DataError`."""
    rows = read_prompts(config.data.path)
    prompts = PromptStream(rows, config.data, seed=config.run.seed)
    heldout = [] if config.eval.path is None else read_prompts(config.eval.path)[: config.eval.prompts]
    mesh = make_mesh(config.mesh)
    compute_dtype = jax.numpy.float32 if jax.default_backend() == "cpu" else jax.numpy.bfloat16
    decoder = load_decoder(config.student.path, mesh=mesh, compute_dtype=compute_dtype)
    tokenizer = Tokenizer.load(config.student.path, roles=config.student.roles)
    if tokenizer.vocab_size > decoder.config.vocab_size:
        raise ConfigError(
            f"student.path={config.student.path}: the tokenizer has {tokenizer.vocab_size} ids, the model "
            f"only {decoder.config.vocab_size}; they do not belong together"
        )
    if config.buckets[-1] > decoder.config.max_length:
        raise ConfigError(
            f"rows of {config.buckets[-1]} tokens, but the student reads at most "
            f"{decoder.config.max_length}; lower rollout.max_prompt_tokens, rollout.max_new_tokens or "
            "shapes.buckets"
        )
    # Every row is rendered once now: a row that does not fit is found here, not hours into the run.
    references = ReferenceSampler(tokenizer, config.rollout)
    for row in [*rows, *heldout] if config.objective.on_policy else heldout:
        render_prompt(tokenizer, row, config.rollout)
    if not config.objective.on_policy:
        references.sample(rows, version=0)
    return Inputs(tokenizer, decoder, mesh, prompts, heldout, references)


@contextmanager
def assemble(config: RunConfig) -> Iterator[Run]:
    """Build the run; on exit its teacher, files and background saves are closed, whatever happened."""
    inputs = read_inputs(config)
    with ExitStack() as stack:
        teacher: Teacher | None = None
        if config.teacher is not None:
            teacher = build_teacher(config.teacher)
            stack.callback(teacher.close)
        compiles = CompileCounter()
        stack.callback(compiles.close)
        stopwatch = Stopwatch(lambda: compiles.programs)
        objective = OBJECTIVES[config.objective.kind](
            config.objective, same_vocabulary=teacher is not None and _same_vocabulary(inputs, teacher)
        )
        folder = stack.enter_context(open_run_folder(config.run.dir, dump(config), config.run.steps))
        facts = json.dumps(manifest(config, inputs, teacher, objective), indent=2)
        write_atomically(folder / "manifest.json", facts.encode() + b"\n")
        schedule = learning_rate(config.optimizer, config.run.steps)
        optimizer = make_optimizer(config.optimizer, config.run.steps)
        rows = config.data.prompts_per_step * config.rollout.samples_per_prompt
        graphdef = nnx.split(inputs.decoder, nnx.Param)[0]
        state = initial_state(inputs.decoder, optimizer, inputs.mesh)
        policy = LocalSampler(graphdef, inputs.tokenizer, config.rollout, inputs.mesh, seed=config.run.seed)
        scorer = teacher if config.objective.needs_teacher else None
        sampler = policy if config.objective.on_policy else inputs.references
        checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint)
        stack.callback(checkpoints.close)
        metrics = stack.enter_context(
            MetricsLog(
                folder, tensorboard=config.run.tensorboard, total_steps=config.run.steps, progress=True
            )
        )
        yield Run(
            dir=folder,
            steps=config.run.steps,
            initial=state,
            train_step=make_train_step(graphdef, objective, optimizer, state, inputs.mesh),
            learning_rate=lambda step: float(np.asarray(schedule(step))),
            prompts=inputs.prompts,
            policy=policy,
            collect=Collector(
                sampler, scorer, config.objective.signal, config.buckets, inputs.mesh, stopwatch
            ),
            evaluator=Evaluator(config.eval, inputs.heldout, teacher, config.run.steps, rows),
            checkpoints=checkpoints,
            metrics=metrics,
            samples=SampleLog(folder),
            example_every=None if inputs.heldout else config.eval.every,
            stopwatch=stopwatch,
        )


def _same_vocabulary(inputs: Inputs, teacher: Teacher) -> bool:
    return teacher.tokenizer.vocab_fingerprint == inputs.tokenizer.vocab_fingerprint


def manifest(
    config: RunConfig, inputs: Inputs, teacher: Teacher | None, objective: Objective
) -> dict[str, Any]:
    """What a reader needs to know to run this again: versions, fingerprints, hardware, and the objective
    as it is in force (equal vocabularies change its credit)."""
    packages = (
        "jaxdistill",
        "jax",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "transformers",
        "tokenizers",
    )
    devices = jax.devices()
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "devices": {"kind": devices[0].device_kind, "platform": devices[0].platform, "count": len(devices)},
        "mesh": dict(inputs.mesh.shape),
        "student": {
            "path": config.student.path,
            "tokenizer": inputs.tokenizer.fingerprint,
            "parameters": count_parameters(inputs.decoder),
        },
        "teacher": None
        if teacher is None
        else {"name": teacher.name, "tokenizer": teacher.tokenizer.fingerprint},
        "objective": objective.describe(),
        "data": {
            "fingerprint": inputs.prompts.fingerprint,
            "prompts": inputs.prompts.rows,
            "heldout": len(inputs.heldout),
        },
    }


def count_parameters(decoder: Decoder) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(decoder, nnx.Param)))


def plan(config: RunConfig) -> str:
    """What `--dry-run` prints: everything is read and checked, nothing is written, started or asked."""
    inputs = read_inputs(config)
    rows = config.data.prompts_per_step * config.rollout.samples_per_prompt
    return "\n".join(
        [
            dump(config).rstrip(),
            "---",
            f"student: {count_parameters(inputs.decoder):,} parameters, {inputs.tokenizer.vocab_size} token "
            f"ids, end of turn {inputs.tokenizer.roles['end_of_turn']}",
            "teacher: none" if config.teacher is None else teacher_plan(config.teacher),
            f"data: {inputs.prompts.rows} prompts, {len(inputs.heldout)} held out",
            f"batch: {rows} rows, lengths {list(config.buckets)}",
            f"mesh: {dict(inputs.mesh.shape)} on {jax.devices()[0].device_kind}",
            f"run: {config.run.steps} steps into {config.run.dir} (dry run: nothing was written)",
        ]
    )


def teacher_plan(config: TeacherConfig) -> str:
    """One line on the configured teacher, after reading the files it needs here."""
    ids = config.load_tokenizer().vocab_size
    if config.model is None:
        return f"teacher: {config.kind} at {', '.join(config.endpoints)} (not asked), {ids} token ids"
    shape = read_config(Path(config.model))
    return f"teacher: {config.kind} {config.model}, {shape.num_layers} layers, {ids} token ids"
