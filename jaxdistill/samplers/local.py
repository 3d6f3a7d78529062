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

from jaxdistill.parallel import place_batch, processes
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

    A response's randomness is (seed, training step, prompt index, sample number): it does not depend
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
            config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            ids=tokenizer.vocab_size,
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

    def take_counts(self) -> dict[str, int]:
        """No server is asked, so nothing happens that is counted."""
        return {}

    def sample(
        self,
        prompts: Sequence[Prompt],
        step: int,
        *,
        samples: int | None = None,
    ) -> list[Rollout]:
        """Respond to each prompt of this process's share `samples` times (default: the config's), with the
        weights pushed last."""
        samples = self.config.samples_per_prompt if samples is None else samples
        numbers = processes.share(len(prompts))
        rows = padded_rows(-(-len(prompts) // processes.count()), self.mesh)
        seen: Counter[int] = Counter()
        firsts = []  # a prompt that comes twice in one call goes on with later samples
        for prompt in prompts:
            firsts.append(seen[prompt.index])
            seen[prompt.index] += samples
        prompts = [prompts[number] for number in numbers]
        prompt_ids = [render_prompt(self.tokenizer, prompt, self.config) for prompt in prompts]
        tokens = np.zeros((rows, self.config.max_prompt_tokens), np.int32)
        lengths = np.ones(rows, np.int32)  # padding rows read one token
        seeds = np.zeros((rows, 4), np.uint32)
        for row, (number, prompt, ids) in enumerate(zip(numbers, prompts, prompt_ids, strict=True)):
            tokens[row, : len(ids)], lengths[row] = ids, len(ids)
            seeds[row] = self.seed, step, prompt.index, firsts[number]
        limits = np.zeros(rows, np.int32)
        limits[: len(prompts)] = self.config.max_new_tokens
        with processes.watched(f"sampling for step {step}"):
            out = self._generator(
                self._params,
                tokens,
                lengths,
                limits,
                self._keys(place_batch(seeds, self.mesh), samples=samples),
                self._sampling,
                samples=samples,
                max_new_tokens=self.config.max_new_tokens,
                stop_ids=tuple(sorted(self.tokenizer.stop_ids)),
                ended=StopStrings(self.config.stop, self.tokenizer) if self.config.stop else None,
            )
        return [
            self._rollout(prompt, ids, out, row * samples + sample)
            for row, (prompt, ids) in enumerate(zip(prompts, prompt_ids, strict=True))
            for sample in range(samples)
        ]

    def _rollout(self, prompt: Prompt, prompt_ids: np.ndarray, out: Generated, row: int) -> Rollout:
        length = int(out.lengths[row])
        return Rollout(
            prompt=prompt,
            prompt_ids=prompt_ids,
            response=self.tokenizer.spans(out.tokens[row, :length]),
            logprobs=out.logprobs[row, :length],
            model_logprobs=out.model_logprobs[row, :length],
            finished=bool(out.stopped[row]),
            policy_version=self._version,
            vocabulary=self.tokenizer.vocab_fingerprint,
        )


def _row_keys(seeds: Any, samples: int) -> Any:
    """[P, 4] (seed, step, prompt index, number of its first sample) -> one key per row, [P * samples]."""

    def key(numbers: Array, sample: Array) -> Array:
        base = jax.random.key(numbers[0])
        for number in (numbers[1], numbers[2], numbers[3] + sample):
            base = jax.random.fold_in(base, number)
        return base

    each = jnp.arange(samples, dtype=jnp.uint32)
    return jax.vmap(lambda numbers: jax.vmap(lambda n: key(numbers, n))(each))(seeds).reshape(-1)
