"""The headline metrics against sums done by hand, odd tokens included."""

from dataclasses import replace

import numpy as np
import pytest

from jaxdistill.align import align, project
from jaxdistill.records import OTHER_SPECIAL, Prompt, Rollout, TeacherScores, TokenSpans, Unscored
from jaxdistill.scoring import Scored, distillation_metrics, unscored_rows
from jaxdistill.teachers.config import EmbeddedConfig
from jaxdistill.teachers.routing import Routes


def spans(pieces: list[bytes | int]) -> TokenSpans:
    """Bytes are content, a number is a role token of that role."""
    data = b"".join(p for p in pieces if isinstance(p, bytes))
    sizes = [len(p) if isinstance(p, bytes) else 0 for p in pieces]
    roles = [0 if isinstance(p, bytes) else p for p in pieces]
    return TokenSpans(
        np.arange(len(pieces), dtype=np.int32),
        data,
        np.cumsum(sizes, dtype=np.int64),
        np.array(roles, np.int8),
    )


def scored(student: list[bytes | int], teacher: list[bytes | int], s: list[float], t: list[float]) -> Scored:
    prompt = Prompt([{"role": "user", "content": "hi"}], 0, "test")
    rollout = Rollout(
        prompt, np.ones(1, np.int32), spans(student), np.array(s, np.float32), True, 0, vocabulary="a"
    )
    scores = TeacherScores(spans(teacher), np.array(t, np.float32), "teacher", "default")
    alignment = align(rollout.response, scores.response)
    return Scored([rollout], [scores], [alignment], [project(scores, alignment, signal="chunk")])


def test_chunks_and_the_end_of_turn_count_and_bytes_divide():
    values = distillation_metrics(
        scored([b"1", b"0", b" eggs", 1], [b"10", b" eggs", 1], [-0.1, -0.2, -0.3, -0.4], [-1.0, -2.0, -3.0])
    )
    assert values["reverse_kl_per_byte"].value == pytest.approx((6.0 - 1.0) / 7)
    assert values["coverage"].value == 1.0
    assert values["exact_fraction"].value == 0.5


def test_the_divergence_is_the_models_whatever_the_row_was_drawn_with():
    one = scored([b"a", b"b", 1], [b"a", b"b", 1], [-1, -1, -1], [-2, -2, -2])
    model = np.array([-1.5, -1.5, -1.5], np.float32)
    drawn_hot = replace(one, rollouts=[replace(one.rollouts[0], model_logprobs=model)])
    assert distillation_metrics(one)["reverse_kl_per_byte"].value == pytest.approx(1.5)
    assert distillation_metrics(drawn_hot)["reverse_kl_per_byte"].value == pytest.approx(0.75)


def test_a_special_token_without_a_partner_is_in_no_sum():
    with_mark = scored([b"a", OTHER_SPECIAL, b"b", 1], [b"a", b"b", 1], [-1, -50, -1, -1], [-2, -2, -2])
    without = scored([b"a", b"b", 1], [b"a", b"b", 1], [-1, -1, -1], [-2, -2, -2])
    one, two = distillation_metrics(with_mark), distillation_metrics(without)
    assert one["reverse_kl_per_byte"].value == two["reverse_kl_per_byte"].value == pytest.approx(1.5)
    np.testing.assert_array_equal(with_mark.targets[0].mask, [True, False, True, True])


def test_a_response_that_only_ends_has_no_bytes_but_a_signal():
    only_end = scored([1], [1], [-0.5], [-4.0])
    assert np.isnan(distillation_metrics(only_end)["reverse_kl_per_byte"].value)
    assert only_end.targets[0].mask.tolist() == [True]
    assert only_end.targets[0].teacher_logprob.tolist() == [-4.0]


def test_a_row_without_scores_is_kept_with_who_wrote_it():
    one = scored([b"a", 1], [], [-1, -1], [])
    rollouts = [replace(one.rollouts[0], origin=origin) for origin in ("student", "reference", "teacher")]
    reasons = [Unscored("bad_reply", "nonsense"), None, Unscored("too_long", "9 tokens")]
    kept = unscored_rows(rollouts, reasons, Routes([EmbeddedConfig(name="wise", model="m")], seed=0))
    assert {row["teacher"] for row in kept} == {"wise"}
    assert [(row["origin"], row["kind"]) for row in kept] == [
        ("student", "bad_reply"),
        ("teacher", "too_long"),
    ]
    # What was written is kept where it may be the reason.
    assert kept[0]["response"] == "a" and "response" not in kept[1]
