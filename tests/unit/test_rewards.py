"""Task rewards: which responses get one, and how the samples of a prompt are compared."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxdistill.records import Prompt, Rollout, TokenSpans
from jaxdistill.rewards import RewardConfig, Rewards, group_normalized
from jaxdistill.run_config import RunConfig

BASE = {
    "run": {"steps": 1, "dir": "x"},
    "data": {"path": "x.jsonl"},
    "student": {"path": "x"},
    "teacher": {"kind": "embedded", "model": "x"},
}


def rollout(text: str, index: int, answer: str | None = "1", **more) -> Rollout:
    data = text.encode()
    spans = TokenSpans(np.zeros(1, np.int32), data, np.array([len(data)]), np.zeros(1, np.int8))
    row = Prompt([{"role": "user", "content": "hi"}], index, "sums", answer=answer)
    fields = {"finished": True, "policy_version": 0, "vocabulary": "v"} | more
    return Rollout(row, np.ones(1, np.int32), spans, np.zeros(1, np.float32), **fields)


def rewards(rollouts: list[Rollout], normalize: str = "group"):
    return Rewards.build(RewardConfig(scorer="numeric", normalize=normalize))(rollouts)


@given(arrays(np.float64, st.integers(1, 9), elements=st.integers(0, 20).map(lambda n: n / 20)))
def test_a_group_has_mean_zero_and_unit_deviation_or_says_nothing(scores):
    normalized = group_normalized(scores)
    if (scores == scores[0]).all():
        assert not normalized.any()
        return
    expected = [(r - sum(scores) / len(scores)) for r in scores]
    deviation = (sum(d * d for d in expected) / len(scores)) ** 0.5
    np.testing.assert_allclose(normalized, np.array(expected) / (deviation + 1e-6), atol=1e-9)
    assert abs(normalized.mean()) < 1e-9 and abs(normalized.std() - 1) < 1e-4
    order = np.argsort(scores, kind="stable")
    np.testing.assert_allclose(group_normalized(scores[order]), normalized[order], atol=1e-9)


def test_samples_are_compared_with_those_of_their_own_prompt():
    rows = [rollout("1", 0), rollout("2", 0), rollout("1", 1), rollout("1", 1)]
    values, metrics = rewards(rows)
    np.testing.assert_allclose(values, [1, -1, 0, 0], atol=1e-5)
    assert metrics["reward"].value == 0.75 and metrics["reward_spread"].value == 0.5
    plain, _ = rewards(rows, "none")
    np.testing.assert_array_equal(plain, [1, 0, 1, 1])


def test_a_prompt_that_comes_twice_is_one_group():
    values, metrics = rewards([rollout("1", 0), rollout("1", 0), rollout("2", 1), rollout("2", 0)])
    np.testing.assert_allclose(values, np.array([1, 1, 0, -2]) / 2**0.5, atol=1e-5)
    assert metrics["reward_spread"].weight == 2.0


def test_a_cut_response_is_wrong():
    values, metrics = rewards([rollout("1", 0, finished=False), rollout("1", 0)])
    np.testing.assert_allclose(values, [-1, 1], atol=1e-5)
    assert metrics["reward"].value == 0.5


@pytest.mark.parametrize("normalize", ["group", "none"])
def test_rows_without_an_answer_and_rows_the_student_did_not_write_get_nothing(normalize):
    rows = [rollout("1", 0), rollout("2", 0)]
    more = [rollout("1", 0, origin="reference"), rollout("1", 0, origin="teacher"), rollout("1", 2, None)]
    alone, with_more = rewards(rows, normalize), rewards(rows + more, normalize)
    np.testing.assert_array_equal(with_more[0], [*alone[0], 0, 0, 0])
    assert with_more[1] == alone[1]
    nothing, metrics = rewards(more, normalize)
    assert not any(nothing) and np.isnan(metrics["reward"].value)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"reward": {"scorer": "numeric"}, "objective": {"kind": "sft"}}, "kind=sft does not read it"),
        ({"reward": {"scorer": "numerical"}}, "scorer 'numerical' is unknown; expected one of exact"),
        ({"reward": {}}, "Field required"),
        ({"eval": {"scorer": "nope:f"}}, "scorer 'nope:f' cannot be imported"),
    ],
)
def test_a_reward_that_cannot_be_is_refused(sections, says):
    with pytest.raises(ValueError, match=says):
        RunConfig.model_validate(BASE | sections)
