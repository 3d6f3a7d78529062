"""The projected distribution, against enumeration and against what must hold of any."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill.align import align
from jaxdistill.align.projection import Projector
from jaxdistill.errors import ConfigError, TeacherContractError
from jaxdistill.records import Projection, TeacherScores, TokenSpans, Unscored
from jaxdistill.text import Tokenizer, concatenate

Make = Callable[..., Tokenizer]
Pieces = Callable[[int], Tokenizer]
WORDS = ("Tom", " has", " 12", "3", "\n", "\n\n", "  ", " ", "don't", "(", "(caf", "\u00fcr", "\u4f60\u597d")
TEXT = st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=12).map("".join)
SIZES = list(itertools.product((1, 2, 3), repeat=2))


def listed(found: Projection, row: int) -> dict[int, float]:
    """Probability by student id at one state."""
    known = found.ids[row] >= 0
    pairs = zip(found.ids[row][known].tolist(), np.exp(found.logprobs[row][known]).tolist(), strict=True)
    return dict(pairs)


def projections(world: Any, candidates: int) -> Callable[[str], Projection]:
    projector = Projector(world.student, world.teacher, candidates=candidates)

    def of(text: str) -> Projection:
        response, scores = world.student.encode(text), world.scores(text)
        return projector(response, scores, align(response, scores.response))

    return of


def log_support(world: Any, text: str, row: int) -> float:
    """A student state's mass, counted, beside the teacher's path before the token that holds the state; 0
    where a token of the path begins at it and the path up to there has about that mass."""
    place = int(world.student.encode(text).starts[row])
    starts, path = world.teacher.encode(text).starts, np.cumprod([1.0, *world.path[text]])
    mass = world.by_history[world.mine[text][:row]]
    before = int((starts < place).sum())
    if place in starts and 0.5 <= mass / path[before] <= 2:
        return 0.0
    return min(float(np.log(mass / path[max(before - 1, 0)])), 0.0)


@pytest.mark.parametrize(("student_size", "teacher_size"), SIZES)
def test_what_is_listed_is_what_enumeration_says(
    worlds: ModuleType, pieces: Pieces, student_size: int, teacher_size: int
) -> None:
    """Terms below 1e-4 are left out, each of less than 1e-4 of a state's mass."""
    world = worlds.World(pieces(student_size), pieces(teacher_size), worlds.strings("012", 4), 5)
    of = projections(world, 64)
    others = whole = 0
    for text in world.strings[::3]:
        found, ids = of(text), world.mine[text]
        assert found.mask.all() and not found.floored.any()
        for row, token in enumerate(ids):
            truth, got = world.truth(ids[:row]), listed(found, row)
            np.testing.assert_allclose(found.logprob[row], np.log(truth[token]), atol=4e-4)
            np.testing.assert_allclose(found.log_support[row], log_support(world, text, row), atol=4e-4)
            assert np.isclose(np.log(got.pop(token)), found.logprob[row], atol=1e-6)
            for other, probability in got.items():
                assert abs(probability - truth.get(other, 0.0)) < 4e-4
            others += len(got)
            whole += {*got, token} == {c for c, p in truth.items() if p > 1e-4}
    assert others > 50
    # Before the first byte all is known unless the student's tokens are the longer ones.
    assert whole >= len(world.strings[::3]) or student_size > teacher_size


def test_the_tail_is_what_is_not_listed(worlds: ModuleType, pieces: Pieces) -> None:
    """With single digits against pieces of three, all is known before each number."""
    world = worlds.World(pieces(1), pieces(3), worlds.strings("012", 4), 5)
    all_, two = projections(world, 64), projections(world, 2)
    for text in world.strings[::7]:
        found, few = all_(text), two(text)
        np.testing.assert_allclose(np.exp(found.logprobs[0]).sum(), 1.0, atol=1e-4)
        assert (few.logprob == found.logprob).all()
        for row in range(len(found.mask)):
            kept, everything = listed(few, row), listed(found, row)
            token = world.mine[text][row]
            likeliest = max((p for c, p in everything.items() if c != token), default=0.0)
            assert len(kept) == min(2, len(everything)) and token in kept
            assert kept.items() <= everything.items()
            assert max([p for c, p in kept.items() if c != token], default=0.0) == likeliest


@pytest.mark.parametrize("sizes", SIZES)
def test_the_update_of_projected_credit_is_the_gradient(
    worlds: ModuleType, pieces: Pieces, sizes: tuple[int, int]
) -> None:
    student, teacher = map(pieces, sizes)
    projector = Projector(student, teacher, candidates=4)
    world = worlds.World(student, teacher, worlds.strings("012", 4), 0)
    found = worlds.cosines(world, 100, projector, top_k=[None])
    assert found["projected, all proposals"] >= 0.999
    if sizes[0] == sizes[1]:
        assert min(found.values()) >= 0.999  # one tokenizer: every rule is the textbook's
    else:
        assert max(found[rule] for rule in worlds.RULES) < found["projected, all proposals"]


@pytest.mark.parametrize("sides", [("long", "words"), ("words", "long"), ("long", "letters")])
def test_the_same_where_merges_look_several_tokens_ahead(
    worlds: ModuleType, bpe: Make, sides: tuple[str, str]
) -> None:
    merges = {"long": worlds.LONG, "words": worlds.WORDS, "letters": []}
    student, teacher = (bpe(worlds.SPACED, merges[side]) for side in sides)
    world = worlds.World(student, teacher, worlds.strings("ab ", 4), 3)
    projector = Projector(student, teacher, candidates=4)
    found = worlds.cosines(world, 103, projector, top_k=[None])
    assert found["projected, all proposals"] >= 0.999
    assert all(found[rule] < found["projected, all proposals"] for rule in worlds.RULES)


def made_up(
    random: np.random.Generator, teacher: Tokenizer, response: TokenSpans, width: int, ends: bool
) -> TeacherScores:
    """Any proposals at each position, the response's own token among most of them."""
    ids = random.permuted(np.tile(np.arange(teacher.vocab_size, dtype=np.int32), (len(response), 1)), axis=1)
    ids = ids[:, :width].copy()
    logprobs = np.log(random.dirichlet(np.ones(width), len(response)) * 0.8 + 1e-9).astype(np.float32)
    sampled = np.full(len(response), -4.0, np.float32)
    for row in np.flatnonzero(random.random(len(response)) < 0.7).tolist():
        at = np.flatnonzero(ids[row] == response.ids[row])
        column = int(at[0]) if len(at) else int(random.integers(width))
        ids[row, column] = response.ids[row]
    for row, column in np.argwhere(ids == response.ids[:, None]).tolist():
        sampled[row] = logprobs[row, column]
    order = np.argsort(-logprobs, axis=1)
    end = np.full(len(response) + 1, -5.0, np.float32) if ends else None
    if end is not None and "end_of_turn" in teacher.roles:
        for row, column in np.argwhere(ids == teacher.roles["end_of_turn"]).tolist():
            end[row] = logprobs[row, column]
    return TeacherScores(
        response,
        sampled,
        "t",
        "0",
        np.take_along_axis(ids, order, 1),
        np.take_along_axis(logprobs, order, 1),
        end,
    )


def check(found: Projection, response: TokenSpans, candidates: int) -> None:
    """What the record promises."""
    assert found.ids.shape == found.logprobs.shape == (len(response), candidates)
    assert found.mask.shape == found.logprob.shape == found.floored.shape == (len(response),)
    assert found.log_support.shape == (len(response),) and (found.log_support <= 0).all()
    for row in range(len(response)):
        ids, values = found.ids[row], found.logprobs[row]
        known = ids >= 0
        if not found.mask[row]:
            assert not known.any() and not found.floored[row]
            continue
        assert np.isfinite(found.logprob[row]) and found.logprob[row] <= 0
        assert (np.diff(known.astype(int)) <= 0).all() and np.isneginf(values[~known]).all()
        assert np.isfinite(values[known]).all() and (np.diff(values[known]) <= 0).all()
        assert len(set(ids[known].tolist())) == known.sum()
        assert np.exp(values[known].astype(np.float64)).sum() <= 1 + 1e-6
        assert values[ids == response.ids[row]].tolist() == [found.logprob[row]]


@settings(max_examples=60)
@given(text=TEXT, seed=st.integers(0, 2**32 - 1), ends=st.booleans(), data=st.data())
def test_any_scores_give_what_the_record_promises(
    all_tokenizers: dict[str, Tokenizer], text: str, seed: int, ends: bool, data: st.DataObject
) -> None:
    names = st.sampled_from(sorted(all_tokenizers))
    student, teacher = all_tokenizers[data.draw(names)], all_tokenizers[data.draw(names)]
    cut = data.draw(st.lists(st.integers(0, student.vocab_size - 1), max_size=4))  # not its own cut
    response = concatenate([student.encode(text), student.spans(cut), student.role_span("end_of_turn")])
    one = student.vocab_fingerprint == teacher.vocab_fingerprint
    scored = (
        response if one else concatenate([teacher.encode(response.data), teacher.role_span("end_of_turn")])
    )
    scores = made_up(np.random.default_rng(seed), teacher, scored, 12, ends)
    alignment = align(response, scored)
    few, many = (Projector(student, teacher, candidates=k)(response, scores, alignment) for k in (3, 40))
    check(few, response, 3)
    check(many, response, 40)
    assert few.mask.tolist() == (alignment.student_chunk >= 0).tolist()
    assert (few.logprob == many.logprob).all()
    # More columns never leave more in the tail.
    assert (np.exp(many.logprobs).sum(axis=1) >= np.exp(few.logprobs).sum(axis=1) - 1e-6)[few.mask].all()


@settings(max_examples=40)
@given(text=TEXT, seed=st.integers(0, 2**32 - 1), data=st.data())
def test_one_tokenizer_gives_the_textbook(
    all_tokenizers: dict[str, Tokenizer], text: str, seed: int, data: st.DataObject
) -> None:
    side = all_tokenizers[data.draw(st.sampled_from(sorted(all_tokenizers)))]
    any_ids = data.draw(st.lists(st.integers(0, side.vocab_size - 1), max_size=4))
    response = concatenate([side.encode(text), side.spans(any_ids)])
    if (response.roles == 127).any():
        return
    scores = made_up(np.random.default_rng(seed), side, response, 12, False)
    found = Projector(side, side, candidates=13)(response, scores, align(response, response))
    assert found.mask.all() and not found.floored.any()
    assert not found.log_support.any()  # every state is one of the teacher's own
    assert (found.logprob == scores.logprobs).all()  # bit for bit
    assert scores.topk_ids is not None and scores.topk_logprobs is not None
    for row in range(len(response)):
        wanted = dict(zip(scores.topk_ids[row].tolist(), scores.topk_logprobs[row].tolist(), strict=True))
        wanted[int(response.ids[row])] = float(scores.logprobs[row])
        known = found.ids[row] >= 0
        got = zip(found.ids[row][known].tolist(), found.logprobs[row][known].tolist(), strict=True)
        assert dict(got) == wanted


@settings(max_examples=25)
@given(text=TEXT, seed=st.integers(0, 2**32 - 1), data=st.data())
def test_what_was_asked_before_changes_nothing(
    all_tokenizers: dict[str, Tokenizer], text: str, seed: int, data: st.DataObject
) -> None:
    names = st.sampled_from(sorted(all_tokenizers))
    student, teacher = all_tokenizers[data.draw(names)], all_tokenizers[data.draw(names)]
    used, fresh = (Projector(student, teacher, candidates=6) for _ in range(2))
    for content, projectors in ((data.draw(TEXT), [used]), (text, [used, fresh])):
        response, scored = student.encode(content), teacher.encode(content)
        scores = made_up(np.random.default_rng(seed), teacher, scored, 12, True)
        found = [vars(one(response, scores, align(response, scored))) for one in projectors]
    for name, values in found[0].items():
        assert np.array_equal(values, found[1][name]), name


def test_the_end_of_turn_is_a_token_like_any_other(tokenizers: dict[str, Tokenizer]) -> None:
    student, teacher = tokenizers["llama2"], tokenizers["chatml"]
    projector = Projector(student, teacher, candidates=8)
    response = concatenate([student.encode("Tom has 12"), student.role_span("end_of_turn")])
    scored = concatenate([teacher.encode("Tom has 12"), teacher.role_span("end_of_turn")])
    scores = made_up(np.random.default_rng(0), teacher, scored, 1, False)
    ends = np.full(len(scored) + 1, np.log(0.03), np.float32)
    ends[-2] = scores.logprobs[-1]
    with_ends = replace(scores, end_logprobs=ends)
    assert scores.topk_ids is not None
    scores.topk_ids[:-1] = np.where(
        scores.topk_ids[:-1] == teacher.roles["end_of_turn"], 0, scores.topk_ids[:-1]
    )
    found, without = (projector(response, s, align(response, scored)) for s in (with_ends, scores))
    assert found.mask.all()
    end = student.roles["end_of_turn"]
    starts = set(scored.starts[:-1].tolist())
    at_both = [row for row, start in enumerate(response.starts[:-1].tolist()) if start in starts]
    assert len(at_both) > 2
    for row in at_both:
        assert end not in listed(without, row)
    # Before the first byte all the teacher's mass is there, and the end takes its own share.
    assert np.isclose(listed(found, 0)[end], 0.03, atol=1e-6)
    assert np.isclose(found.logprob[-1], scores.logprobs[-1], atol=1e-4)
    assert int(found.ids[-1, 0]) == end or found.logprobs[-1, 0] > found.logprob[-1]


def test_a_role_the_student_does_not_know_stays_in_the_tail(tokenizers: dict[str, Tokenizer]) -> None:
    student, teacher = tokenizers["llama2"], tokenizers["chatml"]
    assert "think_open" not in student.roles
    response, scored = student.encode("Tom"), teacher.encode("Tom")
    ids = np.asarray([[scored.ids[0], teacher.roles["think_open"]]] * len(scored), np.int32)
    logprobs = np.log(np.full(ids.shape, 0.5, np.float32))
    scores = TeacherScores(scored, logprobs[:, 0], "t", "0", ids, logprobs)
    found = Projector(student, teacher, candidates=8)(response, scores, align(response, scored))
    assert found.mask.all() and np.exp(found.logprobs[0]).sum() <= 0.5 + 1e-6


def test_behind_a_token_read_alike_an_unlikely_one_takes_nothing_away(bpe: Make, worlds: ModuleType) -> None:
    """A teacher with one more token, which is never proposed: what it says behind a token that it hardly
    expected is its own next-token distribution, as with the student's vocabulary. Inside such a token the
    same is a ratio of tiny probabilities."""
    student = bpe(worlds.SPACED, worlds.WORDS)
    teacher = bpe(worlds.SPACED, [*worlds.WORDS, ("z", "z")])
    assert student.vocab_fingerprint != teacher.vocab_fingerprint
    text = "ab ab ab a"
    response, scored = student.encode(text), teacher.encode(text)
    assert response.ids.tolist() == scored.ids.tolist() and len(response) > 2
    logprobs = np.log([1e-5] + [0.5] * (len(scored) - 1)).astype(np.float32)
    scores = TeacherScores(scored, logprobs, "t", "0", scored.ids[:, None], logprobs[:, None])
    found = Projector(student, teacher, candidates=4)(response, scores, align(response, scored))
    assert found.mask.all() and (found.log_support > -1e-3).all()
    np.testing.assert_allclose(found.logprob, logprobs, atol=1e-3)

    letters = bpe(worlds.SPACED, [])
    response = letters.encode(text)
    inside = Projector(letters, teacher, candidates=4)(response, scores, align(response, scored))
    first = len(teacher.token_bytes(scored.ids[:1])[0])
    assert first > 1 and (inside.log_support[1:first] < np.log(1e-4)).all()
    assert (inside.log_support[[0, first]] > -1e-3).all()


def test_a_token_that_nothing_seen_leads_to_has_the_unseen_mass(pieces: Pieces) -> None:
    """The student writes 0|1|= where its own tokenizer writes 01|=: no string of the teacher is cut so."""
    student, teacher = pieces(2), pieces(3)
    response = concatenate([student.encode(text) for text in ("0", "1", "=")])
    scored = teacher.encode("01=")
    for seen, unseen in ((0.9, 0.1), (1.0, 1e-10)):
        sure = np.log(np.full((2, 1), seen, np.float32))
        scores = TeacherScores(scored, sure[:, 0], "t", "0", scored.ids[:, None], sure)
        found = Projector(student, teacher, candidates=4)(response, scores, align(response, scored))
        assert found.mask.all() and found.floored.tolist() == [True, False, False]
        np.testing.assert_allclose(found.logprob[0], np.log(seen * unseen), atol=1e-5)
        # What the teacher does write stands beside it.
        whole = int(student.encode("01").ids[0])
        assert listed(found, 0).keys() == {int(response.ids[0]), whole}
        np.testing.assert_allclose(listed(found, 0)[whole], seen, atol=1e-6)


def test_the_beginning_of_a_character_is_no_token_before_the_character_is_whole(
    bpe: Make, worlds: ModuleType
) -> None:
    """A teacher that writes a character byte by byte proposes the first of them. Which student token begins
    there hangs on the others, unless none of its tokens is longer than that byte."""
    teacher = bpe(worlds.SPACED, [])
    character = "\u9fb0"  # the bytes e9 be b0, which byte-level BPE spells as these letters
    merging, apart = bpe(worlds.SPACED, [("\u00e9", "\u00be")]), bpe(worlds.SPACED, [("z", "z")])
    ids = np.concatenate([teacher.encode("a").ids, teacher.encode(character).ids[:1]])[None]
    logprobs = np.log(np.asarray([[0.4, 0.6]], np.float32))
    for student, others in ((merging, {}), (apart, {int(apart.encode(character).ids[0]): 0.6})):
        response, scored = student.encode("a"), teacher.encode("a")
        scores = TeacherScores(scored, logprobs[:, 0], "t", "0", ids, logprobs)
        found = Projector(student, teacher, candidates=4)(response, scores, align(response, scored))
        wanted = {int(response.ids[0]): 0.4, **others}
        assert listed(found, 0) == pytest.approx(wanted, abs=1e-6)
    # Written out, the character decides.
    response, scored = merging.encode(character), teacher.encode(character)
    assert len(response) == 2 and len(scored) == 3
    path = np.log(np.asarray([[0.6], [0.5], [0.9]], np.float32))
    scores = TeacherScores(scored, path[:, 0], "t", "0", scored.ids[:, None], path)
    found = Projector(merging, teacher, candidates=4)(response, scores, align(response, scored))
    np.testing.assert_allclose(found.logprob, np.log([0.3, 0.9]), atol=1e-5)
    assert listed(found, 0).keys() == {int(response.ids[0])}


def test_nothing_is_listed_beside_a_token_that_takes_all(bpe: Make, worlds: ModuleType) -> None:
    """Half of what is undecided counts before the second space and all behind it: its log p comes out above
    0, and is clipped."""
    space = "\u0120"
    student = bpe(worlds.SPACED, [(space, space)])
    teacher = bpe(worlds.SPACED, [(space, "b"), (space, space)])
    response, scored = student.encode("  b"), teacher.encode("  b")
    ids = np.asarray([[teacher.encode(piece).ids[0] for piece in row] for row in ((" ", "  "), (" b", "b"))])
    logprobs = np.log(np.asarray([[0.15, 0.7], [0.4, 0.4]], np.float32))
    scores = TeacherScores(scored, logprobs[:, 0], "t", "0", ids, logprobs)
    found = Projector(student, teacher, candidates=4)(response, scores, align(response, scored))
    check(found, response, 4)
    assert found.logprob[1] == 0 and listed(found, 1) == {int(response.ids[1]): 1.0}


def test_what_has_no_scores_or_does_not_align_is_masked(tokenizers: dict[str, Tokenizer]) -> None:
    student, teacher = tokenizers["chatml"], tokenizers["llama3"]
    projector = Projector(student, teacher, candidates=5)
    text, nothing = student.encode("Tom has 12"), teacher.encode(b"")
    empty = TeacherScores(nothing, np.zeros(0, np.float32), "t", "0")
    unscored = replace(empty, unscored=Unscored("too_long", "made so"))
    for scores in (empty, unscored):
        found = projector(text, scores, align(text, nothing))
        check(found, text, 5)
        assert not found.mask.any()
    response = concatenate([text, student.encode(b"\xff"), text])
    scored = teacher.encode(text.data + text.data)
    scores = made_up(np.random.default_rng(0), teacher, scored, 8, False)
    found = projector(response, scores, align(response, scored))
    check(found, response, 5)
    assert np.flatnonzero(~found.mask).tolist() == [len(text)]
    none = projector(student.encode(b""), scores, align(student.encode(b""), scored))
    assert none.ids.shape == (0, 5)


def test_what_cannot_be_projected_is_refused(tokenizers: dict[str, Tokenizer]) -> None:
    student, teacher = tokenizers["chatml"], tokenizers["llama3"]
    for side in (student, teacher):
        response, scored = student.encode("Tom"), side.encode("Tom")
        scores = TeacherScores(scored, np.zeros(len(scored), np.float32), "t", "0")
        with pytest.raises(TeacherContractError, match="set teacher"):
            Projector(student, side, candidates=4)(response, scores, align(response, scored))
    with pytest.raises(ConfigError, match="at least 1"):
        Projector(student, teacher, candidates=0)
