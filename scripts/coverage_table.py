"""How much of the nasty corpus aligns for every ordered pair of tokenizers, as Markdown tables.

    python scripts/coverage_table.py [--tokenizers DIR] [NAME ...]

Uses the folders that `scripts/fetch_tokenizers.py` makes, and the toy pair. The text is what each student
would write canonically; the teacher reads the same bytes.

Letters: R student tokens.
"""

import argparse
import importlib.util
import os
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from jaxdistill.align import align
from jaxdistill.errors import ConfigError, JaxDistillError
from jaxdistill.records import TokenSpans
from jaxdistill.text import Tokenizer

ROOT = Path(__file__).parents[1]
CACHE = Path(os.environ.get("JAXDISTILL_CACHE", "~/.cache/jaxdistill")).expanduser()
TOY = {"toy_student": ROOT / "assets/toy/student", "toy_teacher": ROOT / "assets/toy/teacher"}


@dataclass
class Shares:
    """Counts of student tokens by class, and of bytes; adds up over texts."""

    exact: int = 0
    chunk: int = 0
    unaligned: int = 0
    agreeing_bytes: int = 0  # of responses whose bytes are the same on both sides
    aligned_bytes: int = 0  # of these, in a chunk
    differing: int = 0  # responses with bytes that the teacher has no token for
    writable_bytes: int = 0  # of these, the bytes it has one for
    written_bytes: int = 0  # and of those, in a chunk

    def add(self, student: TokenSpans, teacher: TokenSpans) -> None:
        """Count one response; `align` has checked that the bytes of every chunk are equal."""
        alignment = align(student, teacher)
        aligned = alignment.student_chunk >= 0
        exact = int(alignment.exact[alignment.student_chunk[aligned]].sum())
        self.exact += exact
        self.chunk += int(aligned.sum()) - exact
        self.unaligned += int((~aligned).sum())
        covered = int(np.diff(student.ends, prepend=0)[aligned].sum())
        if student.data == teacher.data:
            self.agreeing_bytes += len(student.data)
            self.aligned_bytes += covered
        else:
            self.differing += 1
            self.writable_bytes += len(teacher.data)
            self.written_bytes += covered

    @property
    def percent(self) -> tuple[float, float, float]:
        """Shares of the student's tokens: one-to-one, in chunks of several, unaligned."""
        total = max(self.exact + self.chunk + self.unaligned, 1)
        return 100 * self.exact / total, 100 * self.chunk / total, 100 * self.unaligned / total


def load_corpus() -> ModuleType:
    """`tests/corpus/corpus.py`, by path: test folders are no packages."""
    spec = importlib.util.spec_from_file_location("nasty_corpus", ROOT / "tests/corpus/corpus.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_tokenizers(folder: Path, names: Sequence[str]) -> dict[str, Tokenizer]:
    """The named tokenizers, or all below `folder` and the toy pair. Raises ConfigError without them."""
    found = {path.name: path for path in sorted(folder.glob("*")) if (path / "tokenizer.json").is_file()}
    found.update(TOY)
    missing = [name for name in names if name not in found]
    if missing or len(found) == len(TOY):
        raise ConfigError(
            f"{missing[0] if missing else 'no tokenizer'} is not in {folder} (there: {', '.join(found)}); "
            "fetch them with: python scripts/fetch_tokenizers.py"
        )
    return {name: Tokenizer.load(str(found[name])) for name in names or found}


def measure(
    tokenizers: Mapping[str, Tokenizer], texts: Mapping[str, Sequence[bytes]]
) -> dict[tuple[str, str, str], Shares]:
    """Shares by (student, teacher, kind of text)."""
    counted: dict[tuple[str, str, str], Shares] = defaultdict(Shares)
    for kind, contents in texts.items():
        written = {name: tokenizer.encode_batch(contents) for name, tokenizer in tokenizers.items()}
        for student, sides in written.items():
            for teacher, tokenizer in tokenizers.items():
                if student == teacher:
                    continue
                same = [spans.data for spans in sides] == list(contents)
                read = written[teacher] if same else tokenizer.encode_batch([spans.data for spans in sides])
                for mine, other in zip(sides, read, strict=True):
                    counted[student, teacher, kind].add(mine, other)
    return dict(counted)


def total(counted: Mapping[tuple[str, str, str], Shares], **where: str) -> Shares:
    """The sum over all entries whose student, teacher and kind are those given."""
    summed = Shares()
    for (student, teacher, kind), shares in counted.items():
        place = {"student": student, "teacher": teacher, "kind": kind}
        if all(place[key] == value for key, value in where.items()):
            for field, value in vars(shares).items():
                setattr(summed, field, getattr(summed, field) + value)
    return summed


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def shown(share: float) -> str:
    """A percentage that says 0 or 100 only where it is."""
    return f"{share:.0f}" if share in (0, 100) or 1 <= share <= 99 else f"{share:.1f}"


def pair_table(counted: Mapping[tuple[str, str, str], Shares], names: Sequence[str], kinds: set[str]) -> str:
    """A row for each student, a column for each teacher: exact / chunk / unaligned in percent."""
    chosen = {key: shares for key, shares in counted.items() if key[2] in kinds}
    lines = [row(["student \\ teacher", *names]), row(["---", *["---"] * len(names)])]
    for student in names:
        cells = []
        for teacher in names:
            shares = total(chosen, student=student, teacher=teacher).percent
            cells.append("" if student == teacher else " / ".join(map(shown, shares)))
        lines.append(row([student, *cells]))
    return "\n".join(lines)


def kind_table(counted: Mapping[tuple[str, str, str], Shares], kinds: Sequence[str]) -> str:
    """A row for each kind of text, over all pairs in `counted`."""
    head = [
        "kind of text",
        "exact",
        "chunk",
        "unaligned",
        "least exact, and its pair",
        "bytes that agree, covered",
    ]
    lines = [row(head), row(["---"] * len(head))]
    for kind in kinds:
        shares = total(counted, kind=kind)
        pairs = {(s, t): value.percent[0] for (s, t, k), value in counted.items() if k == kind}
        (student, teacher), least = min(pairs.items(), key=lambda entry: entry[1])
        covered = 100 * shares.aligned_bytes / max(shares.agreeing_bytes, 1)
        numbers = [shown(share) for share in shares.percent]
        lines.append(row([kind, *numbers, f"{shown(least)} ({student} → {teacher})", f"{shown(covered)} %"]))
    return "\n".join(lines)


def main() -> int:
    """Command line: prints the tables; exit 2 with one line on stderr when a tokenizer is missing, 1 when
    bytes that agree are not all covered."""
    parser = argparse.ArgumentParser(
        description="Alignment of every ordered pair of tokenizers, as Markdown."
    )
    parser.add_argument("--tokenizers", type=Path, default=CACHE / "tokenizers", help="default: %(default)s")
    parser.add_argument("names", nargs="*", metavar="NAME", help="which ones (default: all)")
    arguments = parser.parse_args()
    corpus = load_corpus()
    try:
        tokenizers = load_tokenizers(arguments.tokenizers.expanduser(), arguments.names)
    except JaxDistillError as error:
        print(f"coverage_table: {error}", file=sys.stderr)
        return error.exit_code
    long = corpus.long_letter()
    texts = {**corpus.by_kind(), long.kind: [long.data]}
    counted = measure(tokenizers, texts)
    names = list(tokenizers)
    print(pair_table(counted, names, {kind for kind in texts if kind != long.kind}), end="\n\n")
    fetched = {key: shares for key, shares in counted.items() if not {*key[:2]} & {*TOY}}
    print(kind_table(fetched or counted, list(texts)), end="\n\n")
    everything = total(counted)
    print(
        f"{len(names)} tokenizers, {len(names) * (len(names) - 1)} ordered pairs. Where both sides hold the "
        f"same bytes, {everything.aligned_bytes:,} of {everything.agreeing_bytes:,} lie in a chunk. In "
        f"{everything.differing} responses the teacher lacks a token for some bytes; of the "
        f"{everything.writable_bytes:,} it can write there, {everything.written_bytes:,} lie in a chunk."
    )
    return 0 if everything.aligned_bytes == everything.agreeing_bytes else 1


if __name__ == "__main__":
    sys.exit(main())
