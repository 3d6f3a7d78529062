"""What to compare two tokenizers on: the built-in texts, a file, a run's data, or the responses of a run."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from jaxdistill.errors import ConfigError, DataError
from jaxdistill.records import Message

Texts = Mapping[str, Sequence[bytes]]  # kind of text -> responses of that kind

_ROWS = 1000  # of a file of data
_OF_A_RUN = (
    "The run keeps its samples as text: they are encoded anew here by the student's tokenizer, which need\n"
    "not be how the student sampled them."
)

# samples/<kind>.txt, in the order of the table
KINDS = ("English", "code", "LaTeX", "digits", "Chinese", "Japanese", "emoji", "mixed")


def built_in() -> Texts:
    """A short text of each kind that tokenizers are known to cut differently."""
    folder = resources.files("jaxdistill.align").joinpath("samples")
    return {kind: [folder.joinpath(f"{kind}.txt").read_bytes()] for kind in KINDS}


def from_file(path: str) -> Texts:
    """One response: a file's bytes, or standard input for `-`. Any bytes are fine, also invalid UTF-8.

    Raises DataError for a file that cannot be read or is empty.
    """
    name = "standard input" if path == "-" else path
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror}); give a file, or - for stdin") from error
    if not content:
        raise DataError(f"{name}: is empty; give a text of at least one byte")
    return {"stdin" if path == "-" else Path(path).name: [content]}


def from_data(path: Path) -> "RunTexts":
    """What is said in at most 1,000 rows, spread over a run's data, by source. Of a row its reference; where
    that has no text its answer, or else the last message of its prompt.

    Raises what `read_prompts` does, and `DataError` where no row has text."""
    from jaxdistill.data import read_prompts  # Grain takes a second to import

    rows = read_prompts(path)
    texts: dict[str, list[bytes]] = {}
    for row in rows[:: -(-len(rows) // _ROWS)]:
        text = _text(row.response) or row.answer or _text(row.messages[-1])
        if text:
            texts.setdefault(row.source, []).append(text.encode("utf-8", "replace"))
    if not texts:
        raise DataError(f"{path}: no row has text to align; expected a reference, an answer or a prompt")
    said = sum(map(len, texts.values()))
    return RunTexts(texts, None, None, note=f"These are the words of {said:,} of {len(rows):,} rows.")


def _text(message: Message | None) -> str:
    """The text of a message, whose content is a string, a list of parts, or nothing beside calls of tools."""
    content = (message or {}).get("content") or ""
    parts = [content] if isinstance(content, str) else [part.get("text") for part in content]
    return "".join(part for part in parts if isinstance(part, str))


@dataclass(frozen=True)
class RunTexts:
    """The responses of a run's samples.jsonl by step, and the tokenizers its config.yaml names; or other
    texts, and no tokenizers. `note`: what is to be said of the texts.

    Paths stand as the configuration wrote them: relative to where the run was started.
    """

    texts: Texts
    student: str | None
    teacher: str | None
    student_roles: Mapping[str, str] = field(default_factory=dict)
    teacher_roles: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


def from_run(run_dir: Path) -> RunTexts:
    """Reads a finished (or running) run folder.

    samples.jsonl holds text, not ids: whoever aligns it has to encode it anew, and a response that was not
    valid UTF-8 has U+FFFD there. Raises DataError without samples, ConfigError for an unreadable config.
    """
    file = run_dir / "samples.jsonl"
    if not file.is_file():
        raise DataError(
            f"{file}: no such file; expected a run folder with samples (train with eval.path and eval.every)"
        )
    texts: dict[str, list[bytes]] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            step, response = row["step"], row["response"]
            content = response.encode("utf-8", "replace")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{file}, line {number}: expected an object with step and response, got {line[:60]!r}"
            ) from error
        if content:
            texts.setdefault(f"step {step}", []).append(content)
    if not texts:
        raise DataError(f"{file}: holds no response with text in it; let the run evaluate once")
    config = _config(run_dir / "config.yaml")
    student, teacher = _section(config, "student"), _section(config, "teacher")
    return RunTexts(
        texts,
        student.get("path"),
        teacher.get("tokenizer") or teacher.get("model"),
        student.get("roles") or {},
        teacher.get("roles") or {},
        _OF_A_RUN,
    )


def _config(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected YAML, got {' '.join(str(error).split())}; restore it") from error
    return content if isinstance(content, Mapping) else {}


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}
