"""Prompts in many languages: paragraphs of the Debian Reference, cut into a beginning and its continuation.

    python scripts/fetch_multilingual.py [--out DIR]

The book's translations are Debian packages (GPL-2+ by its authors, named in each package), fetched with
`apt-get download`, which needs no root. Nothing of them is committed. The rows are
`{"messages": [{"role": "user", "content": BEGINNING}], "response": CONTINUATION}`, for a model that
continues plain text (configs/templates/completion.jinja). Half of the rows are Chinese. Some chapters are
held out, in all languages, so that a paragraph and its translation are on one side. No text is in two rows:
what stands in chapters of both sides is held out.
"""

import argparse
import gzip
import itertools
import json
import random
import re
import subprocess
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gguf_folder import CACHE

from jaxdistill.errors import DataError, JaxDistillError
from jaxdistill.metrics.rows import write_atomically

Row = dict[str, Any]  # of a JSONL file

LANGUAGES = ("zh-cn", "zh-tw", "ja", "de", "fr", "es", "it", "pt", "id", "en")
CHINESE = ("zh-cn", "zh-tw")
HELD_OUT_CHAPTERS = (2, 10)
LENGTHS = range(90, 181)
"""Bytes of what is taken of a paragraph: all of it, or whole sentences from its beginning."""
BEGINNING = 0.4
"""Share of its bytes that is prompt."""

_SENTENCES = re.compile(r".*(?:[\u3002\uff01\uff1f]|[.!?](?= ))", re.DOTALL)
_CAPTION = re.compile(r"\w+ ?\d+\.\d+")
_SECTION = re.compile(r"^(\d+)\.\d+(?:\.\d+)*\. \S")


def download(language: str, folder: Path) -> str:
    """The book's plain text in `language`. Raises DataError where the package cannot be had."""
    package = f"debian-reference-{language}"
    run("apt-get", "download", "-q", package, folder=folder)
    archives = sorted(path.name for path in folder.glob(f"{package}_*.deb"))
    if len(archives) != 1:
        raise DataError(
            f"apt-get download left {archives or 'no file'}, expected one {package}_*.deb; see what "
            f"apt-cache policy {package} says"
        )
    run("dpkg-deb", "-x", archives[0], package, folder=folder)
    texts = sorted((folder / package).rglob("debian-reference.*.txt.gz"))
    if not texts:
        raise DataError(f"{package} holds no debian-reference.*.txt.gz; its layout has changed")
    return gzip.decompress(texts[0].read_bytes()).decode()


def run(*command: str, folder: Path) -> None:
    """Run a command in `folder`. Raises DataError where it is not installed or fails, with what it said."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise DataError(
            f"{error.filename} is not here; the texts are Debian packages, run this on Debian"
        ) from None
    if done.returncode:
        raise DataError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr.strip()}")


def paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """(chapter, paragraph) of running text; headings, lists, tables and commands are left out.

    A paragraph's lines are indented by four spaces, no more. They are joined without a space where East
    Asian wide characters meet, else with one."""
    chapter = 0
    for block in re.split(r"\n\s*\n", text.replace("\N{NO-BREAK SPACE}", " ")):
        if heading := _SECTION.match(block):
            chapter = int(heading[1])
        lines = block.strip("\n").split("\n")
        if not chapter or not all(re.match(r" {4}[^\s$#|+%*<\[]", line) for line in lines):
            continue
        joined = lines[0].strip()
        for line in lines[1:]:
            line = line.strip()
            joined += ("" if wide(joined[-1]) or wide(line[0]) else " ") + line
        if not _CAPTION.match(joined):
            yield chapter, joined


def taken(paragraph: str) -> str | None:
    """The paragraph, or as many of its first sentences as `LENGTHS` has room for; None if neither fits."""
    room = paragraph.encode()[: LENGTHS[-1]].decode(errors="ignore")
    if room != paragraph:
        sentences = _SENTENCES.match(room)
        room = sentences[0] if sentences else ""
    return room if len(room.encode()) in LENGTHS else None


def wide(character: str) -> bool:
    """Whether no space belongs beside this character."""
    return unicodedata.east_asian_width(character) in "WF"


def cut(paragraph: str) -> tuple[str, str] | None:
    """Beginning and continuation: the cut falls before a space or between wide characters. None if no such
    place comes after the beginning's share."""
    size = len(paragraph.encode())
    for i in range(1, len(paragraph)):
        here, before = paragraph[i], paragraph[i - 1]
        if (here == " " or (wide(here) and wide(before))) and len(paragraph[:i].encode()) >= BEGINNING * size:
            return paragraph[:i], paragraph[i:]
    return None


def rows_of(books: dict[str, str]) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows, shuffled, each of another text. A paragraph that stands in two books was
    not translated: only the English book's is taken."""
    found = {language: list(dict.fromkeys(paragraphs(text))) for language, text in books.items()}
    holders = Counter(paragraph for group in found.values() for paragraph in {text for _, text in group})
    sides: tuple[dict[str, list[Row]], ...] = ({}, {})
    for language, group in found.items():
        for chapter, paragraph in group:
            text = taken(paragraph)
            parts = cut(text) if text else None
            if parts is None or (holders[paragraph] > 1 and language != "en"):
                continue
            beginning, continuation = parts
            row = {
                "messages": [{"role": "user", "content": beginning}],
                "response": continuation,
                "metadata": {"language": language},
            }
            sides[chapter in HELD_OUT_CHAPTERS].setdefault(language, []).append(row)
    seen: set[str] = set()
    heldout = unseen(mixed(sides[1]), seen)
    return unseen(mixed(sides[0]), seen), heldout


def mixed(by_language: dict[str, list[Row]]) -> list[Row]:
    """Chinese and other languages in turn, each in an order drawn with a fixed seed, until one runs out."""
    generator = random.Random(0)
    halves = [
        [row for language, rows in by_language.items() if (language in CHINESE) == chinese for row in rows]
        for chinese in (True, False)
    ]
    for half in halves:
        generator.shuffle(half)
    return list(itertools.chain.from_iterable(zip(*halves, strict=False)))


def unseen(rows: list[Row], seen: set[str]) -> list[Row]:
    """The rows whose text is not in `seen`, which has it from then on. Two paragraphs may begin with the same
    sentences, as where a translation left them in English."""
    kept = []
    for row in rows:
        text = row["messages"][0]["content"] + row["response"]
        if text not in seen:
            seen.add(text)
            kept.append(row)
    return kept


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Write train.jsonl and heldout.jsonl of multilingual prompts."
    )
    parser.add_argument("--out", type=Path, default=CACHE / "multilingual", metavar="DIR")
    arguments = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as folder:
            books = {language: download(language, Path(folder)) for language in LANGUAGES}
        for name, rows in zip(("train", "heldout"), rows_of(books), strict=True):
            path = arguments.out / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(
                path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
            )
            counts = Counter(row["metadata"]["language"] for row in rows)
            print(f"{path}: {len(rows)} rows, {dict(sorted(counts.items()))}")
    except JaxDistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
