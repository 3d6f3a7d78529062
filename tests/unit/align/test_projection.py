"""Teacher proposals in student coordinates, each against a brute force."""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from jaxdistill.align import align
from jaxdistill.align.projection import (
    BEYOND,
    DIFFERS,
    INSIDE,
    Cuts,
    agree,
    border_masses,
    load_segmentation,
    segment_vocabulary,
    symbols_of,
    vocabulary_symbols,
)
from jaxdistill.errors import TeacherContractError
from jaxdistill.records import OTHER_SPECIAL, ROLES, TeacherScores, TokenSpans
from jaxdistill.text import Tokenizer, concatenate

Make = Callable[[Sequence[bytes | int]], TokenSpans]
TOY = Path(__file__).parents[3] / "assets" / "toy"
WORDS = (
    "Tom", " has", " 12", "3", "45", " apples", ",", " and", "\n", "\n\n", "  ", " ", "\t", "don't", "'tab",
    "(", "((abc", "x1", "1a", "def", " first", "HELLOworld", "...", "\r\n",
    "\u00fc", "\u4f60\u597d", "\uff0c", " \u2248", "e\u0301",
)  # fmt: skip
TEXT = st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=12).map("".join)


@pytest.fixture(scope="session")
def all_tokenizers(tokenizers: dict[str, Tokenizer]) -> dict[str, Tokenizer]:
    """A small tokenizer of each family, and the toy pair."""
    return {**tokenizers, **{side: Tokenizer.load(str(TOY / side)) for side in ("student", "teacher")}}


def token_symbols(spans: TokenSpans, index: int) -> list[object]:
    """What one token stands for: its bytes, or who it is."""
    role = int(spans.roles[index])
    if role:
        return [("special", int(spans.ids[index])) if role == OTHER_SPECIAL else ("role", role)]
    return list(spans.data[spans.starts[index] : spans.ends[index]])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_agreement_is_the_longest_common_prefix(
    all_tokenizers: dict[str, Tokenizer], data: st.DataObject
) -> None:
    teacher = all_tokenizers[data.draw(st.sampled_from(sorted(all_tokenizers)))]
    any_id = st.integers(0, teacher.vocab_size - 1)
    text = teacher.encode(data.draw(TEXT)).ids.tolist()
    response = teacher.spans(text + data.draw(st.lists(any_id, max_size=5)))
    usual = st.sampled_from([*response.ids.tolist(), -1]) | any_id
    row, count = st.lists(usual, min_size=3, max_size=3), len(response)
    rows = data.draw(st.lists(row, min_size=count, max_size=count))
    proposed = np.asarray(rows, np.int32).reshape(count, 3)
    found = agree(vocabulary_symbols(teacher), proposed, symbols_of(response))
    whole = [token_symbols(response, index) for index in range(len(response))]
    for j, k in itertools.product(range(len(response)), range(3)):
        rest = list(itertools.chain(*whole[j:]))
        mine = token_symbols(teacher.spans([int(proposed[j, k])]), 0) if proposed[j, k] >= 0 else []
        prefix = sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(mine, rest, strict=False))
        )
        relation = DIFFERS
        if mine and prefix == len(mine):
            relation = INSIDE
        elif mine and prefix == len(rest):
            relation = BEYOND
        assert (found.agreed[j, k], found.relation[j, k]) == (prefix, relation)


def test_roles_agree_by_meaning_and_other_special_tokens_with_themselves(
    tokenizers: dict[str, Tokenizer],
) -> None:
    teacher = tokenizers["llama3"]
    end, header = (
        teacher.roles["end_of_turn"],
        next(i for i in teacher.control if i not in teacher.roles.values()),
    )
    response = teacher.spans([end, header])
    proposed = np.asarray([[end, header, -1], [end, header, 5]], np.int32)
    found = agree(vocabulary_symbols(teacher), proposed, symbols_of(response))
    assert found.agreed.tolist() == [[1, 0, 0], [0, 1, 0]]
    assert found.relation.tolist() == [[INSIDE, DIFFERS, DIFFERS], [DIFFERS, INSIDE, DIFFERS]]
    with pytest.raises(TeacherContractError, match="its vocabulary has"):
        agree(
            vocabulary_symbols(teacher), np.full((2, 1), teacher.vocab_size, np.int32), symbols_of(response)
        )


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_cuts_are_what_encoding_the_whole_says(
    all_tokenizers: dict[str, Tokenizer], data: st.DataObject
) -> None:
    names = st.sampled_from(sorted(all_tokenizers))
    student, teacher = all_tokenizers[data.draw(names)], all_tokenizers[data.draw(names)]
    response = student.encode(data.draw(TEXT))
    cuts = Cuts(student, teacher)
    contexts = cuts.contexts(response)
    likely = teacher.encode(data.draw(TEXT)).ids.tolist()
    tokens = data.draw(
        st.lists(
            st.sampled_from([0, *likely]) | st.integers(0, teacher.vocab_size - 1), min_size=1, max_size=8
        )
    )
    lengths = [len(piece) for piece in teacher.token_bytes(tokens)]
    questions = [
        (b, t, o)
        for b in range(len(response) + 1)
        for t, n in zip(tokens, lengths, strict=True)
        for o in range(n + 1)
    ]
    borders, ids, offsets = (np.asarray(column) for column in zip(*questions, strict=True))
    for _ in range(2):  # the second time from what is remembered
        answers = cuts.at(contexts[borders], ids.astype(np.int32), offsets.astype(np.int64))
        for answer, (border, token, offset) in zip(answers, questions, strict=True):
            before = response.data[: int(response.ends[border - 1])] if border else b""
            after = teacher.token_bytes([token])[0][offset:]
            whole = student.encode(before + after)
            wanted = not after or not before or len(before) in whole.ends
            assert answer == wanted, (before, after)


def test_a_role_token_is_always_a_boundary(tokenizers: dict[str, Tokenizer]) -> None:
    student = tokenizers["chatml"]
    parts = [student.encode("Tom ha"), student.role_span("think_close"), student.encode("s 12")]
    response = concatenate(parts)
    cuts = Cuts(student, student)
    contexts = cuts.contexts(response)
    assert contexts[0] == 0 and contexts[len(parts[0]) + 1] == 0 and contexts[len(parts[0])] != 0
    end = np.full(len(contexts), student.roles["end_of_turn"], np.int32)
    assert cuts.at(contexts, end, np.zeros(len(contexts), np.int64)).all()


def test_forgetting_changes_no_answer(tokenizers: dict[str, Tokenizer]) -> None:
    student, teacher = tokenizers["llama3"], tokenizers["chatml"]
    small, large = Cuts(student, teacher, limit=3), Cuts(student, teacher)
    for text in ("Tom has 12 apples", "The answer is 100", "Tom has 12 apples"):
        response = student.encode(text)
        tokens = np.arange(len(response) + 1, dtype=np.int32) * 7 % 300
        zeros = np.zeros(len(tokens), np.int64)
        first, second = (cuts.at(cuts.contexts(response), tokens, zeros) for cuts in (small, large))
        assert first.tolist() == second.tolist()


def test_the_segmentation_holds_every_teacher_token(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    student, teacher = tokenizers["llama2"], tokenizers["chatml"]
    table = segment_vocabulary(student, teacher)
    assert table.of(teacher.roles["end_of_turn"]).tolist() == [student.roles["end_of_turn"]]
    assert table.of(teacher.roles["think_open"]).tolist() == []
    for index, piece in enumerate(teacher.token_bytes(np.arange(teacher.vocab_size, dtype=np.int32))):
        if piece:
            assert table.of(index).tolist() == student.encode(piece).ids.tolist()
    for _ in range(2):
        stored = load_segmentation(student, teacher, tmp_path / "cache")
        assert np.array_equal(stored.ids, table.ids) and np.array_equal(stored.starts, table.starts)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:100])  # cut off by a full disk
    assert np.array_equal(load_segmentation(student, teacher, tmp_path / "cache").ids, table.ids)


# A world small enough to count: strings of up to four digits 0-2 and then "=". Each side writes numbers in
# pieces of its own size from the left, and the teacher is a table over its own segmentations.
STRINGS = ["".join(p) + "=" for n in range(5) for p in itertools.product("012", repeat=n)]


def pieces_tokenizer(folder: Path, size: int) -> Tokenizer:
    """Byte-level BPE that cuts digit runs from the left into pieces of at most `size` digits."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    runs = ["".join(p) for n in range(2, size + 1) for p in itertools.product("012", repeat=n)]
    vocabulary = {piece: index for index, piece in enumerate([*letters, *runs])}
    # Every way of putting a run together, so that a whole run is always one piece.
    merges = [(run[:at], run[at:]) for run in runs for at in range(1, len(run))]
    raw = RawTokenizer(models.BPE(vocab=vocabulary, merges=merges))
    split = pre_tokenizers.Split(Regex(rf"[0-9]{{1,{size}}}|[^0-9]+"), "isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    raw.decoder = decoders.ByteLevel()
    folder.mkdir(parents=True)
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({}))
    return Tokenizer.load(str(folder))


def teacher_table(random: np.random.Generator, teacher: Tokenizer) -> dict[tuple[int, ...], dict[int, float]]:
    """Next-token probabilities after each history of canonical segmentations."""
    after: dict[tuple[int, ...], set[int]] = {}
    for text in STRINGS:
        ids = tuple(teacher.encode(text).ids.tolist())
        for index in range(len(ids)):
            after.setdefault(ids[:index], set()).add(ids[index])
    table = {}
    for history, choices in after.items():
        weights = np.exp(2 * random.normal(size=len(choices)))
        table[history] = dict(zip(sorted(choices), (weights / weights.sum()).tolist(), strict=True))
    return table


@pytest.mark.parametrize(
    ("student_size", "teacher_size"), [(1, 2), (1, 3), (2, 1), (3, 2), (2, 3), (2, 2), (3, 1)]
)
def test_the_masses_are_those_of_enumeration(tmp_path: Path, student_size: int, teacher_size: int) -> None:
    student = pieces_tokenizer(tmp_path / "student", student_size)
    teacher = pieces_tokenizer(tmp_path / "teacher", teacher_size)
    table = teacher_table(np.random.default_rng(student_size * 10 + teacher_size), teacher)
    mine = {text: tuple(student.encode(text).ids.tolist()) for text in STRINGS}
    theirs = {text: tuple(teacher.encode(text).ids.tolist()) for text in STRINGS}
    path = {t: [table[ids[:i]][ids[i]] for i in range(len(ids))] for t, ids in theirs.items()}
    by_history: dict[tuple[int, ...], float] = {}
    by_prefix: dict[str, float] = {}
    for text in STRINGS:
        probability = float(np.prod(path[text]))
        for index in range(len(mine[text]) + 1):
            by_history[mine[text][:index]] = by_history.get(mine[text][:index], 0.0) + probability
        for index in range(len(text) + 1):
            by_prefix[text[:index]] = by_prefix.get(text[:index], 0.0) + probability
    cuts, vocabulary = Cuts(student, teacher), vocabulary_symbols(teacher)
    width = max(len(choices) for choices in table.values())
    for text in STRINGS[::3]:
        response, scored = student.encode(text), teacher.encode(text)
        ids = np.full((len(scored), width), -1, np.int32)
        logprobs = np.full((len(scored), width), -np.inf, np.float32)
        for index in range(len(scored)):
            choices = table[theirs[text][:index]]
            ids[index, : len(choices)] = list(choices)
            logprobs[index, : len(choices)] = np.log(list(choices.values()))
        scores = TeacherScores(scored, np.log(path[text]).astype(np.float32), "t", "0", ids, logprobs)
        found = border_masses(response, scores, align(response, scored), vocabulary, cuts)
        assert (found.unseen < 1e-6).all()
        for index in range(len(response)):
            history = mine[text][: index + 1]
            np.testing.assert_allclose(
                found.log_m[found.after[index]], np.log(by_history[history]), atol=1e-5
            )
            prefix = text[: int(response.ends[index])]
            np.testing.assert_allclose(found.log_v[found.after[index]], np.log(by_prefix[prefix]), atol=1e-5)
            exact = np.log(by_history[history] / by_history[history[:-1]])
            got = found.log_m[found.after[index]] - found.log_m[found.before[index]]
            np.testing.assert_allclose(got, exact, atol=1e-5)


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


@settings(max_examples=40, deadline=None)
@given(text=TEXT, seed=st.integers(0, 2**32 - 1), data=st.data())
def test_v_never_grows_and_m_never_exceeds_it(
    all_tokenizers: dict[str, Tokenizer], text: str, seed: int, data: st.DataObject
) -> None:
    names = st.sampled_from(sorted(all_tokenizers))
    student, teacher = all_tokenizers[data.draw(names)], all_tokenizers[data.draw(names)]
    ends = [side.role_span("end_of_turn") for side in (student, teacher)]
    response = concatenate([student.encode(text), ends[0]])
    scored = concatenate([teacher.encode(text), ends[1]])
    scores = random_scores(np.random.default_rng(seed), teacher, scored, 16, 0.9)
    found = border_masses(
        response, scores, align(response, scored), vocabulary_symbols(teacher), Cuts(student, teacher)
    )
    order = found.after
    assert (order >= 0).all() and found.before[0] == 0 and found.log_m[0] == 0
    assert (found.before[1:] == found.after[:-1]).all()
    path = np.concatenate([[0.0], found.log_v[order]])
    assert np.isfinite(path).all() and (np.diff(path) <= 1e-6).all() and path.max() <= 0
    assert (found.log_m[order] <= found.log_v[order] + 1e-9).all()
    assert ((found.unseen >= 0) & (found.unseen <= 1)).all() and (
        (found.guessed >= 0) & (found.guessed <= 1)
    ).all()
    # The whole response, with its end, is one path: its mass is the path's own probability.
    np.testing.assert_allclose(found.log_m[order[-1]], scores.logprobs.sum(dtype=np.float64), atol=1e-6)


def test_what_is_not_aligned_has_no_border(spans_of: Make, tokenizers: dict[str, Tokenizer]) -> None:
    student, teacher = tokenizers["chatml"], tokenizers["llama3"]
    text = b"Tom has 12 apples"
    stray = student.encode(b"\xff")
    response = concatenate([student.encode(text), stray, student.encode(text)])
    scored = teacher.encode(text + text)
    scores = random_scores(np.random.default_rng(0), teacher, scored, 8, 0.9)
    found = border_masses(
        response, scores, align(response, scored), vocabulary_symbols(teacher), Cuts(student, teacher)
    )
    lost = len(student.encode(text))
    assert found.before[lost] == found.after[lost] == -1
    assert (np.delete(found.before, lost) >= 0).all()
    # Both sides of the stray byte are the same place for the teacher.
    assert found.log_v[found.after[lost - 1]] == found.log_v[found.before[lost + 1]]
    nothing = teacher.encode(b"")
    empty = TeacherScores(
        nothing, np.zeros(0, np.float32), "t", "0", np.zeros((0, 4), np.int32), np.zeros((0, 4), np.float32)
    )
    none = border_masses(
        nothing, empty, align(nothing, nothing), vocabulary_symbols(teacher), Cuts(student, teacher)
    )
    assert len(none.log_v) == 0


def test_a_teacher_without_top_k_is_refused(tokenizers: dict[str, Tokenizer]) -> None:
    side = tokenizers["chatml"]
    spans = side.encode("Tom")
    scores = TeacherScores(spans, np.zeros(len(spans), np.float32), "t", "0")
    with pytest.raises(TeacherContractError, match="top-k"):
        border_masses(spans, scores, align(spans, spans), vocabulary_symbols(side), Cuts(side, side))


def test_role_numbers_stay_below_those_of_special_tokens() -> None:
    assert max(ROLES.values()) < OTHER_SPECIAL < 256
