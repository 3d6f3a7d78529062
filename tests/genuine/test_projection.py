"""Projection on genuine vocabularies: cuts against encoding anew, masses against counting short strings."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxdistill.align import align
from jaxdistill.align.projection import (
    Cuts,
    Projector,
    bounds_of,
    masses_of,
    read_ground,
    vocabulary_symbols,
)
from jaxdistill.align.texts import built_in
from jaxdistill.records import TeacherScores, TokenSpans
from jaxdistill.text import Tokenizer, concatenate

PAIRS = [
    *(("qwen3", "llama3"), ("llama3", "qwen3"), ("qwen3", "gemma3"), ("gemma3", "qwen3")),
    *(("smollm2", "llama3"), ("deepseek_v3", "qwen3")),
]
# Half words whose cut depends on where a scan begins, and what may follow them.
HEADS = (
    "(caf", "!na", ".re", "#be", '"gar', "[dej", "Stra", "na", "a.b", "x=", "e\u0301", "don't", "I'LL",
    "k\u00f6", "\u0928\u092e", "\u0e44\u0e17", "//x", "\n/", "a\n/", "\x1c", " 12", "1", "\u00b2", "\u2160",
    "_x", "$a", "@user", "\u4f60", "\u3042", "HTTPS", "iPhone", "\u01c5", "\u02b0a", "  ", "\n\n", " ", "\t ",
    "    ", "a ",
)  # fmt: skip
TAILS = (
    "\u00e9", "\u00e8re", "\u00efve", "\u00fcr", "ra", "\u00dfe", "'s", "s", "ll", "\u0301", "\u0938",
    "\u094d", "x", "1", " ", "  ", "\n", "\n\n", "/", "(", "\u597d", "\u3044", "A", "bC", "\u00e7on",
    "t", "ed", " the",
)  # fmt: skip
# Llama 3 reaches these as wholes alone: no merges lead to them.
WHOLE = (
    " vi\u1ec7c",
    " h\u1ee3p",
    " nhi\u1ec1u",
    " \u0111i\u1ec1u",
    " bi\u1ec7t",
    "ektedir",
    "lardan",
    "iyordu",
)
PARTS = (
    ["The", " sum", " of", " 1", "2", "45", " 100", "0", " is", " don", "'t", "\n", "\n\n", "  ", "=", "(("],
    ["\u4f60\u597d", "\u4e16\u754c", "\uff0c", "\u6211", "\u4eec", "\u3002", "\u5b66\u4e60", "12", " "],
    ["def", " f", "(", "x", ")", ":", "\n", "    ", "        ", "return", " x", "+", "1", "_", "__", "init"],
)


def keeps(student: Tokenizer, response: TokenSpans, afters: list[bytes]) -> list[bool]:
    """Whether the response's last token is still one with each of these behind it, all encoded anew."""
    place = (int(response.starts[-1]), int(response.ends[-1]))
    encoded = student.encode_batch([response.data + after for after in afters])
    return [place in zip(e.starts.tolist(), e.ends.tolist(), strict=True) for e in encoded]


def partner(name: str) -> str:
    return "gemma3" if name == "qwen3" else "qwen3"


def questions(seed: int) -> list[str]:
    random = np.random.default_rng(seed)
    return ["".join(random.choice(HEADS, size=random.integers(1, 4))) for _ in range(60)]


def test_cuts_are_what_encoding_the_whole_says(genuine: Any, name: str) -> None:
    student, teacher = genuine[name], genuine[partner(name)]
    cuts = Cuts(student, teacher)
    tails = np.asarray([teacher.encode(tail).ids[0] for tail in TAILS], np.int32)
    afters = teacher.token_bytes(tails)
    lines = [line for text in built_in().values() for line in text[0].decode().splitlines() if line][::7]
    wrong: list[tuple[bytes, bytes]] = []
    for text in [*questions(0), *lines]:
        response = student.encode(text)
        if not response.data or response.roles.any():
            continue
        context = np.full(len(tails), cuts.contexts(response)[-1], np.int32)
        alone, _ = cuts.at(context, tails, np.zeros(len(tails), np.int64))
        wanted = keeps(student, response, afters)
        wrong += [(response.data, a) for a, x, y in zip(afters, alone, wanted, strict=True) if x != y]
    assert not wrong, (len(wrong), wrong[:5])


def test_tokens_that_no_merges_lead_to(genuine: Any) -> None:
    student = genuine["llama3"]
    cuts = Cuts(student, genuine["qwen3"])
    vocabulary = genuine["qwen3"]
    for word, at in [(whole, at) for whole in WHOLE for at in range(1, len(whole))]:
        assert len(student.encode(word)) == 1
        response, rest = student.encode(word[:at]), vocabulary.encode(word[at:])
        if len(rest) == 1:
            context = cuts.contexts(response)[-1:]
            alone, _ = cuts.at(context, rest.ids, np.zeros(1, np.int64))
            assert alone[0] == keeps(student, response, [word[at:].encode()])[0], (word, at)


@pytest.mark.parametrize(
    "sides", [*PAIRS, ("gptoss", "gemma3"), ("qwen3", "mistral_v1"), ("mistral_v1", "qwen3")]
)
def test_a_canonical_response_always_has_mass(genuine: Any, sides: tuple[str, str]) -> None:
    """The least a top-k can show is the sampled token: M is the probability of all strings that begin so,
    and the response is one of them."""
    student, teacher = genuine[sides[0]], genuine[sides[1]]
    cuts, vocabulary = Cuts(student, teacher), vocabulary_symbols(teacher)
    code = (Path(__file__).parents[2] / "jaxdistill/align/spans.py").read_bytes()[:12_000]
    for data in [*(text[0] for text in built_in().values()), code]:
        response = student.encode(data)
        scored = teacher.encode(response.data)
        logprobs = np.full((len(scored), 1), np.log(0.9), np.float32)
        scores = TeacherScores(scored, logprobs[:, 0], "t", "0", scored.ids[:, None], logprobs)
        found = masses_of(read_ground(response, scores, align(response, scored), vocabulary, cuts), cuts)
        assert (found.after >= 0).all()
        log_m = found.log_m[found.after]
        # The path up to the token that holds the border, and the one behind it.
        holder = np.searchsorted(scored.ends, response.ends)
        assert (log_m >= np.log(0.9) * np.minimum(holder + 2, len(scored)) - 1e-4).all()
        log_p = log_m - found.log_m[found.before]
        assert np.isfinite(log_p).all() and log_p.max() < 1e-6


class Counted:
    """A teacher over a few short strings with an end behind each, and every M counted."""

    def __init__(self, student: Tokenizer, teacher: Tokenizer, texts: list[str], seed: int) -> None:
        weights = np.random.default_rng(seed).dirichlet(np.ones(len(texts)) * 0.5) + 1e-9
        sides = (student, teacher)
        written = [
            [concatenate([x, s.role_span("end_of_turn")]) for x in s.encode_batch(texts)] for s in sides
        ]
        self.mine, self.theirs = written
        self._next: dict[tuple[int, ...], dict[int, float]] = {}
        self._mass: dict[tuple[int, ...], float] = {}
        for weight, mine, theirs in zip(weights / weights.sum(), *written, strict=True):
            ids = tuple(theirs.ids.tolist())
            for index, token in enumerate(ids):
                row = self._next.setdefault(ids[:index], {})
                row[token] = row.get(token, 0.0) + weight
            for index in range(len(mine) + 1):
                history = tuple(mine.ids[:index].tolist())
                self._mass[history] = self._mass.get(history, 0.0) + weight

    def scores(self, index: int) -> TeacherScores:
        scored = self.theirs[index]
        rows = [self._next[tuple(scored.ids[:i].tolist())] for i in range(len(scored))]
        width = max(map(len, rows))
        ids, logprobs = (
            np.full((len(rows), width), -1, np.int32),
            np.full((len(rows), width), -np.inf, np.float32),
        )
        for i, row in enumerate(rows):
            ids[i, : len(row)] = list(row)
            logprobs[i, : len(row)] = np.log(np.asarray(list(row.values())) / sum(row.values()))
        sampled = logprobs[ids == scored.ids[:, None]]
        return TeacherScores(scored, sampled, "t", "0", ids, logprobs)

    def share(self, index: int, row: int, token: int) -> float:
        """p_{T>S} of a student token before token `row` of a string."""
        history = tuple(self.mine[index].ids[:row].tolist())
        return self._mass.get((*history, token), 0.0) / self._mass[history]

    def truth(self, index: int) -> np.ndarray:
        ids = tuple(self.mine[index].ids.tolist())
        return np.log([self._mass[ids[: i + 1]] for i in range(len(ids))])


def short_strings() -> list[list[str]]:
    """Parts put together at random, and natural text that ends early or goes on otherwise."""
    random = np.random.default_rng(0)
    kinds = [
        sorted({"".join(random.choice(p, size=random.integers(2, 7))) for _ in range(200)}) for p in PARTS
    ]
    for kind in ("English", "code", "digits", "Japanese"):
        text, strings = built_in()[kind][0].decode(), set()
        for _ in range(8):
            here, there = random.integers(0, len(text) - 40, 2).tolist()
            strings |= {text[here : here + n] for n in random.integers(1, 25, 20).tolist()}
            goes_on = random.integers(1, 16, 20).tolist()
            strings |= {text[here : here + n] + text[there + n : there + n + 8] for n in goes_on}
        kinds.append(sorted(strings))
    return kinds


def test_masses_of_short_strings_are_those_counted(genuine: Any) -> None:
    """The figures of docs/align.md; -s prints them."""
    errors, rooms, known = [], [], []
    for number, (mine, other) in enumerate(PAIRS):
        student, teacher = genuine[mine], genuine[other]
        cuts, vocabulary = Cuts(student, teacher), vocabulary_symbols(teacher)
        for texts in short_strings():
            counted = Counted(student, teacher, texts, number)
            for index in np.random.default_rng(1).permutation(len(texts))[:12].tolist():
                response, scores = counted.mine[index], counted.scores(index)
                alignment = align(response, scores.response)
                ground = read_ground(response, scores, alignment, vocabulary, cuts)
                found = masses_of(ground, cuts)
                bounds = bounds_of(ground, found, cuts)
                assert (found.after >= 0).all()
                errors.append(found.log_m[found.after] - counted.truth(index))
                rooms.append(-np.log1p(-np.minimum(bounds.guessed[found.after], 1 - 1e-12)))
                known.append(bounds.shorter[found.after] == 0)
    error, room, sure = (np.concatenate(part) for part in (errors, rooms, known))
    outside = (np.abs(error) > room + 1e-3) & sure
    size = np.abs(error)
    print(
        f"\n{len(size)} borders: {np.mean(size < 1e-3):.3f} exact, mean error {size.mean():.3f}, "
        f"{np.mean(size > 0.1):.3f} above 0.1, largest {size.max():.1f}; certain by the figures "
        f"{np.mean((room < 1e-3) & sure):.3f}, of {sure.sum()} without shorter tokens outside {outside.sum()}"
    )
    assert np.isfinite(error).all()
    assert np.mean(size < 1e-3) > 0.9 and size.mean() < 0.05
    assert outside.sum() <= 0.005 * sure.sum()


# Parts that one side writes as tokens and the other in bytes, or in beginnings and bytes.
HAN = ["\u9f98", "\u4f60", "\u597d", "\U00020bb7", "\u3002", "\u4e2d\u56fd", " a", "\u200d"]
SIGNS = [" \U0001f600", "\U0001f600", " 1", "a", " a", "1", " \U0001f680", " \u2764\ufe0f"]


@pytest.mark.parametrize(
    "sides",
    [
        *[("llama3", "gemma3", HAN), ("llama3", "qwen3", HAN)],
        *[("qwen3", "mistral_v1", SIGNS), ("llama3", "mistral_v1", SIGNS), ("gemma3", "mistral_v1", SIGNS)],
    ],
    ids=lambda sides: f"{sides[0]}-{sides[1]}",
)
def test_no_candidate_is_listed_above_its_share_where_characters_are_written_in_parts(
    genuine: Any, sides: tuple[str, str, list[str]]
) -> None:
    student = genuine[sides[0]]
    teacher = genuine[sides[1]]
    if "end_of_turn" not in teacher.roles:  # a base model's tokenizer
        teacher = Tokenizer.load(str(genuine.folder(sides[1])), roles={"end_of_turn": "</s>"})
    random = np.random.default_rng(5)
    texts = sorted({"".join(random.choice(sides[2], size=random.integers(1, 5))) for _ in range(40)})
    counted = Counted(student, teacher, texts, 1)
    projector, others = Projector(student, teacher, candidates=16), 0
    for index in range(len(texts)):
        response, scores = counted.mine[index], counted.scores(index)
        found = projector(response, scores, align(response, scores.response))
        for row, candidate in np.argwhere(found.ids >= 0).tolist():
            token, value = int(found.ids[row, candidate]), float(np.exp(found.logprobs[row, candidate]))
            assert value < counted.share(index, row, token) + 0.1, (texts[index], row, token)
            others += token != response.ids[row]
    assert others > 50


def test_projected_tokens_of_short_strings_are_those_counted(genuine: Any) -> None:
    """The figures of docs/align.md; -s prints them."""
    errors, sampled, tails, floored, states = [], [], [], 0, 0
    for number, (mine, other) in enumerate(PAIRS):
        student, teacher = genuine[mine], genuine[other]
        projector = Projector(student, teacher, candidates=16)
        for texts in short_strings():
            counted = Counted(student, teacher, texts, number)
            for index in np.random.default_rng(1).permutation(len(texts))[:12].tolist():
                response, scores = counted.mine[index], counted.scores(index)
                found = projector(response, scores, align(response, scores.response))
                states += len(response)
                floored += int(found.floored.sum())
                assert found.mask.all() and np.isfinite(found.logprob).all()
                for row, token in enumerate(response.ids.tolist()):
                    sampled.append(found.logprob[row] - np.log(counted.share(index, row, token)))
                    known = found.ids[row] >= 0
                    values = np.exp(found.logprobs[row][known].astype(np.float64))
                    tails.append(1.0 - values.sum())
                    for candidate, value in zip(found.ids[row][known].tolist(), values.tolist(), strict=True):
                        if candidate != token:
                            errors.append(value - counted.share(index, row, candidate))
    error, off, tail = np.abs(errors), np.abs(sampled), np.asarray(tails)
    print(
        f"\n{states} states, {floored} floored: sampled {np.mean(off < 2e-3):.3f} exact, mean error "
        f"{off.mean():.3f}; {len(error)} other candidates: {np.mean(error < 1e-3):.3f} exact, "
        f"{np.mean(error > 0.1):.3f} off by more than 0.1; mean tail {tail.mean():.3f}"
    )
    assert np.mean(off < 2e-3) > 0.9 and off.mean() < 0.05 and floored == 0
    assert np.mean(error < 1e-3) > 0.85 and np.mean(error > 0.1) < 0.03
    assert tail.min() > -1e-6 and tail.mean() < 0.2
