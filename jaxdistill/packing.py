"""Ragged host records -> one static-shaped host batch.

Letters: B rows, T padded length, R response tokens, K proposals.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import jax
import numpy as np
from pydantic import Field, field_validator

from jaxdistill.batch import Batch, BatchEndOfTurn, BatchProjection, BatchSharedTopK
from jaxdistill.config import StrictConfig
from jaxdistill.errors import DataError
from jaxdistill.records import ORIGINS, Part, Rollout, Targets

_PARTS: Mapping[Part, type] = {
    "projection": BatchProjection,
    "shared": BatchSharedTopK,
    "end": BatchEndOfTurn,
}
_FILL = {"chunk_of_token": -1, "ids": -1, "student_ids": -1, "logprobs": -np.inf}  # elsewhere zero
_DTYPES = {"mask": bool, "floored": bool, "ids": np.int32, "student_ids": np.int32}  # elsewhere float32


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
    rollouts: Sequence[Rollout],
    targets: Sequence[Targets | None],
    *,
    buckets: Sequence[int],
    rows: int,
    rewards: Sequence[float] | None = None,
) -> Batch:
    """Lay rollouts, their targets (None: no teacher) and rewards (None: none) into `rows` rows of the
    smallest bucket that holds them all. An optional part of the targets is in the batch if any row has it;
    a row without it has an empty mask there.

    Rows beyond the rollouts are padding with weight 0. Raises `DataError` if a row is longer than the
    largest bucket. The arrays are numpy; `parallel.place_batch` makes them global.
    """
    shape = (rows, bucket_of(rollouts, buckets))
    arrays: dict[str, Any] = {
        "tokens": np.zeros(shape, np.int32),
        "response_mask": np.zeros(shape, bool),
        "loss_mask": np.zeros(shape, bool),
        "behavior_logprobs": np.zeros(shape, np.float32),
        "model_logprobs": np.zeros(shape, np.float32),
        "chunk_of_token": np.full(shape, -1, np.int32),
        "teacher_logprob": np.zeros(shape, np.float32),
        "policy_version": np.zeros(rows, np.int32),
        "weight": np.zeros(rows, np.float32),
        "same_vocabulary": np.zeros(rows, bool),
        "origin": np.zeros(rows, np.int32),
        "reward": np.zeros(rows, np.float32),
    }
    if rewards is not None:
        arrays["reward"][: len(rollouts)] = rewards
    for row, (rollout, target) in enumerate(zip(rollouts, targets, strict=True)):
        start = len(rollout.prompt_ids)
        part = np.s_[row, start : start + len(rollout.response)]
        arrays["tokens"][row, :start] = rollout.prompt_ids
        arrays["tokens"][part] = rollout.response.ids
        arrays["response_mask"][part] = True if rollout.assistant_mask is None else rollout.assistant_mask
        arrays["behavior_logprobs"][part] = rollout.logprobs
        arrays["model_logprobs"][part] = rollout.own_logprobs
        arrays["policy_version"][row] = rollout.policy_version
        arrays["origin"][row] = ORIGINS[rollout.origin]
        arrays["weight"][row] = rollout.weight * (1.0 if target is None else target.weight)
        if target is not None:
            arrays["same_vocabulary"][row] = target.same_vocabulary
            arrays["loss_mask"][part] = target.mask
            arrays["chunk_of_token"][part] = target.chunk_of_token
            arrays["teacher_logprob"][part] = target.teacher_logprob
    starts = [len(rollout.prompt_ids) for rollout in rollouts]
    for name, kind in _PARTS.items():
        parts = [None if target is None else getattr(target, name) for target in targets]
        arrays[name] = _part(kind, parts, starts, shape)
    return Batch(**arrays)


def bucket_of(rollouts: Sequence[Rollout], buckets: Sequence[int]) -> int:
    """The smallest bucket that holds all rollouts. Raises `DataError` if none does."""
    longest = max((len(r.prompt_ids) + len(r.response) for r in rollouts), default=1)
    width = next((b for b in buckets if b >= longest), None)
    if width is None:
        raise DataError(
            f"a row of {longest} tokens (prompt and response) does not fit shapes.buckets={list(buckets)}; "
            "add a larger bucket or lower rollout.max_prompt_tokens or rollout.max_new_tokens"
        )
    return width


def lengthened(batch: Batch, length: int) -> Batch:
    """The host batch with padding behind its rows, up to `length` positions: as if it had been packed so."""
    more = length - batch.tokens.shape[1]

    def padded(path: Any, array: np.ndarray) -> np.ndarray:
        if array.ndim == 1:
            return array
        width = [(0, 0), (0, more), *[(0, 0)] * (array.ndim - 2)]
        return np.pad(array, width, constant_values=_FILL.get(path[-1].name, 0))

    return jax.tree_util.tree_map_with_path(padded, batch) if more else batch


def blank(rows: int, length: int, parts: Mapping[Part, int]) -> Batch:
    """Rows of padding alone, with the optional `parts`, each with K entries a state where it lists some: the
    shapes of any batch of this size."""

    def part(kind: type, entries: int) -> Any:
        arrays = {}
        for name in (field.name for field in fields(kind)):
            shape = (rows, length, entries) if name in _FILL else (rows, length)
            arrays[name] = np.full(shape, _FILL.get(name, 0), _DTYPES.get(name, np.float32))
        return kind(**arrays)

    batch = pack([], [], buckets=[length], rows=rows)
    return replace(batch, **{name: part(_PARTS[name], entries) for name, entries in parts.items()})


def _part(kind: type, parts: Sequence[Any], starts: Sequence[int], shape: tuple[int, int]) -> Any:
    """One optional part of the targets for all rows: each [R, ...] array from its row's response on."""
    present = [
        (row, start, part) for row, (start, part) in enumerate(zip(starts, parts, strict=True)) if part
    ]
    if not present:
        return None
    arrays: dict[str, Any] = {}
    for name in (field.name for field in fields(kind)):
        first = getattr(present[0][2], name)
        widest = (max(getattr(part, name).shape[1] for *_, part in present),) if first.ndim == 2 else ()
        arrays[name] = np.full(shape + widest, _FILL.get(name, 0), first.dtype)
        for row, start, part in present:
            values = getattr(part, name)
            tail = (slice(values.shape[1]),) if widest else ()
            arrays[name][(row, slice(start, start + len(values)), *tail)] = values
    return kind(**arrays)
