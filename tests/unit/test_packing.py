"""Ragged records into static shapes."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxdistill.errors import DataError
from jaxdistill.packing import ShapesConfig, blank, pack
from jaxdistill.records import Prompt, Rollout, Targets, TokenSpans
from tests.unit.losses.batches import LENGTH, LISTED, ROWS, make_batch


def rollout(prompt_length: int, response_length: int, version: int = 0) -> Rollout:
    ids = np.arange(100, 100 + response_length, dtype=np.int32)
    spans = TokenSpans(
        ids, b"x" * response_length, np.arange(1, response_length + 1), np.zeros(response_length, np.int8)
    )
    return Rollout(
        prompt=Prompt([{"role": "user", "content": "hi"}], 0, "test"),
        prompt_ids=np.arange(1, prompt_length + 1, dtype=np.int32),
        response=spans,
        logprobs=np.full(response_length, -0.5, np.float32),
        finished=True,
        policy_version=version,
        vocabulary="test",
    )


def targets(length: int) -> Targets:
    mask = np.ones(length, bool)
    mask[0] = False
    return Targets(
        chunk_of_token=np.where(mask, np.arange(length), -1).astype(np.int32),
        teacher_logprob=np.where(mask, -1.0, 0.0).astype(np.float32),
        mask=mask,
    )


def test_each_row_holds_its_prompt_then_its_response_and_nothing_else():
    rows = [rollout(3, 4, version=7), rollout(2, 1)]
    batch = pack(rows, [targets(4), None], buckets=[6, 8, 16], rows=3)
    assert batch.tokens.shape == (3, 8)
    np.testing.assert_array_equal(batch.tokens[0], [1, 2, 3, 100, 101, 102, 103, 0])
    np.testing.assert_array_equal(batch.response_mask[0], [0, 0, 0, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(batch.loss_mask[0], [0, 0, 0, 0, 1, 1, 1, 0])
    np.testing.assert_array_equal(batch.chunk_of_token[0], [-1, -1, -1, -1, 1, 2, 3, -1])
    np.testing.assert_array_equal(batch.teacher_logprob[0], [0, 0, 0, 0, -1, -1, -1, 0])
    np.testing.assert_array_equal(batch.policy_version, [7, 0, 0])
    assert not batch.loss_mask[1].any() and batch.response_mask[1].sum() == 1
    np.testing.assert_array_equal(batch.weight, [1, 1, 0])
    assert not batch.response_mask[2].any()


def test_what_the_model_gave_a_token_is_kept_beside_what_it_was_drawn_with():
    row = rollout(3, 2)
    batch = pack(
        [row, replace(row, model_logprobs=np.array([-1, -2], np.float32))], [None, None], buckets=[8], rows=2
    )
    np.testing.assert_array_equal(batch.behavior_logprobs[:, 3:6], [[-0.5, -0.5, 0]] * 2)
    assert batch.model_logprobs is not None
    np.testing.assert_array_equal(batch.model_logprobs[:, 3:6], [[-0.5, -0.5, 0], [-1, -2, 0]])


def test_a_row_beyond_the_largest_bucket_is_named_with_the_remedy():
    with pytest.raises(DataError, match=r"row of 9 tokens.*shapes\.buckets=\[4, 8\].*max_new_tokens"):
        pack([rollout(5, 4)], [None], buckets=[4, 8], rows=1)


def test_buckets_ascend():
    assert ShapesConfig(buckets=(4, 8)).buckets == (4, 8)
    with pytest.raises(ValueError, match="ascending"):
        ShapesConfig(buckets=(8, 4))


def test_a_blank_batch_has_the_shapes_of_a_full_one_and_nothing_in_it():
    full = make_batch()
    full = replace(full, model_logprobs=full.behavior_logprobs)  # packed rows always have them
    empty = blank(ROWS, LENGTH, {"projection": LISTED, "shared": LISTED, "end": 0})
    assert jax.tree.structure(empty) == jax.tree.structure(full)
    for got, expected in zip(jax.tree.leaves(empty), jax.tree.leaves(full), strict=True):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert not empty.weight.any() and not empty.projection.mask.any() and (empty.shared.ids == -1).all()
    assert blank(2, 5, {}).projection is None
