"""Which student token gets how much of a chunk's difference between teacher and student.

A chunk is a stretch of bytes that ends on a token border on both sides. Per chunk c, with L_T(c) the
teacher's and L_S(c) the student's total log-probability, d(c) = L_T(c) - L_S(c) is the sampled value
of minus the reverse KL. The rules below spread d over student tokens:

- `broadcast`: every token of the chunk gets d. Exact if the borders were fixed beforehand.
- `uniform`: each of its n tokens gets d / n.
- `proportional`: d in proportion to each token's own log-probability (arXiv 2606.09456).
- `lookahead`: as broadcast, and the token AFTER the chunk gets d too. The teacher's cut depends on
  what comes next ("10" is one token only if no further digit follows), so part of d is the work of
  the token that closed the chunk; charging only the chunk punishes tokens that were right. In rows
  whose teacher has the student's own vocabulary every chunk is one token and its border is nobody's
  work: there it is `broadcast`, the textbook rule.
- `chunk`: the last token of the chunk gets d, the others nothing, so that a sum over whole chunks counts each
  once.

Letters: B rows, T positions.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

ChunkCredit = Literal["lookahead", "broadcast", "uniform", "proportional", "chunk"]


def token_advantages(
    credit: ChunkCredit,
    *,
    chunk_of_token: Int32[Array, "B T"],
    teacher_logprob: Float32[Array, "B T"],
    student_logprobs: Float32[Array, "B T"],
    mask: Bool[Array, "B T"],
    same_vocabulary: Bool[Array, " B"],
    clip: float,
) -> tuple[Float32[Array, "B T"], Bool[Array, "B T"]]:
    """The advantage of each token in nats, and which tokens have one.

    `teacher_logprob` holds L_T(c) on every token of chunk c; only tokens in `mask` are read. d(c) is
    clipped to +-`clip` before it is spread. With `lookahead` the token after the last chunk may get a
    signal although it lies in no chunk itself; the caller's mask of response tokens decides.
    """
    width = chunk_of_token.shape[1]
    # Tokens without a chunk go to one more, unused segment.
    segment = jnp.where(mask, chunk_of_token, width)
    logprobs = jnp.where(mask, student_logprobs, 0.0)

    def per_chunk(values: Array) -> Array:
        sums = jax.vmap(lambda v, s: jax.ops.segment_sum(v, s, num_segments=width + 1))(values, segment)
        return jnp.take_along_axis(sums, segment, axis=1)

    student_total = per_chunk(logprobs)
    difference = jnp.where(mask, jnp.clip(teacher_logprob - student_total, -clip, clip), 0.0)
    if credit == "broadcast":
        return difference, mask
    if credit == "uniform":
        tokens = per_chunk(mask.astype(jnp.float32))
        return jnp.where(mask, difference / jnp.maximum(tokens, 1.0), 0.0), mask
    if credit == "proportional":
        # A chunk the student was certain of (total 0) has no tokens to blame.
        share = jnp.where(student_total < 0, logprobs / jnp.where(student_total < 0, student_total, 1.0), 0.0)
        return jnp.where(mask, difference * share, 0.0), mask
    if credit == "chunk":
        following = jnp.pad(segment, ((0, 0), (0, 1)), constant_values=width)[:, 1:]
        return jnp.where(segment != following, difference, 0.0), mask
    previous = jnp.pad(difference, ((0, 0), (1, 0)))[:, :-1]
    previous_segment = jnp.pad(segment, ((0, 0), (1, 0)), constant_values=width)[:, :-1]
    closes = (previous_segment != width) & (previous_segment != segment) & ~same_vocabulary[:, None]
    return difference + jnp.where(closes, previous, 0.0), mask | closes
