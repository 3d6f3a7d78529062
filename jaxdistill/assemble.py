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
from jaxdistill.losses.reverse_kl import ReverseKL, ReverseKLConfig
from jaxdistill.metrics import CompileCounter, MetricsLog, SampleLog, Stopwatch
from jaxdistill.optimizer import learning_rate, make_optimizer
from jaxdistill.parallel import make_mesh
from jaxdistill.records import Prompt
from jaxdistill.run_config import RunConfig
from jaxdistill.samplers import LocalSampler, ReferenceSampler, Sampler
from jaxdistill.step import initial_state, make_train_step
from jaxdistill.students import Decoder, load_decoder
from jaxdistill.teachers import Teacher
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


def read_inputs(config: RunConfig) -> Inputs:
    """Load the data, the student and its tokenizer. Raises `ConfigError` or `DataError`."""
    prompts = PromptStream(read_prompts(config.data.path), config.data, seed=config.run.seed)
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
    return Inputs(tokenizer, decoder, mesh, prompts, heldout)


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
        folder = prepare_folder(config, inputs, teacher)
        schedule = learning_rate(config.optimizer, config.run.steps)
        optimizer = make_optimizer(config.optimizer, config.run.steps)
        graphdef = nnx.split(inputs.decoder, nnx.Param)[0]
        state = initial_state(inputs.decoder, optimizer, inputs.mesh)
        objective = make_objective(config, inputs.tokenizer, teacher)
        policy = LocalSampler(graphdef, inputs.tokenizer, config.rollout, inputs.mesh, seed=config.run.seed)
        sampler: Sampler = policy
        if config.objective.kind == "sft":
            sampler = ReferenceSampler(inputs.tokenizer, config.rollout)
        signal = config.objective.signal if isinstance(config.objective, ReverseKLConfig) else "chunk"
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
            train_step=make_train_step(graphdef, objective, optimizer, state),
            learning_rate=lambda step: float(np.asarray(schedule(step))),
            prompts=inputs.prompts,
            policy=policy,
            collect=Collector(sampler, teacher, signal, config.buckets, inputs.mesh, stopwatch),
            evaluator=Evaluator(config.eval, inputs.heldout, teacher, config.run.steps),
            checkpoints=checkpoints,
            metrics=metrics,
            samples=SampleLog(folder),
            stopwatch=stopwatch,
        )


def make_objective(config: RunConfig, tokenizer: Tokenizer, teacher: Teacher | None) -> Objective:
    """The configured objective. With equal vocabularies every chunk is one token and its border is
    nobody's work, so `lookahead` has nothing to correct and is the textbook `broadcast`."""
    objective = config.objective
    if isinstance(objective, ReverseKLConfig):
        same = teacher is not None and teacher.tokenizer.vocab_fingerprint == tokenizer.vocab_fingerprint
        if same and objective.credit == "lookahead":
            objective = objective.model_copy(update={"credit": "broadcast"})
        return ReverseKL(objective)
    return OBJECTIVES[objective.kind](objective)


def prepare_folder(config: RunConfig, inputs: Inputs, teacher: Teacher | None) -> Path:
    """Make the run folder with config.yaml and manifest.json, or check that it is this run's."""
    folder = config.run.dir
    resolved = folder / "config.yaml"
    text = dump(config)
    if resolved.is_file() and _without_length(resolved.read_text()) != _without_length(text):
        raise ConfigError(
            f"run.dir={folder} holds a run with another config (see {resolved}); "
            "use another run.dir, or remove the folder to start anew"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        resolved.write_text(text)
        (folder / "manifest.json").write_text(json.dumps(manifest(config, inputs, teacher), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(
            f"run.dir={folder} cannot be written ({error.strerror}); choose another folder"
        ) from error
    return folder


def manifest(config: RunConfig, inputs: Inputs, teacher: Teacher | None) -> dict[str, Any]:
    """What a reader needs to know to run this again: versions, fingerprints, hardware."""
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
        "data": {
            "fingerprint": inputs.prompts.fingerprint,
            "prompts": inputs.prompts.rows,
            "heldout": len(inputs.heldout),
        },
    }


def count_parameters(decoder: Decoder) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(decoder, nnx.Param)))


def plan(config: RunConfig) -> str:
    """What `--dry-run` prints: everything is read and checked, nothing is written or started."""
    inputs = read_inputs(config)
    rows = config.data.prompts_per_step * config.rollout.samples_per_prompt
    teacher = config.teacher
    return "\n".join(
        [
            dump(config).rstrip(),
            "---",
            f"student: {count_parameters(inputs.decoder):,} parameters, {inputs.tokenizer.vocab_size} token "
            f"ids, end of turn {inputs.tokenizer.roles['end_of_turn']}",
            "teacher: none"
            if teacher is None
            else f"teacher: {teacher.kind} {teacher.model or teacher.endpoint}",
            f"data: {inputs.prompts.rows} prompts, {len(inputs.heldout)} held out",
            f"batch: {rows} rows, lengths {list(config.buckets)}",
            f"mesh: {dict(inputs.mesh.shape)} on {jax.devices()[0].device_kind}",
            f"run: {config.run.steps} steps into {config.run.dir} (dry run: nothing was written)",
        ]
    )


def _without_length(text: str) -> list[str]:
    """A resolved config without `run.steps`: a longer run may go on from a shorter one."""
    return [line for line in text.splitlines() if not line.lstrip().startswith("steps:")]
