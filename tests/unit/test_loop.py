"""What the run says on its own; the runs themselves are in tests/runs."""

import numpy as np
import pytest

from jaxdistill.loop import warn_of_cut
from jaxdistill.records import Prompt, Rollout, TokenSpans


def rollout(size: int, *, finished: bool, origin="student") -> Rollout:
    ids = np.zeros(size, np.int32)
    spans = TokenSpans(ids, b"a" * size, np.arange(1, size + 1), np.zeros(size, np.int8))
    prompt = Prompt([{"role": "user", "content": "hi"}], 0, "test")
    logprobs = np.zeros(size, np.float32)
    return Rollout(prompt, ids[:1], spans, logprobs, finished, 0, vocabulary="a", origin=origin)


def test_a_student_whose_responses_are_all_cut_is_said_so(caplog: pytest.LogCaptureFixture) -> None:
    cut, ended = rollout(3, finished=False), rollout(3, finished=True)
    warn_of_cut(0, [])
    warn_of_cut(0, [cut, ended])
    warn_of_cut(0, [rollout(3, finished=False, origin="reference")])
    assert not caplog.text
    warn_of_cut(7, [cut, rollout(4, finished=False), rollout(2, finished=True, origin="teacher")])
    assert (
        "step 7: none of the student's 2 responses ended by itself, all were cut at "
        "rollout.max_new_tokens=4" in caplog.text
    )
