"""What the objectives on shared states have in common: the teacher's own top-k, in its own tokens, where
student and teacher have read the same bytes.

Letters: B rows, T positions, K listed tokens.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from jaxdistill.batch import Batch
from jaxdistill.losses.base import (
    Objective,
    ObjectiveSettings,
    Prepared,
    learning,
    masked_sum,
    predicted,
    required,
    row_weights,
    share_of_response,
)
from jaxdistill.losses.buckets import listed
from jaxdistill.records import Part


class SharedStateSettings(ObjectiveSettings):
    """Settings of every objective on shared states."""

    @property
    def needs(self) -> frozenset[Part]:
        return frozenset({"shared"})


@dataclass(frozen=True)
class SharedStateObjective[ConfigT: SharedStateSettings](Objective[ConfigT]):
    """A mean over shared states, each with the weight of its row."""

    def prepare(self, batch: Batch) -> Prepared:
        """Targets `mask` and `weight` [B, T], and [B, T, K]: the teacher's `ids` and `logprobs` (nats), and
        as `student_ids` the student's token of the same bytes or role; -1 and -inf where there is none. The
        last of K is no rank, see `records.SharedTopK`.

        Raises `ValueError` for a batch without them."""
        shared = required(batch.shared, "shared")
        mask, weight = shared.mask & learning(batch), row_weights(batch)
        ids, logprobs = listed(shared.ids, shared.logprobs, mask)
        targets = {
            "mask": mask,
            "weight": weight,
            "ids": ids,
            "logprobs": logprobs,
            "student_ids": jnp.where(ids >= 0, shared.student_ids, -1),
        }
        return Prepared(
            {name: predicted(x) for name, x in targets.items()},
            masked_sum(weight, mask),
            {"shared_fraction": share_of_response(batch, mask)},
        )
