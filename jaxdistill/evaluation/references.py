"""Held-out reference responses: how many bits the student and the teacher need for them.

Letters: B rows, T padded length, P prompt tokens, R response tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int32

from jaxdistill.batch import Mean
from jaxdistill.losses.base import predicted
from jaxdistill.losses.head import row_statistics
from jaxdistill.packing import bucket_of, pack
from jaxdistill.parallel import processes
from jaxdistill.parallel.rules import own_rows, padded_rows, place_batch, rows_sharding
from jaxdistill.records import END_OF_TURN, Rollout, TokenSpans
from jaxdistill.scoring import Scored, Scoring, response_kl
from jaxdistill.students import Decoder


class StudentLogprobs:
    """The student's log-probabilities of responses it need not have written, `group` rows at a time in each
    process."""

    def __init__(self, graphdef: nnx.GraphDef[Decoder], mesh: Mesh, buckets: Sequence[int], group: int):
        self._mesh = mesh
        self._buckets = buckets
        self._group = group

        @partial(jax.jit, out_shardings=rows_sharding(mesh, 2))
        def run(params: Any, tokens: Int32[Array, "B T"]) -> Float32[Array, "B T"]:
            decoder = nnx.merge(graphdef, params)
            nothing = jnp.zeros((tokens.shape[0], 0), jnp.int32)
            following = predicted(tokens)
            return row_statistics(
                decoder(tokens),
                decoder.output_embedding,
                following,
                top_k=0,
                chosen=nothing,
                softcap=decoder.config.logit_softcap,
                mesh=mesh,
            ).logprob

        self._run = run

    def __call__(self, params: Any, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts with log p_S(token | prompt, tokens before) as their `logprobs`, in nats, at
        temperature 1."""
        found = []
        rows = padded_rows(self._group, self._mesh)
        for start in range(0, processes.agree_max("the references", len(rollouts)), self._group):
            group = rollouts[start : start + self._group]
            length = processes.agree_max("the length of the references", bucket_of(group, self._buckets))
            packed = pack(group, [None] * len(group), buckets=[length], rows=rows)
            logprobs = own_rows(self._run(params, place_batch(packed.tokens, self._mesh)))
            for row, rollout in enumerate(group):
                first = len(rollout.prompt_ids) - 1  # where the response's first token is predicted
                part = logprobs[row, first : first + len(rollout.response)]
                found.append(replace(rollout, logprobs=part))
        return found


class References:
    """The figures of this process's reference responses, for whatever weights the student has.

    The teachers do not change during a run, so they are asked once.
    """

    def __init__(self, rollouts: Sequence[Rollout], student: StudentLogprobs, scoring: Scoring | None):
        self._rollouts = rollouts
        self._student = student
        self._scoring = scoring
        self._scored: Scored | None = None

    def __call__(self, params: Any) -> dict[str, Mean]:
        """`reference_figures` with the student's weights `params`. Raises what a teacher's scoring raises,
        and `TeacherContractError` where it leaves too many of the references without scores."""
        rollouts = self._student(params, self._rollouts)
        if self._scoring is not None and self._scored is None:
            with processes.together("the scores of the references"):
                self._scored = self._scoring(self._rollouts)
                self._scoring.teachers.check_share(self._scored.scores)
        scored = None if self._scored is None else replace(self._scored, rollouts=rollouts)
        return reference_figures(rollouts, scored)


def reference_figures(rollouts: Sequence[Rollout], scored: Scored | None) -> dict[str, Mean]:
    """Figures of references whose `logprobs` are the student's; `scored` are the same rollouts.

    - `student_bits_per_byte`: -log2 p_S of the text of responses, over their bytes. Ends of turn are not in
      it: a figure of texts is the same whether or not a model has learned when to stop.
    - `student_end_logprob`: log p_S of the end of turn behind a reference, nats, mean over references.
    - `teacher_bits_per_byte`, `teacher_end_logprob`: the same of the teacher's own tokens, over what it has
      scored.
    - `cross_entropy_gap_per_byte`: log p_T - log p_S in nats over the aligned tokens, per aligned byte. Where
      the teacher wrote the references it is the sampled value of the forward KL(p_T || p_S) per byte, and of
      nothing else where it did not: there it says by how much the teacher predicts them better.
    """
    figures = _figures_of("student", [(r.response, r.logprobs) for r in rollouts])
    if scored is None:
        return figures
    gap = aligned = 0.0
    for rollout, s, a in zip(scored.rollouts, scored.scores, scored.alignments, strict=True):
        gap -= response_kl(rollout, s, a)
        aligned += a.coverage * len(rollout.response.data) if s.unscored is None else 0.0
    figures |= _figures_of("teacher", [(s.response, s.logprobs) for s in scored.scores])
    return figures | {"cross_entropy_gap_per_byte": Mean(gap, aligned)}


def _figures_of(side: str, responses: Sequence[tuple[TokenSpans, np.ndarray]]) -> dict[str, Mean]:
    """Bits per byte of the text and log-probability of the ends, from tokens and their log-probabilities in
    nats (float32, one per token). Without a single end the second is left out. Tokens of other roles are in
    neither."""
    text = end = size = ends = 0.0
    for spans, logprobs in responses:
        text += float(logprobs[spans.roles == 0].sum(dtype=np.float64))
        end += float(logprobs[spans.roles == END_OF_TURN].sum(dtype=np.float64))
        size += len(spans.data)
        ends += np.count_nonzero(spans.roles == END_OF_TURN)
    figures = {f"{side}_bits_per_byte": Mean(-text / math.log(2), size)}
    return figures | ({f"{side}_end_logprob": Mean(end, ends)} if ends else {})
