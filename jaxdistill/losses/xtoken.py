"""P-KL of X-Token (arXiv 2605.21699): the student's next-token distribution carried to teacher tokens by a
sparse matrix W, then the KL from the teacher's own distribution.

    q(v) = sum over student tokens s of W[s, v] p_S(s),     loss = KL(p_T || q)

Here every row of W has one entry: a student token goes to the FIRST teacher token of its bytes. Both
distributions are of what comes next after the same bytes. If the student goes on with the bytes of s, the
teacher, which writes these bytes canonically, goes on with the first token of its own cut of them: `" 100"`
of the student is `" "` of a teacher that writes digits one by one. A role goes to the teacher's token of
that role.

Letters: B rows, T positions, C positions in a tile, K listed tokens, N buckets (K and the tail), V student
ids, W teacher ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32
from pydantic import Field

from jaxdistill.batch import Batch
from jaxdistill.errors import ConfigError
from jaxdistill.losses.base import Metrics, Objective, ObjectiveSettings, Prepared, Vocabularies, masked_mean
from jaxdistill.losses.buckets import generalised_jsd, log_tail, shared_targets
from jaxdistill.records import Part
from jaxdistill.text import Tokenizer

_TINY = 1e-37  # the least mass whose log is taken: below it float32 has nothing left to learn from


class XTokenConfig(ObjectiveSettings):
    """Settings of `objective.kind: xtoken`; `beta`: 0 is the paper's KL(p_T || q), 1 the reverse."""

    kind: Literal["xtoken"] = "xtoken"
    beta: float = Field(default=0.0, ge=0, le=1)

    @property
    def needs(self) -> frozenset[Part]:
        return frozenset({"shared"})


def first_teacher_tokens(student: Tokenizer, teacher: Tokenizer) -> Int32[np.ndarray, " V"]:
    """W as one teacher id for each student id: the first of its bytes' encoding, or the token of the same
    role; -1 for a token without bytes or role and for one the teacher cannot write."""
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
class XToken(Objective[XTokenConfig]):
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
        targets, weight = shared_targets(batch)
        # A gather with numpy constants: which teacher tokens can be reached at all.
        reachable = jnp.asarray(np.isin(np.arange(self.teacher_size), self.first))
        known = (targets["ids"] >= 0) & reachable[targets["ids"]]
        targets |= {
            "ids": jnp.where(known, targets["ids"], -1),
            "logprobs": jnp.where(known, targets["logprobs"], -jnp.inf),
        }
        return Prepared(targets, weight, {})

    def tile(self, logits: Float32[Array, "B C V"], targets: Any) -> tuple[Float32[Array, "B C"], Metrics]:
        mask, weight, ids = targets["mask"], targets["weight"], targets["ids"]
        known = ids >= 0
        mass = self._projected(jax.nn.softmax(logits, axis=-1))
        chosen = jnp.take_along_axis(mass, jnp.where(known, ids, 0), axis=-1)
        places = jnp.where(known, ids, self.teacher_size + 1)  # an index out of bounds is dropped
        rest = jnp.sum(jnp.put_along_axis(mass, places, 0.0, axis=-1, inplace=False, mode="drop"), axis=-1)
        has_tail = jnp.sum(known, axis=-1) < self._outcomes(logits.shape[-1])
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

    def _table(self, vocabulary: int) -> np.ndarray:
        """The column of each of the model's ids; those beyond the tokenizer's, and those that go nowhere,
        share one after the teacher's last."""
        table = np.full(vocabulary, self.teacher_size, np.int32)
        first = np.asarray(self.first)
        table[: len(first)] = np.where(first >= 0, first, self.teacher_size)
        return table

    def _outcomes(self, vocabulary: int) -> int:
        return len(np.unique(self._table(vocabulary)))

    def _projected(self, probabilities: Float32[Array, "B C V"]) -> Float32[Array, "B C W1"]:
        """The mass of each teacher token, and after the last that of what goes nowhere."""
        empty = jnp.zeros((*probabilities.shape[:2], self.teacher_size + 1))
        return empty.at[:, :, self._table(probabilities.shape[-1])].add(probabilities)
