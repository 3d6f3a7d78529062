"""Speed of the alignment and of the host path around it.

`python benchmarks/align.py [--pair STUDENT TEACHER]... [--smoke] [--out FILE]`

Prints one JSON line a measurement: name, pair, value, unit, and where there is one its limit and whether it
holds. Exit code 1 if a limit is missed. The first pair is trained here on the repository's own files, --pair
adds others; --out writes all measurements with a description of the machine.
"""

import json
import random
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measure import Report, cpu_seconds, figure, options
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer

from jaxdistill.align import align, project
from jaxdistill.align.texts import built_in
from jaxdistill.packing import pack
from jaxdistill.records import Prompt, Rollout, TeacherScores, TokenSpans
from jaxdistill.text import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
SIZES = (2_048, 4_096, 8_192, 16_384, 32_768, 65_536)  # student tokens
HEADLINE = 32_768
SMALL_SIZES = (256, 512)  # of --smoke
RESPONSES, LENGTH = 64, 2_048
LEAST_SPEED, MOST_GROWTH = 8e6, 1.1
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Pair:
    name: str
    student: Tokenizer
    teacher: Tokenizer


def corpus() -> str:
    """The repository's own code and prose, and the built-in texts of every kind."""
    files = [*sorted(ROOT.glob("jaxdistill/**/*.py")), *sorted(ROOT.glob("**/*.md"))]
    texts = [file.read_text("utf-8") for file in files if ".venv" not in file.parts]
    return "\n".join([*texts, *(content.decode() for kind in built_in().values() for content in kind)])


def train(folder: Path, text: str, *, vocabulary: int, digits: int) -> Tokenizer:
    """A byte-level BPE with the cuts of today's large vocabularies and numbers in groups of `digits`."""
    raw = RawTokenizer(models.BPE())
    words = Regex(rf"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,{digits}}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s+")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        text.splitlines(keepends=True),
        trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False),
    )
    raw.add_special_tokens(["<|user|>", "<|assistant|>", "<|end|>"])
    folder.mkdir()
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return Tokenizer.load(str(folder))


def trained_pair(folder: Path) -> Pair:
    text = corpus()
    student = train(folder / "student", text, vocabulary=3_000, digits=1)
    return Pair("trained 3k -> 6k", student, train(folder / "teacher", text, vocabulary=6_000, digits=3))


def stream(tokenizer: Tokenizer, tokens: int, seed: int) -> TokenSpans:
    """Exactly `tokens` student tokens of lines of the corpus in random order, the kinds mixed."""
    lines = [line for line in corpus().splitlines(keepends=True) if line.strip()]
    # The built-in texts are few lines; they come as often as the rest, so that hard kinds weigh in.
    hard = [content.decode() for kind in built_in().values() for content in kind]
    random_lines, parts, size = random.Random(seed), [], 0
    while size < 8 * tokens:
        parts.append(random_lines.choice(hard if random_lines.random() < 0.05 else lines))
        size += len(parts[-1])
    return tokenizer.spans(tokenizer.encode("".join(parts)).ids[:tokens])


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Slope of log value over log size."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def check(student: TokenSpans, teacher: TokenSpans) -> None:
    """What is timed is right: full coverage, and each chunk's bytes equal, counted apart from the aligner."""
    found = align(student, teacher)
    assert found.coverage == 1.0
    ends = []
    for side, chunks in ((student, found.student_chunk), (teacher, found.teacher_chunk)):
        assert (chunks >= 0).all()
        ends.append(side.ends[np.append(np.flatnonzero(np.diff(chunks)), len(chunks) - 1)])
    assert student.data == teacher.data and np.array_equal(*ends)


def alignment_figures(pair: Pair, sizes: Sequence[int], headline: int) -> list[dict[str, Any]]:
    seconds, memory = [], []
    for size in sizes:
        student = stream(pair.student, size, seed=size)
        teacher = pair.teacher.encode(student.data)
        check(student, teacher)
        seconds.append(cpu_seconds(lambda: align(student, teacher), repeats=max(1, 8 * headline // size)))  # noqa: B023
        tracemalloc.start()
        align(student, teacher)
        memory.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    at = sizes.index(headline)
    speed, growth, space = headline / seconds[at], exponent(sizes, seconds), exponent(sizes, memory)
    per_token = memory[at] / headline
    between = f"{sizes[0]} to {sizes[-1]}"
    return [
        figure(
            "align_tokens_per_second", speed, "verified student tokens/s, one core", LEAST_SPEED, least=True
        ),
        figure("align_growth_exponent", growth, f"time, {between} tokens", MOST_GROWTH),
        figure("align_memory_exponent", space, f"peak extra memory, {between}", MOST_GROWTH),
        figure("align_memory_per_token", per_token, "bytes per student token at the peak", None),
    ]


def host_path(pair: Pair, count: int) -> dict[str, Any]:
    """`count` sampled responses of 2,048 tokens from ids to a packed batch; wall seconds of each part."""
    ids = [stream(pair.student, LENGTH, seed=number).ids for number in range(count)]
    random_logprobs = np.random.default_rng(0)
    prompt = Prompt([{"role": "user", "content": "?"}], 0, "benchmark")
    best: dict[str, float] = {}
    for _ in range(3):
        marks = [time.perf_counter()]
        responses = [pair.student.spans(row) for row in ids]
        marks.append(time.perf_counter())
        encoded = pair.teacher.encode_batch([response.data for response in responses])
        marks.append(time.perf_counter())
        logprobs = [-random_logprobs.random(len(spans), np.float32) for spans in encoded]
        scores = [TeacherScores(s, lp, "t", "0") for s, lp in zip(encoded, logprobs, strict=True)]
        rollouts = [
            Rollout(prompt, np.zeros(64, np.int32), r, np.zeros(len(r), np.float32), True, 0, "s")
            for r in responses
        ]
        marks.append(time.perf_counter())
        alignments = [align(r, s.response) for r, s in zip(responses, scores, strict=True)]
        marks.append(time.perf_counter())
        targets = [project(s, a, signal="chunk") for s, a in zip(scores, alignments, strict=True)]
        marks.append(time.perf_counter())
        pack(rollouts, targets, buckets=[LENGTH + 64], rows=count)
        marks.append(time.perf_counter())
        names = ("bytes", "encode", "", "align", "project", "pack")  # the third is this script's own work
        parts = {str(name): float(value) for name, value in zip(names, np.diff(marks), strict=True)}
        del parts[""]
        if not best or sum(parts.values()) < sum(best.values()):
            best = parts
    total = sum(best.values())
    shown = {name: round(value, 5) for name, value in best.items()}
    tokens = count * LENGTH
    return {
        **figure("host_path_seconds", total, f"s for {count} responses of {LENGTH} student tokens", None),
        "parts": shown,
        "tokens_per_second": round(tokens / total),
        "encode_over_align": round(best["encode"] / best["align"], 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = options(__doc__)
    parser.add_argument(
        "--pair",
        nargs=2,
        metavar=("STUDENT", "TEACHER"),
        action="append",
        default=[],
        help="tokenizer folders",
    )
    arguments = parser.parse_args(argv)
    sizes, headline, responses = (
        (SMALL_SIZES, SMALL_SIZES[-1], 2) if arguments.smoke else (SIZES, HEADLINE, RESPONSES)
    )
    report = Report("align", arguments)
    with tempfile.TemporaryDirectory() as scratch:
        pairs = [trained_pair(Path(scratch))]
        for student, teacher in arguments.pair:
            name = f"{Path(student).name} -> {Path(teacher).name}"
            pairs.append(Pair(name, Tokenizer.load(student), Tokenizer.load(teacher)))
        for pair in pairs:
            for row in [*alignment_figures(pair, sizes, headline), host_path(pair, responses)]:
                report.add({"pair": pair.name, **row})
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
