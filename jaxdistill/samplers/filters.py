"""From a model's logits to the distribution a token is drawn from: temperature, top-k, top-p, min-p.

Letters: B rows, V vocabulary.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

Scalar = Float32[Array, ""] | Float32[np.ndarray, ""]  # numpy on the host, traced in a program


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_p", "min_p"],
    meta_fields=["top_k", "ids"],
)
@dataclass(frozen=True)
class SamplingParams:
    """How a token is drawn; made by `sampling_params`. A filter that is off is 0 or None, so that the program
    does not hold it. Ids from `ids` on (None: none) are never drawn: rows of a model's vocabulary that its
    tokenizer has no entry for."""

    temperature: Scalar
    top_k: int = 0
    ids: int | None = None
    top_p: Scalar | None = None
    min_p: Scalar | None = None


def sampling_params(
    temperature: float,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    ids: int | None = None,
) -> SamplingParams:
    """The settings for a program. Temperature 0 takes the most likely token; `top_k` 0, `top_p` 1 and `min_p`
    0 filter nothing, `ids` None draws from all ids. Each `top_k` and `ids` is a program of its own, the other
    values are not.

    Raises `ValueError` for a value that means nothing.
    """
    for name, value, fine, range_ in (
        ("temperature", temperature, 0 <= temperature < np.inf, "at least 0"),
        ("top_k", top_k, top_k >= 0, "at least 0"),
        ("top_p", top_p, 0 < top_p <= 1, "in (0, 1]"),
        ("min_p", min_p, 0 <= min_p <= 1, "in [0, 1]"),
    ):
        if not fine:
            raise ValueError(f"{name}={value}, expected a number {range_}")
    return SamplingParams(
        np.asarray(temperature, np.float32),
        top_k,
        ids,
        None if top_p == 1 else np.asarray(top_p, np.float32),
        None if min_p == 0 else np.asarray(min_p, np.float32),
    )


def filtered(logits: Float32[Array, "B V"], params: SamplingParams) -> Float32[Array, "B V"]:
    """Logits whose softmax is the distribution to draw from, -inf where a token is filtered out.

    In the order of transformers: divided by the temperature; then the `top_k` most likely tokens; of those,
    renormalised, the fewest with `top_p` of the probability or more (Holtzman et al. 2020, section 3.1); then
    those at least `min_p` times as likely as the most likely one (Nguyen et al. 2024, section 3). Tokens as
    likely as the last that stays, stay too. vLLM has min-p before the others, which differs where top-p is on
    as well. Ids from `params.ids` on are out before all that. At temperature 0 nothing else is filtered, and
    nothing divided. Without `top_k` and `top_p` nothing is sorted.
    """
    if params.ids is not None:
        logits = jnp.where(jnp.arange(logits.shape[1]) < params.ids, logits, -jnp.inf)
    greedy = params.temperature <= 0
    logits = logits / jnp.where(greedy, 1.0, params.temperature)
    least = jnp.full((logits.shape[0], 1), -jnp.inf)
    if params.top_k or params.top_p is not None:
        count = min(params.top_k, logits.shape[1])
        ordered = jax.lax.top_k(logits, count)[0] if count else -jnp.sort(-logits, axis=-1)
        least = ordered[:, -1:]
        if params.top_p is not None:
            # Of all that top-k keeps, ties of its last included: those are not in `ordered`.
            total = jax.nn.logsumexp(logits, axis=-1, keepdims=True, where=logits >= least)
            probability = jnp.exp(ordered - total)
            before = jnp.cumsum(probability, axis=-1) - probability
            least = jnp.min(jnp.where(before < params.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    if params.min_p is not None:
        # The most likely token is never filtered out, so that its probability is the same factor of all.
        most = jnp.max(logits, axis=-1, keepdims=True)
        least = jnp.maximum(least, most + jnp.log(params.min_p))
    return jnp.where((logits >= least) | greedy, logits, -jnp.inf)
