"""CPU seconds of projecting a teacher's top-k: a first batch, the same again, and a next one.

`python benchmarks/projection.py STUDENT TEACHER [--responses 64] [--proposals 16 64] [--smoke] [--out FILE]`
(folders with tokenizer.json). One JSON line a batch: the projection's CPU time over that of encoding the
responses for the teacher, which is to be at most a tenth; exit code 1 where it is more. `tail` is what is not
listed, of which `unseen` is beyond the top-k.

No model runs here, so proposals are made up in two ways. "followers": what followed the same teacher token in
other text of the corpus, most often first, which is how alike a model's proposals are from batch to batch.
"near": half of them are neighbours of the response's own token in the sorted vocabulary, half any tokens, all
with noticeable probability: hardly any question comes twice, the worst case for what is remembered.
"""

import sys
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
from align import stream
from measure import Report, figure, options

from jaxdistill.align import align
from jaxdistill.align.projection import Projector
from jaxdistill.records import TeacherScores, TokenSpans
from jaxdistill.text import Tokenizer

LENGTH, SHARE = 2_048, 0.98
MOST = 0.1  # of the CPU time of encoding


class Followers:
    """Proposals by how often a token followed another in text of the same kind."""

    def __init__(self, student: Tokenizer, teacher: Tokenizer, texts: int) -> None:
        self._after: dict[int, Counter[int]] = {}
        for seed in range(5_000, 5_000 + texts):
            ids = teacher.encode(stream(student, LENGTH, seed).data).ids.tolist()
            for before, token in zip([-1, *ids], ids, strict=False):
                self._after.setdefault(before, Counter())[token] += 1

    def __call__(self, response: TokenSpans, proposals: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.full((len(response), proposals), -1, np.int32)
        weights = np.full(ids.shape, 1e-9)
        for row, (before, own) in enumerate(
            zip([-1, *response.ids.tolist()], response.ids.tolist(), strict=False)
        ):
            found = self._after.get(before, Counter()).most_common(proposals)
            others = [(token, count) for token, count in found if token != own][: proposals - 1]
            ids[row, 0], ids[row, 1 : 1 + len(others)] = own, [token for token, _ in others]
            weights[row, 1 : 1 + len(others)] = [count for _, count in others]
            weights[row, 0] = max(1.0, 2.0 * weights[row, 1:].sum())
        return ids, weights


class Near:
    """Proposals that share bytes with the response's own token, and any others."""

    def __init__(self, teacher: Tokenizer) -> None:
        pieces = teacher.token_bytes(np.arange(teacher.vocab_size, dtype=np.int32))
        self._order = np.asarray(sorted(range(len(pieces)), key=pieces.__getitem__), np.int32)
        self._rank = np.argsort(self._order)
        self._random = np.random.default_rng(0)

    def __call__(self, response: TokenSpans, proposals: int) -> tuple[np.ndarray, np.ndarray]:
        size, random = len(self._order), self._random
        steps = random.permuted(np.tile(np.r_[-proposals:0, 1 : proposals + 1], (len(response), 1)), axis=1)[
            :, : proposals // 2 - 1
        ]
        near = self._order[(self._rank[response.ids][:, None] + steps) % size]
        any_id = random.integers(0, size, (len(response), proposals // 2)).astype(np.int32)
        weights = np.exp(random.gumbel(size=(len(response), proposals)))
        weights[:, 0] *= 20
        return np.concatenate([response.ids[:, None], near, any_id], axis=1), weights


def main(argv: Sequence[str] | None = None) -> int:
    parser = options(__doc__)
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("--responses", type=int, default=64)
    parser.add_argument("--proposals", type=int, nargs="+", default=[16, 64])
    arguments = parser.parse_args(argv)
    report = Report("projection", arguments)
    if arguments.smoke:
        arguments.responses, arguments.proposals = 1, [4]
    student, teacher = Tokenizer.load(arguments.student), Tokenizer.load(arguments.teacher)
    followers = Followers(student, teacher, 1 if arguments.smoke else 40)
    makers = (("followers", followers), ("near", Near(teacher)))
    runs = [(name, propose, k) for name, propose in makers for k in arguments.proposals]
    for name, propose, proposals in runs:
        begin = time.process_time()
        projector = Projector(student, teacher, candidates=proposals)
        loading = time.process_time() - begin
        batches = []
        for first in (0, arguments.responses):
            texts = [stream(student, LENGTH, first + seed) for seed in range(arguments.responses)]
            begin = time.process_time()
            read = teacher.encode_batch([text.data for text in texts])
            encoding = time.process_time() - begin
            batch = []
            for text, scored in zip(texts, read, strict=True):
                ids, weights = propose(scored, proposals)
                probabilities = weights / weights.sum(axis=1, keepdims=True) * SHARE
                logprobs = np.where(ids < 0, -np.inf, np.log(probabilities)).astype(np.float32)
                scores = TeacherScores(scored, logprobs[:, 0], "made up", "0", ids, logprobs)
                batch.append((text, scores, align(text, scored)))
            batches.append(batch)
        for when, batch in (("first", batches[0]), ("again", batches[0]), ("next", batches[1])):
            begin = time.process_time()
            found = [projector(*one) for one in batch]
            seconds = time.process_time() - begin
            tail = np.concatenate([1.0 - np.exp(one.logprobs[one.mask]).sum(axis=1) for one in found])
            floored = np.concatenate([one.floored[one.mask] for one in found])
            unit = "times the CPU of encoding"
            ratio = figure(f"projection_{name}_{proposals}_{when}", seconds / encoding, unit, MOST)
            figures = {"cpu_seconds": seconds, "teacher_encoding": encoding, "loading": loading}
            figures |= {"tail": tail.mean(), "unseen": 1 - SHARE, "floored": floored.mean()}
            report.add(ratio | {key: float(f"{value:.4g}") for key, value in figures.items()})
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
