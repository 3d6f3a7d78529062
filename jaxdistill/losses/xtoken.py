"""P-KL of X-Token (arXiv 2605.21699): the student's next-token distribution carried to teacher tokens by a
sparse matrix W, then the KL from the teacher's own distribution.

    q(v) = sum over student tokens s of W[s, v] p_S(s),     loss = KL(p_T || q)

Here every row of W has one entry: a student token goes to the FIRST teacher token of its bytes. Both
distributions are of what comes next after the same bytes. If the student goes on with the bytes of s, the
teacher, which writes these bytes canonically, goes on with the first token of its own cut of them: `" 100"`
of the student is `" "` of a teacher that writes digits one by one. A role goes to the teacher's token of
that role.

Letters: B rows, T positions, C positions in a tile, K listed tokens, N buckets (K and the tail), V student
ids, W teacher ids a student token goes to.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32
from pydantic import Field

from jaxdistill.batch import Batch
from jaxdistill.errors import ConfigError
from jaxdistill.losses.base import Metrics, Prepared, Vocabularies, masked_mean
from jaxdistill.losses.buckets import generalised_jsd, log_tail
from jaxdistill.losses.shared_states import SharedStateObjective, SharedStateSettings
from jaxdistill.text import Tokenizer

_TINY = 1e-37  # the least mass whose log is taken: below it float32 has nothing left to learn from


class XTokenConfig(SharedStateSettings):
    """Settings of `objective.kind: xtoken`; `beta`: 0 is the paper's KL(p_T || q), 1 the reverse."""

    kind: Literal["xtoken"] = "xtoken"
    beta: float = Field(default=0.0, ge=0, le=1)


def first_teacher_tokens(student: Tokenizer, teacher: Tokenizer) -> Int32[np.ndarray, " V"]:
    """W as one teacher id for each student id: the first of its bytes' encoding, or the token of the same
    role; -1 for a token without bytes or role and for one the teacher cannot write. Equal vocabularies give
    each id itself, also one that is not the encoding of its own bytes."""
    if student.vocab_fingerprint == teacher.vocab_fingerprint:
        return np.arange(student.vocab_size, dtype=np.int32)
    table = np.full(student.vocab_size, -1, np.int32)
    pieces = student.token_bytes(range(student.vocab_size))
    written = [(index, piece) for index, piece in enumerate(pieces) if piece]
    encoded = teacher.encode_batch([piece for _, piece in written])
    for (index, piece), spans in zip(written, encoded, strict=True):
        if spans.data == piece:
            table[index] = spans.ids[0]
    for role, index in student.roles.items():
        table[index] = teacher.roles.get(role, -1)
    return table


@dataclass(frozen=True)
class XToken(SharedStateObjective[XTokenConfig]):
    """Mean KL per shared state, in nats, over the teacher's listed tokens and one bucket for all others.

    A listed token no student token goes to belongs to the others: the student cannot give it any mass.
    `first` is `first_teacher_tokens`, `teacher_size` the number of teacher ids.
    """

    first: tuple[int, ...]  # not an array: compiled programs are told apart by the objective's value
    teacher_size: int

    @classmethod
    def build(cls, config: XTokenConfig, vocabularies: Vocabularies) -> "XToken":
        prints: Mapping[str, Tokenizer] = {t.vocab_fingerprint: t for t in vocabularies.teachers}
        if len(prints) != 1:
            raise ConfigError(
                f"objective.kind=xtoken projects to the tokens of one teacher vocabulary, but the "
                f"{len(vocabularies.teachers)} teachers have {len(prints)} different ones; use gkd or gold "
                "with several, or name teachers that share a tokenizer"
            )
        (teacher,) = prints.values()
        first = first_teacher_tokens(vocabularies.student, teacher)
        return cls(config, tuple(first.tolist()), teacher.vocab_size)

    def prepare(self, batch: Batch) -> Prepared:
        prepared = super().prepare(batch)
        ids, logprobs = prepared.targets["ids"], prepared.targets["logprobs"]
        column_of = np.full(self.teacher_size, -1, np.int32)
        column_of[self._reached] = np.arange(len(self._reached))
        columns = jnp.where(ids >= 0, jnp.asarray(column_of)[ids], -1)
        targets = {
            "mask": prepared.targets["mask"],
            "weight": prepared.targets["weight"],
            "columns": columns,
            "logprobs": jnp.where(columns >= 0, logprobs, -jnp.inf),
        }
        return replace(prepared, targets=targets)

    def tile(self, logits: Float32[Array, "B C V"], targets: Any) -> tuple[Float32[Array, "B C"], Metrics]:
        mask, weight, columns = targets["mask"], targets["weight"], targets["columns"]
        known, vocabulary = columns >= 0, logits.shape[-1]
        mass = self._projected(jax.nn.softmax(logits, axis=-1))
        chosen = jnp.take_along_axis(mass, jnp.where(known, columns, 0), axis=-1)
        places = jnp.where(known, columns, mass.shape[-1])  # an index out of bounds is dropped
        rest = jnp.sum(jnp.put_along_axis(mass, places, 0.0, axis=-1, inplace=False, mode="drop"), axis=-1)
        has_tail = jnp.sum(known, axis=-1) < len(np.unique(self._columns(vocabulary)))
        teacher = jnp.where(has_tail, log_tail(targets["logprobs"]), -jnp.inf)
        student = jnp.concatenate([chosen, rest[..., None]], axis=-1)
        value = generalised_jsd(
            jnp.concatenate([targets["logprobs"], teacher[..., None]], axis=-1),
            jnp.log(jnp.maximum(student, _TINY)),
            self.config.beta,
        )
        return jnp.where(mask, weight * value, 0.0), {
            "student_tail_mass": masked_mean(rest, mask, weight),
        }

    @cached_property
    def _reached(self) -> Int32[np.ndarray, " W"]:
        """The teacher ids a student token goes to, rising. They alone get a column: so there are never more
        than student ids, by whose number the head sizes a tile, however many ids the teacher has."""
        return np.unique([token for token in self.first if token >= 0]).astype(np.int32)

    def _columns(self, vocabulary: int) -> Int32[np.ndarray, " V"]:
        """The column of each of the model's ids; those beyond the tokenizer's, and those that go nowhere,
        share one after the last."""
        columns = np.full(vocabulary, len(self._reached), np.int32)
        first = np.asarray(self.first, np.int32)
        goes = np.flatnonzero(first >= 0)
        columns[goes] = np.searchsorted(self._reached, first[goes])
        return columns

    def _projected(self, probabilities: Float32[Array, "B C V"]) -> Float32[Array, "B C W1"]:
        """The mass of each teacher token a student token goes to, and after the last that of what goes
        nowhere."""
        empty = jnp.zeros((*probabilities.shape[:2], len(self._reached) + 1))
        return empty.at[:, :, self._columns(probabilities.shape[-1])].add(probabilities)
