"""Every ordered pair of genuine tokenizers: bytes that agree are aligned, bytes that do not never are."""

from collections.abc import Callable
from copy import copy
from types import ModuleType
from typing import Any

import numpy as np

from jaxdistill.align import align
from jaxdistill.records import Prompt, Rollout, TokenSpans
from jaxdistill.teachers.base import teacher_views

Pair = tuple[str, str]
Check = Callable[..., None]


def cut(spans: TokenSpans, at: int) -> tuple[TokenSpans, TokenSpans]:
    """The spans before and from token `at`."""
    byte = int(spans.ends[at - 1]) if at else 0
    return (
        TokenSpans(spans.ids[:at], spans.data[:byte], spans.ends[:at], spans.roles[:at]),
        TokenSpans(spans.ids[at:], spans.data[byte:], spans.ends[at:] - byte, spans.roles[at:]),
    )


def both_sides(genuine: Any, pair: Pair, contents: list[bytes]) -> list[tuple[TokenSpans, TokenSpans]]:
    """The contents in the student's tokens, and what the student wrote in the teacher's."""
    written = genuine.encode(pair[0], contents)
    return list(zip(written, genuine.encode(pair[1], [spans.data for spans in written]), strict=True))


def test_the_corpus_is_aligned_wherever_bytes_agree(
    genuine: Any, corpus: ModuleType, check_chunks: Check, pair: Pair
) -> None:
    samples = corpus.samples()
    for sample, (student, teacher) in zip(
        samples, both_sides(genuine, pair, [s.data for s in samples]), strict=True
    ):
        alignment = align(student, teacher)
        check_chunks(student, teacher, alignment)
        if student.data == teacher.data:
            assert alignment.coverage == 1.0, sample
            assert (alignment.student_chunk >= 0).all() and (alignment.teacher_chunk >= 0).all(), sample
        else:
            assert genuine[pair[1]].missing_bytes, sample


def test_a_million_letters_are_aligned(genuine: Any, corpus: ModuleType, name: str) -> None:
    teacher = "qwen3" if name != "qwen3" else "gemma3"
    ((mine, other),) = both_sides(genuine, (name, teacher), [corpus.long_letter().data])
    assert align(mine, other).coverage == 1.0


def test_any_sampled_ids_are_aligned(genuine: Any, check_chunks: Check, pair: Pair) -> None:
    """Random ids are no tokenizer's canonical tokens, mostly invalid UTF-8, and hold control tokens."""
    student, teacher = genuine[pair[0]], genuine[pair[1]]
    generator = np.random.default_rng(7)
    rows = [student.spans(generator.integers(0, student.vocab_size, 150).astype(np.int32)) for _ in range(3)]
    words = genuine.encode(pair[0], [b"The kettle had boiled twice before anyone noticed the letter."])[0].ids
    # A text cut otherwise than its tokenizer would: two of three tokens as single bytes.
    odd = [
        student._table.byte_tokens(student.token_bytes([index])[0]) if place % 3 else [index]
        for place, index in enumerate(words.tolist())
    ]
    rows.append(student.spans(np.concatenate([np.asarray(part, np.int32) for part in odd])))
    prompt = Prompt([{"role": "user", "content": "Hi"}], 0, "test")
    rollouts = [
        Rollout(prompt, words, row, np.zeros(len(row), np.float32), False, 0, student.vocab_fingerprint)
        for row in rows
    ]
    for row, view in zip(rows, responses(teacher, rollouts), strict=True):
        alignment = align(row, view)
        check_chunks(row, view, alignment)
        if not teacher.missing_bytes:
            assert alignment.coverage == 1.0
            aligned = alignment.student_chunk >= 0
            assert aligned[row.roles == 0].all()


def responses(teacher: Any, rollouts: list[Rollout]) -> list[TokenSpans]:
    """The responses as the teacher reads them. The prompt is left empty: some packages have no template."""
    assert teacher.vocab_fingerprint != rollouts[0].vocabulary  # computed here, so that the copy has it too
    reader = copy(teacher)
    reader.render = lambda *_, **__: np.zeros(0, np.int32)
    return [view for _, view in teacher_views(reader, rollouts)]


def test_cutting_at_a_chunk_border_changes_nothing(genuine: Any, corpus: ModuleType, pair: Pair) -> None:
    kinds = ("english", "code", "digits", "emoji", "mixed", "script:japanese", "invalid_utf8")
    contents = [corpus.by_kind()[kind][0] for kind in kinds]
    for number, (student, teacher) in enumerate(both_sides(genuine, pair, contents)):
        if student.data != teacher.data:
            continue
        whole = align(student, teacher)
        chunk = int(np.random.default_rng(number).integers(0, whole.num_chunks + 1))
        heads, tails = zip(
            cut(student, int(np.searchsorted(whole.student_chunk, chunk))),
            cut(teacher, int(np.searchsorted(whole.teacher_chunk, chunk))),
            strict=True,
        )
        first, second = align(*heads), align(*tails)
        assert first.num_chunks == chunk and first.num_chunks + second.num_chunks == whole.num_chunks
        joined = np.concatenate([first.student_chunk, second.student_chunk + chunk])
        assert joined.tolist() == whole.student_chunk.tolist()
        joined = np.concatenate([first.teacher_chunk, second.teacher_chunk + chunk])
        assert joined.tolist() == whole.teacher_chunk.tolist()
        assert np.concatenate([first.exact, second.exact]).tolist() == whole.exact.tolist()


def test_a_stray_byte_in_two_thousand_tokens_costs_at_most_one_percent(
    genuine: Any, corpus: ModuleType, check_chunks: Check, pair: Pair
) -> None:
    texts = [data for kind in ("english", "code", "latex", "mixed") for data in corpus.by_kind()[kind]]
    ids = genuine.encode(pair[0], [b"\n\n".join(texts) * 6])[0].ids[:2000]
    student, teacher = genuine[pair[0]], genuine[pair[1]]
    stray = student._table.byte_ids[0x80]
    assert stray >= 0 and len(ids) == 2000
    broken = student.spans(np.concatenate([ids[:1000], np.asarray([stray], np.int32), ids[1000:]]))
    # What the teacher makes of the bytes, and of the text as it would be without the stray one.
    whole = student.spans(ids).data
    for read in teacher.encode_batch([broken.data, whole]):
        alignment = align(broken, read)
        check_chunks(broken, read, alignment)
        assert (alignment.student_chunk >= 0).mean() >= 0.99
