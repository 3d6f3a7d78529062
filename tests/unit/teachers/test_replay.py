"""What was recorded comes back, and nothing else does."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxdistill.errors import ConfigError, DataError
from jaxdistill.records import TeacherScores, Unscored
from jaxdistill.teachers import ReplayConfig, ReplayTeacher, TeacherIdentity, teacher_views
from jaxdistill.teachers.replay import ScoreRecorder
from jaxdistill.text import Tokenizer


def identity(tokenizer: Tokenizer, canary: float = -1.0) -> TeacherIdentity:
    return TeacherIdentity(
        name="t",
        model="m",
        model_type="qwen3",
        weight_version="default",
        tokenizer=tokenizer.fingerprint,
        tokenizer_checked=True,
        longest=64,
        canary_ids=(1, 2),
        canary=(canary, -2.0),
    )


def scores_of(view, k: int, end: bool, seed: int = 0) -> TeacherScores:
    rng = np.random.default_rng(seed)
    size = len(view[1])
    return TeacherScores(
        view[1],
        -rng.random(size, np.float32),
        "t",
        "default",
        topk_ids=rng.integers(0, 50, (size, k), np.int32) if k else None,
        topk_logprobs=-np.sort(rng.random((size, k), np.float32)) if k else None,
        end_logprobs=-rng.random(size + 1, np.float32) if end else None,
    )


@pytest.fixture
def replay(tokenizer: Tokenizer) -> Callable[..., ReplayTeacher]:
    """`replay(folder, top_k=2)` reads a recording."""

    def make(folder: Path, **config) -> ReplayTeacher:
        return ReplayTeacher(ReplayConfig(path=folder, name="again", **config), tokenizer)

    return make


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    contents=st.lists(st.binary(max_size=20), min_size=1, max_size=5, unique=True),
    k=st.integers(0, 3),
    end=st.booleans(),
)
def test_recorded_scores_come_back_bit_by_bit(tokenizer, rollout, replay, tmp_path_factory, contents, k, end):
    folder = tmp_path_factory.mktemp("scores")
    rollouts = [rollout(content) for content in contents]
    views = teacher_views(tokenizer, rollouts)
    written = [scores_of(view, k, end, seed) for seed, view in enumerate(views)]
    recorder = ScoreRecorder(folder, identity(tokenizer), tolerance=0.1)
    recorder.write(views[:2], written[:2])
    recorder.write(views[2:], written[2:])
    if not any(len(view[1]) for view in views):
        return
    teacher = replay(folder, top_k=k, end_logprobs=end)
    for before, now in zip(written[::-1], teacher.score(rollouts[::-1]), strict=True):
        assert now.unscored is None and now.teacher == "again"
        np.testing.assert_array_equal(now.logprobs, before.logprobs)
        np.testing.assert_array_equal(now.response.ids, before.response.ids)
        if k and len(now.logprobs):
            np.testing.assert_array_equal(now.topk_ids, before.topk_ids)
            np.testing.assert_array_equal(now.topk_logprobs, before.topk_logprobs)
        if end and len(now.logprobs):
            np.testing.assert_array_equal(now.end_logprobs, before.end_logprobs)
    assert teacher.take_counts() == {"not_recorded": 0}


def record(folder: Path, tokenizer: Tokenizer, rollouts, k: int = 2, **changes) -> None:
    views = teacher_views(tokenizer, rollouts)
    recorder = ScoreRecorder(folder, identity(tokenizer), tolerance=0.1)
    scores = [scores_of(view, k, False) for view in views]
    recorder.write(views, scores)


def test_a_response_that_was_not_recorded_is_unscored_and_counted(tokenizer, rollout, replay, tmp_path):
    record(tmp_path, tokenizer, [rollout(b"one"), rollout(b"two")])
    teacher = replay(tmp_path)
    one, other = teacher.score([rollout(b"one"), rollout(b"three")])
    assert one.unscored is None
    assert isinstance(other.unscored, Unscored) and other.unscored.kind == "not_recorded"
    assert len(other.response) == len(other.logprobs) == 0 and "has no scores for" in other.unscored.detail
    assert teacher.take_counts() == {"not_recorded": 1} and teacher.take_counts() == {"not_recorded": 0}


def test_a_truncated_response_comes_back_as_the_beginning_it_was(tokenizer, rollout, replay, tmp_path):
    rows = [rollout(b"a longer response")]
    views = teacher_views(tokenizer, rows)
    short = scores_of((views[0][0], views[0][1].head(3)), 0, False)
    ScoreRecorder(tmp_path, identity(tokenizer), tolerance=0.1).write(views, [short])
    (back,) = replay(tmp_path).score(rows)
    np.testing.assert_array_equal(back.response.ids, views[0][1].ids[:3])
    np.testing.assert_array_equal(back.logprobs, short.logprobs)


def test_fewer_top_entries_than_recorded_are_the_first_ones(tokenizer, rollout, replay, tmp_path):
    record(tmp_path, tokenizer, [rollout(b"one")], k=4)
    (all_four,) = replay(tmp_path, top_k=4).score([rollout(b"one")])
    (first,) = replay(tmp_path, top_k=1).score([rollout(b"one")])
    np.testing.assert_array_equal(first.topk_ids, all_four.topk_ids[:, :1])
    assert replay(tmp_path).score([rollout(b"one")])[0].topk_ids is None


def test_what_was_not_recorded_cannot_be_asked_for(tokenizer, rollout, replay, tmp_path):
    record(tmp_path, tokenizer, [rollout(b"one")], k=2)
    with pytest.raises(ConfigError, match=r"top_k=3, but .* was recorded with 2"):
        replay(tmp_path, top_k=3)
    with pytest.raises(ConfigError, match="recorded without them"):
        replay(tmp_path, end_logprobs=True)


def test_another_teacher_s_folder_is_refused(tokenizer, rollout, replay, tmp_path):
    record(tmp_path, tokenizer, [rollout(b"one")])
    with pytest.raises(ConfigError, match=r"holds another teacher's scores .*canary"):
        ScoreRecorder(tmp_path, identity(tokenizer, canary=-3.0), tolerance=0.1)
    with pytest.raises(ConfigError, match="was recorded with tokenizer"):
        ReplayTeacher(ReplayConfig(path=tmp_path), Tokenizer.load("assets/toy/student"))


def test_recording_goes_on_where_it_stopped_and_the_last_word_counts(tokenizer, rollout, replay, tmp_path):
    record(tmp_path, tokenizer, [rollout(b"one")])
    views = teacher_views(tokenizer, [rollout(b"one")])
    again = scores_of(views[0], 2, False, seed=9)
    ScoreRecorder(tmp_path, identity(tokenizer), tolerance=0.1).write(views, [again])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-000000.parquet", "part-000001.parquet"]
    np.testing.assert_array_equal(replay(tmp_path).score([rollout(b"one")])[0].logprobs, again.logprobs)


def test_a_recording_that_went_on_after_a_restart_of_the_teacher_replays(
    tokenizer, rollout, replay, tmp_path
):
    """A server's canary is not the same to the last bit after a restart."""
    rows = [rollout(f"text {i}") for i in range(6)]
    views = teacher_views(tokenizer, rows)
    for i, canary in enumerate((-1.0, -1.02, -0.99)):
        recorder = ScoreRecorder(tmp_path, identity(tokenizer, canary), tolerance=0.1)
        recorder.write(
            views[2 * i : 2 * i + 2], [scores_of(v, 0, False, i) for v in views[2 * i : 2 * i + 2]]
        )
    assert all(s.unscored is None for s in replay(tmp_path).score(rows))


def test_two_processes_never_write_one_part(tokenizer, rollout, tmp_path):
    view = teacher_views(tokenizer, [rollout("one")])
    first = ScoreRecorder(tmp_path, identity(tokenizer), tolerance=0.1)
    second = ScoreRecorder(tmp_path, identity(tokenizer), tolerance=0.1)
    first.write(view, [scores_of(view[0], 0, False)])
    with pytest.raises(DataError, match="no other process records there"):
        second.write(view, [scores_of(view[0], 0, False)])
    assert [path.name for path in tmp_path.iterdir()] == ["part-000000.parquet"]


def test_no_recording_and_a_broken_one(tokenizer, rollout, replay, tmp_path):
    with pytest.raises(ConfigError, match="holds no recorded scores"):
        replay(tmp_path)
    (tmp_path / "part-000000.parquet").write_bytes(b"half a file")
    with pytest.raises(DataError, match="does not say whose scores"):
        replay(tmp_path)
