"""The child process: it scores, it ends with its parent however that ends, its last words are kept."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from jaxdistill.errors import ConfigError, TeacherUnavailable
from jaxdistill.records import Rollout
from jaxdistill.teachers import EmbeddedConfig, EmbeddedTeacher, build
from jaxdistill.text import Tokenizer

PARENT = """
import sys, time
from jaxdistill.teachers import EmbeddedConfig, build
config = EmbeddedConfig(model=sys.argv[1])
teacher = build(config, config.load_tokenizer())
print(teacher.pid, flush=True)
time.sleep(600)
"""


def gone(pid: int, within_s: float) -> bool:
    """Whether process `pid` ends in time; a zombie has ended."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def teacher(tiny_model: Path, tokenizer: Tokenizer) -> Iterator[EmbeddedTeacher]:
    built = build(EmbeddedConfig(model=str(tiny_model)), tokenizer)
    assert isinstance(built, EmbeddedTeacher)
    yield built
    built.close()
    assert gone(built.pid, 0.1)
    built.close()  # does nothing


def test_it_scores_like_a_server_started_by_hand(
    teacher: EmbeddedTeacher, rollouts: Sequence[Rollout], tiny_model: Path
) -> None:
    from jaxdistill.serving.model import load_engine
    from jaxdistill.serving.requests import parse_generate
    from jaxdistill.teachers.base import teacher_view
    from jaxdistill.teachers.checks import ScoringRow, scoring_request

    engine, _ = load_engine(tiny_model, max_batch_tokens=8192, context_length=None)
    scores = teacher.score(rollouts)
    for one, score in zip(rollouts, scores, strict=True):
        prompt, response = teacher_view(teacher.tokenizer, one)
        request = scoring_request([ScoringRow(0, prompt, response.ids)])
        statistics = engine.run(parse_generate(request, engine.limits, frozenset())[0])[0].statistics
        assert statistics is not None
        np.testing.assert_allclose(score.logprobs, statistics.logprob[:-1], rtol=0, atol=1e-4)
    assert teacher.check().model == str(tiny_model)


def test_the_same_request_has_the_same_bits(teacher: EmbeddedTeacher, rollouts: Sequence[Rollout]) -> None:
    """The canary in each request depends on that request alone, and not on what else waits."""
    first, again = teacher.score(rollouts), teacher.score(rollouts)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.logprobs, other.logprobs)
    counts = teacher.take_counts()
    assert counts["requests"] >= 2 and counts["retries"] == counts["hedges"] == counts["bad_reply"] == 0
    assert teacher.check() == teacher.check() == teacher.identity
    assert teacher.identity.tokenizer_checked
    assert teacher.take_counts()["requests"] == 0  # the questions of a check are not scoring


def test_a_child_that_dies_is_unavailable_at_once_with_its_log(
    tiny_model: Path, tokenizer: Tokenizer, rollouts: Sequence[Rollout]
) -> None:
    teacher = build(EmbeddedConfig(model=str(tiny_model), attempts=50, backoff_s=5.0), tokenizer)
    assert isinstance(teacher, EmbeddedTeacher)
    os.kill(teacher.pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(TeacherUnavailable, match=r"ended with exit code -9; end of its log"):
        teacher.score(rollouts)
    assert time.monotonic() - began < 10
    teacher.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_child_ends_when_its_parent_does(tiny_model: Path, number: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tiny_model)], stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert not gone(child, 0.2)
        parent.send_signal(number)
        parent.wait()
        assert gone(child, 5.0)


def test_a_missing_model_folder_is_a_config_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model at"):
        build(EmbeddedConfig(model=str(tmp_path / "nowhere")), tokenizer)


def test_a_model_that_cannot_be_served_is_a_config_error_in_the_childs_words(
    tiny_model: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(ConfigError, match="model_type is 'mamba'"):
        build(EmbeddedConfig(model=str(folder)), tokenizer)


def test_a_start_that_takes_too_long_is_unavailable(tiny_model: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(TeacherUnavailable, match=r"did not listen within 0\.05 s"):
        build(EmbeddedConfig(model=str(tiny_model), start_timeout_s=0.05), tokenizer)


def test_a_fork_of_the_parent_does_not_keep_the_child(tiny_model: Path) -> None:
    forking = PARENT.replace("time.sleep(600)", "import os; os.fork(); time.sleep(20)")
    parent = subprocess.Popen(
        [sys.executable, "-c", forking, str(tiny_model)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.2)
    parent.kill()
    parent.wait()
    assert gone(child, 5.0)
    parent.stdout.close()
