"""Where the student cuts when a teacher token follows, against encoding everything anew."""

import time
from collections.abc import Callable

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill.align.projection import Cuts
from jaxdistill.align.projection.memory import Memory
from jaxdistill.records import TokenSpans
from jaxdistill.text import Tokenizer, concatenate

Make = Callable[..., Tokenizer]
WORDS = (
    "Tom", " has", " 12", "3", "45", " apples", ",", " and", "\n", "\n\n", "  ", " ", "\t", "don't", "'tab",
    "(", "((abc", "x1", "1a", "def", " first", "HELLOworld", "...", "\r\n", "(caf", "!na",
    "\u00fc", "\u00fcr", "\u00efve", "\u4f60\u597d", "\uff0c", " \u2248", "e\u0301",
)  # fmt: skip
TEXT = st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=12).map("".join)
# A sign and the ASCII letters behind it are one match, as in DeepSeek-V3; the last space of a run goes to the
# word behind it, as nearly everywhere.
SIGNED = r"[!-/][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?\p{L}+| ?[\p{P}\p{S}]+|\s+(?!\S)|\s+"
CONTRACTED = r"'(?:re|s)|[^\s\p{L}]?\p{L}+|\s+"
SPACED = r" ?\S+|\s+(?!\S)|\s+"
SPACE = "\u0120"  # as byte-level BPE writes it


def keeps(student: Tokenizer, response: TokenSpans, border: int, after: bytes) -> bool:
    """Whether the token before a border is still one with these bytes behind it: by encoding all anew."""
    if not border or response.roles[border - 1]:
        return True
    start, end = int(response.starts[border - 1]), int(response.ends[border - 1])
    whole = student.encode(response.data[:end] + after)
    return (start, end) in zip(whole.starts.tolist(), whole.ends.tolist(), strict=True)


def answers(student: Tokenizer, response: TokenSpans, border: int, after: bytes) -> set[bool]:
    """What `keeps` says; where a character is not whole yet, of each next byte it may have: only then there
    is a text to cut."""
    before = response.data[: int(response.ends[border - 1])] if border else b""
    try:
        (before + after).decode()
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            some = [after + bytes([byte, *[0x8F] * more]) for byte in range(0x80, 0xC0) for more in range(3)]
            return {keeps(student, response, border, one) for one in some if is_text(before + one)}
    return {keeps(student, response, border, after)}


def is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def ask(cuts: Cuts, context: int, tokens: TokenSpans) -> tuple[bool, bool]:
    """Whether the first of the tokens leaves a cut at the context's border: alone, and going on."""
    one = np.asarray([context], np.int32)
    alone, going_on = cuts.at(one, tokens.ids[:1], np.zeros(1, np.int64))
    return bool(alone[0]), bool(going_on[0])


def asked(student: Tokenizer, teacher: Tokenizer, before: str, after: str) -> tuple[bool, bool]:
    """The same behind all of a text."""
    cuts, tokens = Cuts(student, teacher), teacher.encode(after)
    assert len(tokens) == 1
    return ask(cuts, int(cuts.contexts(student.encode(before))[-1]), tokens)


@settings(max_examples=80)
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
    any_id = st.integers(0, teacher.vocab_size - 1)
    tokens = data.draw(st.lists(st.sampled_from([0, *likely]) | any_id, min_size=1, max_size=8))
    lengths = [len(piece) for piece in teacher.token_bytes(tokens)]
    questions = [
        (b, t, o)
        for b in range(len(response) + 1)
        for t, n in zip(tokens, lengths, strict=True)
        for o in range(n + 1)
    ]
    borders, ids, offsets = (np.asarray(column) for column in zip(*questions, strict=True))
    for _ in range(2):  # the second time from what is remembered
        alone, _ = cuts.at(contexts[borders], ids.astype(np.int32), offsets.astype(np.int64))
        for answer, (border, token, offset) in zip(alone, questions, strict=True):
            after = teacher.token_bytes([token])[0][offset:]
            right = answers(student, response, border, after) if after else {True}
            assert bool(answer) in right, (border, after)


@settings(max_examples=60)
@given(data=st.data())
def test_what_is_known_to_follow_is_part_of_the_context(
    all_tokenizers: dict[str, Tokenizer], data: st.DataObject
) -> None:
    names = st.sampled_from(sorted(all_tokenizers))
    student, teacher = all_tokenizers[data.draw(names)], all_tokenizers[data.draw(names)]
    response, after = student.encode(data.draw(TEXT)), teacher.encode(data.draw(TEXT))
    if len(after) < 2 or (after.roles != 0).any():
        return
    cuts = Cuts(student, teacher)
    contexts = cuts.contexts(response)
    first, second = (np.full(len(contexts), token, np.int32) for token in after.ids[:2])
    zeros = np.zeros(len(contexts), np.int64)
    alone, _ = cuts.at(cuts.longer(contexts, first, zeros), second, zeros)
    read = after.data[: int(after.ends[1])]
    for border, answer in enumerate(alone.tolist()):
        assert answer in answers(student, response, border, read)


def test_a_scan_does_not_begin_among_letters_behind_a_sign(bpe: Make) -> None:
    u = "\u00c3\u00bc"  # the two bytes of \u00fc
    student = bpe(SIGNED, [(u[0], u[1]), ("f", u), ("a", "f"), ("(", "c")])
    teacher = bpe(SIGNED, [(u[0], u[1]), (u, "r")])
    # Begun at "af", the word would run on to the end, and "f\u00fc" be one token.
    assert asked(student, teacher, "(caf", "\u00fcr") == (True, True)
    assert asked(student, teacher, "caf", "\u00fcr") == (False, False)


def test_a_scan_does_not_begin_inside_a_contraction(bpe: Make) -> None:
    student = bpe(CONTRACTED, [("e", "d"), ("r", "ed")])
    # "'re" is a match of its own, so that "red" is never one.
    assert asked(student, bpe(CONTRACTED, [("e", "d")]), "I'r", "ed") == (True, True)
    assert asked(student, bpe(CONTRACTED, [("e", "d")]), "Ir", "ed") == (False, False)


def test_a_token_that_no_merges_lead_to_begins_at_its_pre_token(bpe: Make) -> None:
    """Llama 3 has 588 such tokens: `ignore_merges` takes a pre-token that is spelled like a token whole."""
    student = bpe(SPACED, [("v", "i")], ["viet"])
    assert len(student.encode("viet")) == 1 and student.encode("vie").ends.tolist() == [2, 3]
    assert asked(student, bpe(SPACED, []), "vie", "t") == (False, False)
    assert asked(student, bpe(SPACED, []), "xvie", "t") == (True, True)


def test_what_follows_the_token_may_decide(bpe: Make) -> None:
    spaces = bpe(SPACED, [(SPACE, SPACE), (SPACE * 2, SPACE)])
    letters = bpe(SPACED, [("a", "b"), ("c", "d"), ("ab", "c"), ("e", "f")])
    single = bpe(SPACED, [])
    # The last space of a run belongs to a word behind it, if there is one.
    assert asked(spaces, single, "x  ", " ") == (False, True)
    assert asked(spaces, single, "x  ", "y") == (False, False)
    assert asked(spaces, single, "x ", "y") == (True, True)
    # "abc" is one token, but "abcd" is "ab" and "cd".
    assert asked(letters, single, "ab", "c") == (False, True)
    assert asked(letters, single, "e", "x") == (True, True)
    # "ab", "c" are two tokens, "abcd" is one.
    longer = bpe(SPACED, [("a", "b"), ("c", "d"), ("ab", "cd")])
    assert asked(longer, single, "ab", "c") == (True, False)
    # Half a character is no text; the whole one is a token with what stands before it.
    whole = bpe(SPACED, [("\u00c3", "\u00bc"), ("a", "\u00c3\u00bc")])
    half = single.encode(b"\xc3")
    cuts = Cuts(whole, single)
    assert ask(cuts, int(cuts.contexts(whole.encode("a"))[1]), half) == (True, False)


def test_the_response_says_what_follows_in_it(bpe: Make) -> None:
    student = bpe(SPACED, [(SPACE, SPACE), (SPACE * 2, SPACE), ("a", "b")])
    cuts = Cuts(student, student)
    canonical = student.encode("x   ab a")
    otherwise = concatenate([student.encode(part) for part in ("x  ", " a", "b")])
    whole, broken = [True] * (len(canonical) + 1), [True, True, True, True, False, True]
    for response, wanted in ((canonical, whole), (otherwise, broken)):
        borders = np.arange(len(response) + 1)
        known = cuts.known(response, borders, cuts.contexts(response))
        assert known.tolist() == wanted


def test_a_role_token_is_always_a_boundary(tokenizers: dict[str, Tokenizer]) -> None:
    student = tokenizers["chatml"]
    parts = [student.encode("Tom ha"), student.role_span("think_close"), student.encode("s 12")]
    response = concatenate(parts)
    cuts = Cuts(student, student)
    contexts = cuts.contexts(response)
    assert contexts[0] == 0 and contexts[len(parts[0]) + 1] == 0 and contexts[len(parts[0])] != 0
    end = np.full(len(contexts), student.roles["end_of_turn"], np.int32)
    assert cuts.at(contexts, end, np.zeros(len(contexts), np.int64)).all()
    assert cuts.always(contexts).tolist() == (contexts == 0).tolist()
    assert cuts.known(response, np.arange(len(response) + 1), contexts).all()


def test_forgetting_changes_no_answer(tokenizers: dict[str, Tokenizer]) -> None:
    student, teacher = tokenizers["llama3"], tokenizers["chatml"]
    small, large = Cuts(student, teacher, limit=3), Cuts(student, teacher)
    for text in ("Tom has 12 apples", "The answer is 100", "Tom has 12 apples"):
        response = student.encode(text)
        tokens = np.arange(len(response) + 1, dtype=np.int32) * 7 % 300
        zeros = np.zeros(len(tokens), np.int64)
        first, second = (cuts.at(cuts.contexts(response), tokens, zeros) for cuts in (small, large))
        assert first.tolist() == second.tolist()
    new = student.encode("zebra")
    assert int(small.contexts(new).max()) <= len(new) < int(large.contexts(new).max())


@settings(max_examples=50)
@given(
    batches=st.lists(st.dictionaries(st.integers(0, 2**63 - 1), st.integers(0, 127), max_size=50), max_size=6)
)
def test_the_memory_is_a_dictionary(batches: list[dict[int, int]]) -> None:
    memory, wanted = Memory(), {}
    for batch in batches:
        new = {key: value for key, value in batch.items() if key not in wanted}
        memory.put(np.asarray(list(new), np.int64), np.asarray(list(new.values()), np.int64))
        wanted.update(new)
        both = [*wanted, *(key ^ 1 for key in wanted)]
        got = memory.get(np.asarray(both, np.int64))
        assert got.tolist() == [wanted.get(key, -1) for key in both]
    assert len(memory) == len(wanted)


def test_the_memory_is_as_quick_when_it_is_full() -> None:
    memory, seconds = Memory(), []
    keys = np.unique(np.random.default_rng(0).integers(0, 2**62, 1_220_000))
    parts = np.split(keys, [10_000, len(keys) - 10_000])
    for part in parts:
        begin = time.process_time()
        for few in np.split(part, range(500, len(part), 500)) if len(part) == 10_000 else [part]:
            memory.put(few, (few % 128).astype(np.int64))
        seconds.append(time.process_time() - begin)
    assert (memory.get(keys) == keys % 128).all() and len(memory) == len(keys)
    assert (memory.get(keys + 1)[np.diff(keys, append=0) != 1] == -1).all()
    assert seconds[2] < 10 * seconds[0] + 0.1


def test_what_is_kept_beside_the_answers_is_of_single_tokens(tokenizers: dict[str, Tokenizer]) -> None:
    """A context with what follows it comes once, as its answer does; kept too, it would take several times
    the answer's place, and `limit` would not know of it."""
    student, teacher = tokenizers["llama3"], tokenizers["chatml"]
    cuts = Cuts(student, teacher)
    every = np.arange(teacher.vocab_size, dtype=np.int32)
    for text in ("Tom has 12", "the answer", "  ", "def add"):
        context = np.full(len(every), cuts.contexts(student.encode(text))[-1], np.int32)
        cuts.at(context, every, np.zeros(len(every), np.int64))
    longest = teacher.token_bytes(every)
    assert len(cuts._continuations) > 100
    assert all(len(text) <= len(longest[token]) for text, token in cuts._continuations)
