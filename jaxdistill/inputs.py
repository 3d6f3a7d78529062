"""What a run reads: data, student, tokenizer. Loaded and checked before anything is written or asked."""

from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from jaxdistill.data import PromptStream, read_prompts
from jaxdistill.errors import ConfigError
from jaxdistill.parallel import make_mesh
from jaxdistill.records import Prompt
from jaxdistill.run_config import RunConfig
from jaxdistill.samplers import ReferenceSampler, render_prompt
from jaxdistill.students import Decoder, load_decoder
from jaxdistill.teachers import Routes
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
    references = ReferenceSampler(tokenizer, config.rollout, scored=config.objective.needs_teacher)
    answered = config.origins.most("reference") < 1  # by the student or the teacher, from a rendered prompt
    for row in [*rows, *heldout] if answered else heldout:
        render_prompt(tokenizer, row, config.rollout)
    if config.origins.most("reference"):
        references.sample(rows, version=0)
    if config.all_teachers:
        Routes(config.all_teachers, config.run.seed).check(row.source for row in [*rows, *heldout])
    return Inputs(tokenizer, decoder, mesh, prompts, heldout, references)
