"""Teacher masses at student borders, against enumeration and against what must hold of any."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill.align import align
from jaxdistill.align.projection import (
    Borders,
    Bounds,
    Cuts,
    bounds_of,
    masses_of,
    read_ground,
    vocabulary_symbols,
)
from jaxdistill.errors import TeacherContractError
from jaxdistill.records import TeacherScores, TokenSpans
from jaxdistill.text import Tokenizer, concatenate

Make = Callable[..., Tokenizer]
Pieces = Callable[[int], Tokenizer]
WORDS = ("Tom", " has", " 12", "3", "\n", "\n\n", "  ", " ", "don't", "(", "(caf", "\u00fcr", "\u4f60\u597d")
TEXT = st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=12).map("".join)
SPACE = "\u0120"  # as byte-level BPE writes it


Masses = Callable[[TokenSpans, TeacherScores], tuple[Borders, Bounds]]


def masses_for(student: Tokenizer, teacher: Tokenizer) -> Masses:
    """The masses of a response, and what they can be wrong by."""
    vocabulary, cuts = vocabulary_symbols(teacher), Cuts(student, teacher)

    def masses(response: TokenSpans, scores: TeacherScores) -> tuple[Borders, Bounds]:
        ground = read_ground(response, scores, align(response, scores.response), vocabulary, cuts)
        borders = masses_of(ground, cuts)
        return borders, bounds_of(ground, borders, cuts)

    return masses


def true_log_m(world: Any, text: str) -> np.ndarray:
    """The truth behind each student token."""
    ids = world.mine[text]
    return np.log([world.by_history[ids[: index + 1]] for index in range(len(ids))])


@pytest.mark.parametrize(
    ("student_size", "teacher_size"), [(1, 2), (1, 3), (2, 1), (3, 2), (2, 3), (2, 2), (3, 1)]
)
def test_the_masses_are_those_of_enumeration(
    worlds: ModuleType, pieces: Pieces, student_size: int, teacher_size: int
) -> None:
    sides = pieces(student_size), pieces(teacher_size)
    world = worlds.World(*sides, worlds.strings("012", 4), student_size * 10 + teacher_size)
    masses = masses_for(*sides)
    for text in world.strings[::3]:
        response = world.student.encode(text)
        found, _ = masses(response, world.scores(text))
        assert (found.unseen < 1e-6).all()
        truth = true_log_m(world, text)
        np.testing.assert_allclose(found.log_m[found.after], truth, atol=2e-4)
        v = [np.log(world.by_prefix[text[:end]]) for end in response.ends.tolist()]
        np.testing.assert_allclose(found.log_v[found.after], v, atol=1e-5)
        log_p = found.log_m[found.after] - found.log_m[found.before]
        np.testing.assert_allclose(log_p, np.diff(truth, prepend=0.0), atol=4e-4)


MERGES = {
    "spaces": [(SPACE, SPACE), (SPACE * 2, SPACE)],
    "words": [("a", "b"), (SPACE, "a"), (SPACE + "a", "b")],
    "other words": [(SPACE, "b"), ("b", "a"), ("a", "a"), (SPACE, SPACE)],
    "long": [("a", "b"), ("a", "a"), ("aa", "ab"), ("b", "b"), ("ab", "bb")],
    "stealing": [("b", "a"), ("a", "a"), ("a", "b"), ("a", "ba"), (SPACE, SPACE)],
    "none": [],
}


@pytest.mark.parametrize("student", MERGES)
@pytest.mark.parametrize("teacher", MERGES)
def test_the_figures_enclose_the_truth_where_later_bytes_decide(
    worlds: ModuleType, bpe: Make, student: str, teacher: str
) -> None:
    """Spaces that wait for a word, and merges longer than a token of the other side."""
    sides = bpe(worlds.SPACED, MERGES[student]), bpe(worlds.SPACED, MERGES[teacher])
    world = worlds.World(*sides, worlds.strings("ab ", 5), 7)
    masses = masses_for(*sides)
    outside, checked, certain, errors = 0, 0, 0, []
    for text in world.strings[::5]:
        found, bounds = masses(world.student.encode(text), world.scores(text))
        truth = true_log_m(world, text)
        log_m, guessed = found.log_m[found.after], bounds.guessed[found.after]
        assert np.isfinite(log_m).all()
        assert (log_m >= np.log(world.path[text]).sum() - 1e-5).all()
        error = log_m - truth
        # What tokens seen to end before the border could add, from the position that holds it.
        known = bounds.shorter[found.after] == 0
        room = -np.log1p(-np.minimum(guessed, 1 - 1e-12)) + 1e-4
        outside += int((np.abs(error) > room)[known].sum())
        checked += int(known.sum())
        certain += int((guessed < 1e-3).sum())
        errors += np.abs(error).tolist()
    assert checked > 50 and outside <= 0.02 * checked, (outside, checked)
    if student == teacher:  # the textbook rule
        assert max(errors) < 1e-4 and certain == len(errors)


def test_the_figures_of_what_is_not_known(pieces: Pieces) -> None:
    """One response, counted by hand: the student writes 01|2|=, the teacher 012|=."""
    student, teacher = pieces(2), pieces(3)
    ids = {text: int(teacher.encode(text).ids[0]) for text in ("012", "01", "2", "=", "0")}
    topk = np.asarray([[ids["012"], ids["01"], ids["2"]], [ids["="], ids["0"], -1]], np.int32)
    probabilities = np.asarray([[0.5, 0.3, 0.1], [0.6, 0.2, 1e-9]])
    response = teacher.encode("012=")
    sampled = np.log(probabilities[:, 0]).astype(np.float32)
    scores = TeacherScores(response, sampled, "t", "0", topk, np.log(probabilities).astype(np.float32))
    found, bounds = masses_for(student, teacher)(student.encode("012="), scores)
    start, first, second, last = [int(found.before[0]), *found.after.tolist()]
    seen = [start, first, second, last]
    # Behind "01" the teacher may have ended a token: what follows is not known, and "010" is one of its own.
    np.testing.assert_allclose(np.exp(found.log_v)[seen], [1, 0.8, 0.5, 0.5 * 0.6], rtol=1e-6)
    # Behind "2", "0" would be joined to it by the student and "=" is not.
    np.testing.assert_allclose(np.exp(found.log_m)[seen], [1, 0.8, 0.5 * 0.75, 0.3], rtol=1e-6)
    np.testing.assert_allclose(bounds.guessed[seen], [0, 0.3 / 0.8, 0, 0], atol=1e-6)
    np.testing.assert_allclose(found.unseen[seen], [0, 0.1, 0.1, 0.2], atol=1e-6)
    np.testing.assert_allclose(bounds.shorter[seen], [0, 0, 0.3, 0], atol=1e-6)


def test_a_cut_the_student_would_not_make_has_no_mass(pieces: Pieces) -> None:
    """One token of the teacher over what the student writes in two, though its own tokenizer writes one."""
    student, teacher = pieces(2), pieces(3)
    written = concatenate([student.encode(text) for text in ("0", "1", "=")])
    response = teacher.encode("01=")
    sure = np.log(np.full((2, 1), 0.9, np.float32))
    scores = TeacherScores(response, sure[:, 0], "t", "0", response.ids[:, None], sure)
    found, bounds = masses_for(student, teacher)(written, scores)
    log_m = found.log_m[found.after]
    assert np.isneginf(log_m[0]) and np.isfinite(log_m[1:]).all()
    assert np.isfinite(found.log_v).all() and bounds.guessed[found.after[0]] == 0


def test_a_response_may_be_longer_than_the_whole_vocabulary(pieces: Pieces) -> None:
    student, teacher = pieces(1), pieces(2)
    response, scored = student.encode("01" * 2_000), teacher.encode("01" * 2_000)
    sure = np.full((len(scored), 1), -1e-3, np.float32)
    scores = TeacherScores(scored, sure[:, 0], "t", "0", scored.ids[:, None], sure)
    found, _ = masses_for(student, teacher)(response, scores)
    np.testing.assert_allclose(found.log_m[found.after[1::2]], np.cumsum(sure[:, 0], dtype=np.float64))


def test_terms_too_small_to_ask_are_counted_as_guesses(pieces: Pieces) -> None:
    student, teacher = pieces(2), pieces(1)
    response = teacher.encode("0=")
    zero, one = (int(teacher.encode(digit).ids[0]) for digit in "01")
    equals = int(response.ids[1])
    for small, guessed, log_m in ((1e-6, 1e-6, 0.0), (1e-3, 0.0, -1e-3)):
        probabilities = np.asarray([[1.0, 1e-9], [1 - small, small]])
        scores = TeacherScores(
            response,
            np.log(probabilities[:, 0]).astype(np.float32),
            "t",
            "0",
            np.asarray([[zero, one], [equals, one]], np.int32),
            np.log(probabilities).astype(np.float32),
        )
        found, bounds = masses_for(student, teacher)(student.encode("0="), scores)
        np.testing.assert_allclose(bounds.guessed[found.after[0]], guessed, atol=1e-7)
        np.testing.assert_allclose(found.log_m[found.after[0]], log_m, atol=1e-6)


def random_scores(
    random: np.random.Generator, teacher: Tokenizer, response: TokenSpans, width: int, share: float
) -> TeacherScores:
    """Top-k of `share` in all at each position, the response's own token among them at random."""
    ids = random.permuted(np.tile(np.arange(teacher.vocab_size, dtype=np.int32), (len(response), 1)), axis=1)[
        :, :width
    ]
    probabilities = random.dirichlet(np.ones(width), len(response)) * share
    own = np.where(random.random(len(response)) < 0.5, random.integers(width, size=len(response)), -1)
    sampled = np.full(len(response), 0.5 * (1 - share) + 1e-6)
    for row, column in enumerate(own.tolist()):
        found = np.flatnonzero(ids[row] == response.ids[row])
        if column >= 0 and not len(found):
            ids[row, column] = response.ids[row]
            found = np.asarray([column])
        if len(found):
            sampled[row] = probabilities[row, found[0]]
    return TeacherScores(
        response, np.log(sampled).astype(np.float32), "t", "0", ids, np.log(probabilities).astype(np.float32)
    )


@settings(max_examples=40)
@given(text=TEXT, seed=st.integers(0, 2**32 - 1), data=st.data())
def test_v_never_grows_and_m_is_between_the_path_and_v(
    all_tokenizers: dict[str, Tokenizer], text: str, seed: int, data: st.DataObject
) -> None:
    names = st.sampled_from(sorted(all_tokenizers))
    student, teacher = all_tokenizers[data.draw(names)], all_tokenizers[data.draw(names)]
    ends = [side.role_span("end_of_turn") for side in (student, teacher)]
    response = concatenate([student.encode(text), ends[0]])
    scored = concatenate([teacher.encode(text), ends[1]])
    scores = random_scores(np.random.default_rng(seed), teacher, scored, 16, 0.9)
    found, bounds = masses_for(student, teacher)(response, scores)
    order = found.after
    assert (order >= 0).all() and found.before[0] == 0 and found.log_m[0] == 0
    assert (found.before[1:] == found.after[:-1]).all()
    path = np.concatenate([[0.0], found.log_v[order]])
    assert np.isfinite(path).all() and (np.diff(path) <= 1e-6).all() and path.max() <= 0
    assert (found.log_m[order] <= found.log_v[order] + 1e-9).all()
    assert (found.log_m[order] >= scores.logprobs.sum(dtype=np.float64) - 1e-6).all()
    for share in (found.unseen, bounds.shorter, bounds.guessed):
        assert ((share >= 0) & (share <= 1)).all()
    # The whole response, with its end, is one path: its mass is the path's own probability.
    np.testing.assert_allclose(found.log_m[order[-1]], scores.logprobs.sum(dtype=np.float64), atol=1e-6)


def test_what_is_not_aligned_has_no_border(tokenizers: dict[str, Tokenizer]) -> None:
    student, teacher = tokenizers["chatml"], tokenizers["llama3"]
    text = b"Tom has 12 apples"
    stray = student.encode(b"\xff")
    response = concatenate([student.encode(text), stray, student.encode(text)])
    scored = teacher.encode(text + text)
    scores = random_scores(np.random.default_rng(0), teacher, scored, 8, 0.9)
    masses = masses_for(student, teacher)
    found, _ = masses(response, scores)
    lost = len(student.encode(text))
    assert found.before[lost] == found.after[lost] == -1
    assert (np.delete(found.before, lost) >= 0).all()
    # Both sides of the stray byte are the same place for the teacher.
    assert found.log_v[found.after[lost - 1]] == found.log_v[found.before[lost + 1]]
    nothing = teacher.encode(b"")
    empty = TeacherScores(
        nothing, np.zeros(0, np.float32), "t", "0", np.zeros((0, 4), np.int32), np.zeros((0, 4), np.float32)
    )
    none, bounds = masses(nothing, empty)
    assert len(none.log_v) == len(none.log_m) == len(bounds.guessed) == len(bounds.shorter) == 0


def test_a_teacher_without_top_k_is_refused(tokenizers: dict[str, Tokenizer]) -> None:
    side = tokenizers["chatml"]
    spans = side.encode("Tom")
    scores = TeacherScores(spans, np.zeros(len(spans), np.float32), "t", "0")
    with pytest.raises(TeacherContractError, match="top-k"):
        masses_for(side, side)(spans, scores)
