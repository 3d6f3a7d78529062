"""The nasty corpus: our own texts, by kind, that have broken tokenizers and aligners.

`nasty.jsonl` has one object a line: `kind`, and either `text` (JSON string; whatever an editor could hide or
compose is written as an escape) or `hex` (any bytes). Loaded by path, since test folders are no packages.
"""

import json
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("nasty.jsonl")
LONG_LETTER = "long_letter"  # the one kind that is too long for a file


class Sample(NamedTuple):
    """One text of the corpus, as the bytes a model would have written."""

    kind: str
    data: bytes

    @property
    def is_text(self) -> bool:
        """Whether the bytes are valid UTF-8."""
        return self.data.decode("utf-8", errors="ignore").encode() == self.data


def samples() -> list[Sample]:
    """Every text of the file, in its order."""
    read = []
    for line in FILE.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        read.append(Sample(row["kind"], bytes.fromhex(row["hex"]) if "hex" in row else row["text"].encode()))
    return read


def long_letter(length: int = 1_000_000) -> Sample:
    """One letter a million times: one word, whatever the pre-tokenizer looks for."""
    return Sample(LONG_LETTER, b"a" * length)


def by_kind() -> dict[str, list[bytes]]:
    """The texts of each kind, kinds in the file's order."""
    kinds: dict[str, list[bytes]] = {}
    for sample in samples():
        kinds.setdefault(sample.kind, []).append(sample.data)
    return kinds
