"""Ragged host records -> one static-shaped host batch.

Letters: B rows, T padded length, R response tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from jaxdistill.batch import Batch
from jaxdistill.config import StrictConfig
from jaxdistill.errors import DataError
from jaxdistill.records import Rollout, Targets


class ShapesConfig(StrictConfig):
    """The padded lengths a batch may have, ascending; each is compiled once. Empty: the one length
    that holds the longest allowed prompt and response."""

    buckets: tuple[int, ...] = Field(default=())

    @field_validator("buckets")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(b < 2 for b in value) or list(value) != sorted(set(value)):
            raise ValueError(f"expected ascending lengths of at least 2, got {list(value)}")
        return value


def pack(
    rollouts: Sequence[Rollout], targets: Sequence[Targets | None], *, buckets: Sequence[int], rows: int
) -> Batch:
    """Lay rollouts and their targets (None: no teacher) into `rows` rows of the smallest bucket that
    holds them all.

    Rows beyond the rollouts are padding with weight 0. Raises `DataError` if a row is longer than the
    largest bucket. The arrays are numpy; `parallel.place_batch` makes them global.
    """
    longest = max((len(r.prompt_ids) + len(r.response) for r in rollouts), default=1)
    width = next((b for b in buckets if b >= longest), None)
    if width is None:
        raise DataError(
            f"a row of {longest} tokens (prompt and response) does not fit shapes.buckets={list(buckets)}; "
            "add a larger bucket or lower rollout.max_prompt_tokens or rollout.max_new_tokens"
        )
    shape = (rows, width)
    arrays: dict[str, Any] = {
        "tokens": np.zeros(shape, np.int32),
        "response_mask": np.zeros(shape, bool),
        "loss_mask": np.zeros(shape, bool),
        "behavior_logprobs": np.zeros(shape, np.float32),
        "chunk_of_token": np.full(shape, -1, np.int32),
        "teacher_logprob": np.zeros(shape, np.float32),
        "policy_version": np.zeros(rows, np.int32),
        "weight": np.zeros(rows, np.float32),
        "same_vocabulary": np.zeros(rows, bool),
    }
    for row, (rollout, target) in enumerate(zip(rollouts, targets, strict=True)):
        start = len(rollout.prompt_ids)
        part = np.s_[row, start : start + len(rollout.response)]
        arrays["tokens"][row, :start] = rollout.prompt_ids
        arrays["tokens"][part] = rollout.response.ids
        arrays["response_mask"][part] = True if rollout.assistant_mask is None else rollout.assistant_mask
        arrays["behavior_logprobs"][part] = rollout.logprobs
        arrays["policy_version"][row] = rollout.policy_version
        arrays["weight"][row] = 1.0 if target is None else target.weight
        if target is not None:
            arrays["same_vocabulary"][row] = target.same_vocabulary
            arrays["loss_mask"][part] = target.mask
            arrays["chunk_of_token"][part] = target.chunk_of_token
            arrays["teacher_logprob"][part] = target.teacher_logprob
    return Batch(**arrays)
