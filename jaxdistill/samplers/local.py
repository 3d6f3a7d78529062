"""Sampling in process, with the weights the trainer holds.

Letters: P prompts.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from jaxdistill.errors import StaleRolloutError
from jaxdistill.parallel.rules import padded_rows, rows_sharding
from jaxdistill.records import Prompt, Rollout
from jaxdistill.samplers.base import RolloutConfig, render_prompt
from jaxdistill.samplers.decoding import Generated, Generator
from jaxdistill.samplers.filters import sampling_params
from jaxdistill.samplers.stops import StopStrings
from jaxdistill.students.decoder import Decoder
from jaxdistill.text import Tokenizer


class LocalSampler:
    """Samples with the last pushed parameters, which are not copied by a push.

    A response's randomness is (seed, policy version, prompt index, sample number): it does not depend
    on the batch, and a resumed run draws what the uninterrupted one would have drawn.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef[Decoder],
        tokenizer: Tokenizer,
        config: RolloutConfig,
        mesh: Mesh,
        *,
        seed: int,
    ):
        self.tokenizer = tokenizer
        self.config = config
        self.mesh = mesh
        self.seed = seed
        self._sampling = sampling_params(
            config.temperature, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p
        )
        self._params: Any = None
        self._version = -1
        self._generator = Generator(
            graphdef,
            mesh=mesh,
            kv_dtype=None if config.kv_dtype is None else jnp.dtype(config.kv_dtype),
            ahead=True,
        )
        self._keys = jax.jit(_row_keys, static_argnames="samples", out_shardings=rows_sharding(mesh))

    def push(self, params: Any, version: int) -> None:
        self._params, self._version = params, version

    def sample(
        self,
        prompts: Sequence[Prompt],
        version: int,
        *,
        samples: int | None = None,
    ) -> list[Rollout]:
        """Respond to each prompt `samples` times (default: the config's), with weights `version`.

        Raises `StaleRolloutError` if those are not the weights that were pushed last.
        """
        if version != self._version:
            raise StaleRolloutError(
                f"asked for samples of policy version {version}, but version {self._version} was pushed last"
            )
        samples = self.config.samples_per_prompt if samples is None else samples
        prompt_ids = [render_prompt(self.tokenizer, prompt, self.config) for prompt in prompts]
        rows = padded_rows(len(prompts), self.mesh)
        tokens = np.zeros((rows, self.config.max_prompt_tokens), np.int32)
        lengths = np.ones(rows, np.int32)  # padding rows read one token
        seeds = np.zeros((rows, 3), np.uint32)
        seen: Counter[int] = Counter()  # a prompt that comes twice in one call draws other samples
        for row, (prompt, ids) in enumerate(zip(prompts, prompt_ids, strict=True)):
            tokens[row, : len(ids)], lengths[row] = ids, len(ids)
            seeds[row] = self.seed + seen[prompt.index], version, prompt.index
            seen[prompt.index] += 1
        limits = np.zeros(rows, np.int32)
        limits[: len(prompts)] = self.config.max_new_tokens
        out = self._generator(
            self._params,
            tokens,
            lengths,
            limits,
            self._keys(seeds, samples=samples),
            self._sampling,
            samples=samples,
            max_new_tokens=self.config.max_new_tokens,
            stop_ids=tuple(sorted(self.tokenizer.stop_ids)),
            ended=StopStrings(self.config.stop, self.tokenizer) if self.config.stop else None,
        )
        return [
            self._rollout(prompt, ids, out, row * samples + sample, version)
            for row, (prompt, ids) in enumerate(zip(prompts, prompt_ids, strict=True))
            for sample in range(samples)
        ]

    def _rollout(
        self, prompt: Prompt, prompt_ids: np.ndarray, out: Generated, row: int, version: int
    ) -> Rollout:
        length = int(out.lengths[row])
        return Rollout(
            prompt=prompt,
            prompt_ids=prompt_ids,
            response=self.tokenizer.spans(out.tokens[row, :length]),
            logprobs=out.logprobs[row, :length],
            model_logprobs=out.model_logprobs[row, :length],
            finished=bool(out.stopped[row]),
            policy_version=version,
            vocabulary=self.tokenizer.vocab_fingerprint,
        )


def _row_keys(seeds: Any, samples: int) -> Any:
    """[P, 3] (seed, version, prompt index) -> one key per row, [P * samples]."""

    def key(triple: Array, sample: Array) -> Array:
        base = jax.random.key(triple[0])
        for number in (triple[1], triple[2], sample):
            base = jax.random.fold_in(base, number)
        return base

    numbers = jnp.arange(samples, dtype=jnp.uint32)
    return jax.vmap(lambda triple: jax.vmap(lambda n: key(triple, n))(numbers))(seeds).reshape(-1)
