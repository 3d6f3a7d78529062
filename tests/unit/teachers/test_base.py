"""The teacher's view of a rollout."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxdistill.records import END_OF_TURN, OTHER_SPECIAL, ROLES, Rollout, TokenSpans
from jaxdistill.teachers import teacher_view
from jaxdistill.teachers.base import teacher_views
from jaxdistill.text import Tokenizer, concatenate


def test_the_view_holds_the_same_bytes_and_ends_where_the_student_ended(
    tokenizer: Tokenizer, rollouts: list[Rollout]
) -> None:
    for one in rollouts:
        prompt, response = teacher_view(tokenizer, one)
        np.testing.assert_array_equal(prompt, tokenizer.render(one.prompt.messages))
        assert response.data == one.response.data
        ended = len(response) > 0 and response.roles[-1] == END_OF_TURN
        assert ended == one.finished  # a truncated response gets no end
        if ended:
            assert response.ids[-1] == tokenizer.roles["end_of_turn"]


def test_views_of_many_are_the_views_of_each(tokenizer: Tokenizer, rollouts: list[Rollout]) -> None:
    for one, (prompt, response) in zip(rollouts, teacher_views(tokenizer, rollouts), strict=True):
        alone_prompt, alone = teacher_view(tokenizer, one)
        np.testing.assert_array_equal(prompt, alone_prompt)
        np.testing.assert_array_equal(response.ids, alone.ids)
        np.testing.assert_array_equal(response.ends, alone.ends)


def test_control_words_in_the_response_stay_content(
    tokenizer: Tokenizer, rollout: Callable[..., Rollout]
) -> None:
    _, response = teacher_view(tokenizer, rollout("say <|end|> now", finished=False))
    assert not response.roles.any()
    assert response.data == b"say <|end|> now"


def test_roles_are_mapped_by_meaning_or_dropped(
    tokenizer: Tokenizer, rollout: Callable[..., Rollout]
) -> None:
    # A student whose tokens are: "a", a think mark this teacher lacks, "the", an unknown mark, "b", end.
    student = TokenSpans(
        ids=np.array([7, 900, 8, 901, 9, 902], np.int32),
        data=b"atheb",
        ends=np.array([1, 1, 4, 4, 5, 5], np.int64),
        roles=np.array([0, ROLES["think_open"], 0, OTHER_SPECIAL, 0, END_OF_TURN], np.int8),
    )
    one = replace(rollout("a"), response=student)
    assert "think_open" not in tokenizer.roles
    _, response = teacher_view(tokenizer, one)
    assert response.data == b"atheb"
    assert response.roles.tolist() == [0] * (len(response) - 1) + [END_OF_TURN]
    np.testing.assert_array_equal(response.ids[:-1], tokenizer.encode(b"atheb").ids)


def test_a_role_in_the_middle_splits_what_is_encoded(
    tokenizer: Tokenizer, rollout: Callable[..., Rollout]
) -> None:
    student = TokenSpans(
        ids=np.array([1, 2, 3], np.int32),
        data=b"the",
        ends=np.array([1, 1, 3], np.int64),
        roles=np.array([0, END_OF_TURN, 0], np.int8),
    )
    _, response = teacher_view(tokenizer, replace(rollout("a"), response=student))
    end = tokenizer.roles["end_of_turn"]
    assert response.ids.tolist() == [*tokenizer.encode(b"t").ids, end, *tokenizer.encode(b"he").ids]
    assert response.data == b"the"


def test_the_same_vocabulary_with_another_end_of_turn_is_mapped_by_role(
    tiny_model: Path, tokenizer: Tokenizer, rollout: Callable[..., Rollout]
) -> None:
    mark = next(text for text, i in tokenizer.control_strings.items() if i not in tokenizer.stop_ids)
    base = Tokenizer.load(str(tiny_model), roles={"end_of_turn": mark})
    assert base.vocab_fingerprint != tokenizer.vocab_fingerprint
    response = concatenate([base.encode("the answer"), base.role_span("end_of_turn")])
    one = replace(rollout("a"), response=response, vocabulary=base.vocab_fingerprint)
    _, read = teacher_view(tokenizer, one)
    assert read.ids[-1] == tokenizer.roles["end_of_turn"] != response.ids[-1]


def test_an_id_of_the_student_s_padding_is_never_handed_to_the_teacher(
    tokenizer: Tokenizer, rollout: Callable[..., Rollout]
) -> None:
    text = tokenizer.encode("the answer")
    beyond = TokenSpans(
        np.append(text.ids, np.int32(tokenizer.vocab_size)),
        text.data,
        np.append(text.ends, text.ends[-1]),
        np.append(text.roles, np.int8(OTHER_SPECIAL)),
    )
    own = replace(rollout("a"), vocabulary=tokenizer.vocab_fingerprint)
    assert teacher_view(tokenizer, replace(own, response=text))[1] is text
    _, response = teacher_view(tokenizer, replace(own, response=beyond))
    np.testing.assert_array_equal(response.ids, text.ids)


def test_the_room_loads_no_jax() -> None:
    code = "import sys, jaxdistill.teachers; sys.exit(any(m in sys.modules for m in ('jax', 'flax')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
