"""Sampling in process, with the weights the trainer holds.

Letters: P prompts, N samples of each, B = P*N rows (all samples of a prompt together), T padded
prompt length, M most new tokens, S = T + M cache slots, V vocabulary.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int32, Key, Shaped

from jaxdistill.errors import StaleRolloutError
from jaxdistill.parallel.rules import padded_rows, place_batch
from jaxdistill.records import Prompt, Rollout
from jaxdistill.samplers.base import RolloutConfig, render_prompt
from jaxdistill.students.attention import EMPTY_SLOT
from jaxdistill.students.decoder import Decoder
from jaxdistill.text import Tokenizer


class Generated(NamedTuple):
    """Sampled rows. `tokens[b, :lengths[b]]` is the response, a stop id included where one came;
    `logprobs` are natural logs of the probabilities the tokens were drawn with."""

    tokens: Int32[Array, "B M"]
    logprobs: Float32[Array, "B M"]
    lengths: Int32[Array, " B"]


class _Loop(NamedTuple):
    step: Int32[Array, ""]
    done: Shaped[Array, " B"]
    hidden: Float[Array, "B D"]
    cache: Any
    out: Generated


def generate(
    decoder: Decoder,
    prompts: Int32[Array, "P T"],
    lengths: Int32[Array, " P"],
    keys: Key[Array, " B"],
    *,
    samples: int,
    max_new_tokens: int,
    temperature: Float32[Array, ""],
    stop_ids: tuple[int, ...],
    top_p: Float32[Array, ""] | None = None,
) -> Generated:
    """Sample `samples` responses for each right-padded prompt; jit with `samples`, `max_new_tokens` and
    `stop_ids` static.

    Each prompt is read once and its cache shared out to its samples. A row draws only from its own key
    and step, so its response does not depend on the rest of the batch. Temperature 0 takes the most
    likely token (and reports its log-probability at temperature 1). `top_p`: see `nucleus`; None draws from
    all tokens.
    """
    capacity = prompts.shape[1] + max_new_tokens
    hidden, cache = decoder.prefill(prompts, lengths, capacity)
    hidden, cache, lengths = jax.tree.map(
        lambda leaf: jnp.repeat(leaf, samples, axis=0), (hidden, cache, lengths)
    )
    rows = lengths.shape[0]
    slots = jnp.arange(capacity, dtype=jnp.int32)[None]
    divisor = jnp.where(temperature > 0, temperature, 1.0)

    def draw(hidden: Array, step: Array) -> tuple[Array, Array]:
        logits = decoder.logits(hidden) / divisor
        logits = logits if top_p is None else nucleus(logits, top_p)
        row_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        sampled = jax.vmap(jax.random.categorical)(row_keys, logits)
        token = jnp.where(temperature > 0, sampled, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
        chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
        return token, chosen - jax.nn.logsumexp(logits, axis=-1)

    def body(loop: _Loop) -> _Loop:
        token, logprob = draw(loop.hidden, loop.step)
        live = ~loop.done
        out = Generated(
            loop.out.tokens.at[:, loop.step].set(jnp.where(live, token, 0)),
            loop.out.logprobs.at[:, loop.step].set(jnp.where(live, logprob, 0.0)),
            loop.out.lengths + live,
        )
        done = loop.done | jnp.isin(token, jnp.asarray(stop_ids, jnp.int32))
        # Every row writes the same slot; the slots between a short prompt and T stay empty.
        slot = prompts.shape[1] + loop.step
        generated = (slots >= prompts.shape[1]) & (slots <= slot)
        places = jnp.where(generated, lengths[:, None] + slots - prompts.shape[1], EMPTY_SLOT)
        places = jnp.where(slots < lengths[:, None], slots, places)
        hidden, cache = decoder.decode(token, lengths + loop.step, slot, places, loop.cache)
        return _Loop(loop.step + 1, done, hidden, cache, out)

    empty = Generated(
        jnp.zeros((rows, max_new_tokens), jnp.int32),
        jnp.zeros((rows, max_new_tokens), jnp.float32),
        jnp.zeros(rows, jnp.int32),
    )
    start = _Loop(jnp.int32(0), jnp.zeros(rows, bool), hidden, cache, empty)
    return jax.lax.while_loop(
        lambda loop: (loop.step < max_new_tokens) & ~jnp.all(loop.done), body, start
    ).out


def nucleus(logits: Float32[Array, "B V"], top_p: Float32[Array, ""]) -> Float32[Array, "B V"]:
    """The logits of the fewest tokens whose probabilities sum to `top_p` or more, -inf for all others
    (Holtzman et al. 2020, section 3.1); tokens as likely as the last of them stay too."""
    ordered = -jnp.sort(-logits, axis=-1)
    probability = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


class LocalSampler:
    """Samples with the last pushed parameters; no copy of the weights is made.

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
        self._params: Any = None
        self._version = -1

        @partial(jax.jit, static_argnames=("samples",))
        def run(
            params: Any, prompts: Any, lengths: Any, seeds: Any, temperature: Any, *, samples: int
        ) -> Generated:
            return generate(
                nnx.merge(graphdef, params),
                prompts,
                lengths,
                _row_keys(seeds, samples),
                samples=samples,
                max_new_tokens=config.max_new_tokens,
                temperature=temperature,
                stop_ids=tuple(sorted(tokenizer.stop_ids)),
            )

        self._generate = run

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
        out: Generated = jax.device_get(
            self._generate(
                self._params,
                *place_batch((tokens, lengths, seeds), self.mesh),
                np.float32(self.config.temperature),
                samples=samples,
            )
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
        ids = np.asarray(out.tokens[row, :length])
        return Rollout(
            prompt=prompt,
            prompt_ids=prompt_ids,
            response=self.tokenizer.spans(ids),
            logprobs=np.asarray(out.logprobs[row, :length]),
            finished=int(ids[-1]) in self.tokenizer.stop_ids,
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
