"""One side of a pair as people are told of it: its place, its size, which token plays which role."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxdistill.text import Tokenizer
from jaxdistill.text.files import read_files


@dataclass(frozen=True)
class Side:
    """A tokenizer with its path and the token strings of its roles."""

    path: str
    tokenizer: Tokenizer
    roles: Mapping[str, str]

    @classmethod
    def load(cls, path: str, roles: Mapping[str, str], chat_template: str | Path | None = None) -> "Side":
        """Reads the folder or hub id at `path`; the rest, and errors, as in `Tokenizer.load`."""
        files = read_files(path, chat_template)
        tokenizer = Tokenizer(files, roles or None)
        strings = {entry["id"]: entry["content"] for entry in files.document.get("added_tokens") or []}
        shown = {role: strings.get(index, f"id {index}") for role, index in tokenizer.roles.items()}
        return cls(path, tokenizer, shown)

    @property
    def name(self) -> str:
        """The folder's own name, or the hub id."""
        return Path(self.path).expanduser().resolve().name if Path(self.path).exists() else self.path

    def lines(self, label: str) -> list[str]:
        """Lines for a terminal: the tokenizer, its roles, and the bytes it cannot write if there are any."""
        roles = ", ".join(f"{role} {text}" for role, text in self.roles.items()) or "none known"
        first = f"{label}  {self.path} ({self.tokenizer.family}, {self.tokenizer.vocab_size:,} ids)"
        lacks = self.tokenizer.missing_bytes.hex(" ")
        return [first, f"  roles  {roles}", *([f"  cannot write the bytes  {lacks}"] if lacks else [])]
