"""Which rule of credit follows the true gradient? Counted in worlds whose every string is known.

`python scripts/credit_worlds.py [--seeds 20]` prints the tables of docs/credit.md.

A world is a set of short strings, a tokenizer for each side, and for each side a table of next-token
probabilities over its own cuts of the strings. So the teacher's probability of every student history is a sum
over strings, and the gradient of the reverse KL at each student state is exact. For each rule the expected
policy-gradient update over all strings is compared with it, by the cosine between the two.

Letters: R student tokens of a string, C chunks, W parameters (a logit for each student token after each
student history).
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from jaxdistill.align import align
from jaxdistill.align.projection import Projector
from jaxdistill.records import TeacherScores
from jaxdistill.text import Tokenizer

SPACE = "\u0120"  # as byte-level BPE writes it
# The last space of a run belongs to a word behind it.
SPACED = r" ?[^\s]+|\s+(?!\S)|\s+"
# Student merges by what they look at behind a border, and what the strings are made of.
LONG = [("a", "b"), ("a", "a"), ("aa", "ab"), ("b", "b"), ("ab", "bb")]
WORDS = [("a", "b"), (SPACE, "a"), (SPACE + "a", "b")]

History = tuple[int, ...]
Table = dict[History, dict[int, float]]


def byte_level_bpe(
    folder: Path, pattern: str, merges: Sequence[tuple[str, str]], whole: Sequence[str] = ()
) -> Tokenizer:
    """A tokenizer with these pre-token cuts and merges, and `whole` tokens that no merges lead to."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    joined = [left + right for left, right in merges]
    pieces = list(dict.fromkeys([*alphabet, *joined, *whole]))
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    raw = RawTokenizer(models.BPE(vocab=vocabulary, merges=list(merges), ignore_merges=bool(whole)))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    folder.mkdir(parents=True)
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({}))
    return Tokenizer.load(str(folder))


def digit_pieces(folder: Path, size: int) -> Tokenizer:
    """Cuts runs of digits from the left into pieces of at most `size` digits."""
    runs = ["".join(p) for n in range(2, size + 1) for p in itertools.product("012", repeat=n)]
    # Every way of putting a run together, so that a whole run is always one piece.
    merges = [(run[:at], run[at:]) for run in runs for at in range(1, len(run))]
    return byte_level_bpe(folder, rf"[0-9]{{1,{size}}}|[^0-9]+", merges)


def strings(alphabet: str, longest: int) -> list[str]:
    """All strings of at most `longest` letters, each with a mark behind it."""
    return ["".join(p) + "=" for n in range(longest + 1) for p in itertools.product(alphabet, repeat=n)]


def random_table(random: np.random.Generator, cuts: Sequence[History], sharpness: float) -> Table:
    """Next-token probabilities after each history of these cuts: a softmax of normal logits."""
    after: dict[History, set[int]] = {}
    for ids in cuts:
        for index in range(len(ids)):
            after.setdefault(ids[:index], set()).add(ids[index])
    table = {}
    for history, choices in after.items():
        weights = np.exp(sharpness * random.normal(size=len(choices)))
        table[history] = dict(zip(sorted(choices), (weights / weights.sum()).tolist(), strict=True))
    return table


class World:
    """Strings that can all be counted, and a teacher that is a table over its own cuts of them."""

    def __init__(self, student: Tokenizer, teacher: Tokenizer, strings: Sequence[str], seed: int) -> None:
        self.student, self.teacher, self.strings = student, teacher, strings
        self.mine: dict[str, History] = {t: tuple(student.encode(t).ids.tolist()) for t in strings}
        self.theirs: dict[str, History] = {t: tuple(teacher.encode(t).ids.tolist()) for t in strings}
        self.table = random_table(np.random.default_rng(seed), list(self.theirs.values()), 2.0)
        self.path = {t: [self.table[i[:n]][i[n]] for n in range(len(i))] for t, i in self.theirs.items()}
        self.by_history: dict[History, float] = {}
        self.by_prefix: dict[str, float] = {}
        for text in strings:
            probability = float(np.prod(self.path[text]))
            for index in range(len(self.mine[text]) + 1):
                history = self.mine[text][:index]
                self.by_history[history] = self.by_history.get(history, 0.0) + probability
            for index in range(len(text) + 1):
                self.by_prefix[text[:index]] = self.by_prefix.get(text[:index], 0.0) + probability

    def scores(self, text: str, most: int | None = None) -> TeacherScores:
        """The table's row at each position of a string, or its `most` likeliest entries."""
        ids = self.theirs[text]
        width = most or max(len(choices) for choices in self.table.values())
        topk = np.full((len(ids), width), -1, np.int32)
        logprobs = np.full((len(ids), width), -np.inf, np.float32)
        for index in range(len(ids)):
            choices = sorted(self.table[ids[:index]].items(), key=lambda choice: -choice[1])[:width]
            topk[index, : len(choices)] = [token for token, _ in choices]
            logprobs[index, : len(choices)] = np.log([probability for _, probability in choices])
        sampled = np.log(self.path[text]).astype(np.float32)
        return TeacherScores(self.teacher.encode(text), sampled, "t", "0", topk, logprobs)

    def truth(self, history: History) -> dict[int, float]:
        """p_{T>S} after a student history, every token of it."""
        size = len(history)
        behind = {ids[size] for ids in self.mine.values() if len(ids) > size and ids[:size] == history}
        return {c: self.by_history[(*history, c)] / self.by_history[history] for c in behind}


class Student:
    """A student as a table over its own cuts, and expected updates of its logits."""

    def __init__(self, world: World, seed: int) -> None:
        self._world = world
        self._table = random_table(np.random.default_rng(seed), list(world.mine.values()), 1.0)
        at = ((history, token) for history, row in self._table.items() for token in row)
        self._place = {pair: index for index, pair in enumerate(at)}
        self.logprobs = {
            text: np.log([self._table[ids[:i]][ids[i]] for i in range(len(ids))])
            for text, ids in world.mine.items()
        }

    def update(self, advantage: Callable[[str], np.ndarray]) -> np.ndarray:
        """[W] sum over all strings of p_S(string) * sum over tokens of advantage * grad log p_S(token)."""
        gradient = np.zeros(len(self._place))
        for text, ids in self._world.mine.items():
            weights = np.exp(self.logprobs[text].sum()) * advantage(text)
            for index, weight in enumerate(weights.tolist()):
                for token, p in self._table[ids[:index]].items():
                    gradient[self._place[ids[:index], token]] += weight * ((token == ids[index]) - p)
        return gradient


def true_advantage(world: World, student: Student, text: str) -> np.ndarray:
    """[R] log p_{T>S} - log p_S of each token, counted."""
    ids = world.mine[text]
    masses = np.log([world.by_history[ids[:index]] for index in range(len(ids) + 1)])
    return np.diff(masses) - student.logprobs[text]


def projected(
    world: World, student: Student, text: str, projector: Projector, most: int | None
) -> np.ndarray:
    """[R] the same, from the top-k of the one path that was scored."""
    response, scores = world.student.encode(text), world.scores(text, most)
    found = projector(response, scores, align(response, scores.response))
    return found.logprob - student.logprobs[text]


def by_chunk(world: World, student: Student, text: str, rule: str) -> np.ndarray:
    """[R] the rules that know sampled log-probabilities alone (docs/objectives/reverse_kl.md)."""
    response, scores = world.student.encode(text), world.scores(text)
    found = align(response, scores.response)
    chunk, own = found.student_chunk, student.logprobs[text]
    theirs = np.bincount(found.teacher_chunk, weights=scores.logprobs)
    mine = np.bincount(chunk, weights=own)
    difference = (theirs - mine)[chunk]
    if rule == "uniform":
        return difference / np.bincount(chunk)[chunk]
    if rule == "proportional":
        return difference * own / np.minimum(mine[chunk], -1e-9)
    if rule == "exact only":
        return np.where(found.exact[chunk], difference, 0.0)
    if rule == "lookahead":
        first = np.flatnonzero(np.diff(chunk, prepend=-1))
        closed = np.zeros(len(chunk))
        closed[first[1:]] = (theirs - mine)[:-1]
        return difference + closed
    return difference


RULES = ("lookahead", "broadcast", "uniform", "proportional", "exact only")
TOP_K = (None, 16, 8, 4, 2, 1)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30))


def cosines(
    world: World, seed: int, projector: Projector, top_k: Sequence[int | None] = TOP_K
) -> dict[str, float]:
    """By rule, the cosine of its expected update with the per-state reverse-KL gradient."""
    student = Student(world, seed)
    target = student.update(lambda text: true_advantage(world, student, text))
    found = {}
    for most in top_k:
        name = "projected, all proposals" if most is None else f"projected, top {most}"
        found[name] = cosine(
            student.update(lambda t, k=most: projected(world, student, t, projector, k)), target
        )
    for rule in RULES:
        found[rule] = cosine(student.update(lambda t, r=rule: by_chunk(world, student, t, r)), target)
    return found


def pairs(folder: Path) -> dict[str, tuple[Tokenizer, Tokenizer, list[str]]]:
    """The worlds' tokenizers and strings by name."""
    pieces = {size: digit_pieces(folder / f"digits{size}", size) for size in (1, 2, 3)}
    digits = strings("012", 4)
    found = {f"{s} / {t}": (pieces[s], pieces[t], digits) for s, t in itertools.product((1, 2, 3), repeat=2)}
    letters = strings("ab ", 5)
    long, words, single = (
        byte_level_bpe(folder / name, SPACED, merges)
        for name, merges in (("long", LONG), ("words", WORDS), ("single", []))
    )
    return {
        **found,
        "long merges / words": (long, words, letters),
        "words / long merges": (words, long, letters),
        "long merges / letters": (long, single, letters),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    columns: dict[str, dict[str, np.ndarray]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (student, teacher, texts) in pairs(Path(folder)).items():
            projector = Projector(student, teacher, candidates=4)
            rows = [
                cosines(World(student, teacher, texts, s), s + 1_000, projector) for s in range(options.seeds)
            ]
            columns[name] = {rule: np.asarray([row[rule] for row in rows]) for rule in rows[0]}
    print("| credit | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for rule in next(iter(columns.values())):
        cells = [f"{c[rule].mean():.3f} ({np.percentile(c[rule], 5):.3f})" for c in columns.values()]
        print(f"| {rule} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
