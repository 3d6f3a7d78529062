"""Files of chats -> `Prompt`s. A bad row is named by file and line; nothing is skipped silently."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxdistill.errors import ConfigError, DataError
from jaxdistill.records import Prompt

_CHAT_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_ROW = 'a row is an object like {"messages": [{"role": "user", "content": "..."}], "answer": "..."}'


def read_prompts(path: Path) -> list[Prompt]:
    """All rows of a .jsonl, .json-lines or .parquet file, in order.

    A row has `messages` (a chat that does not end with the assistant), and optionally `answer` (what a
    scorer compares with), `response` (a reference response) and `source` (default: the file's stem).
    Raises `ConfigError` for a missing or unknown kind of file, `DataError` for a row that is none.
    """
    if not path.is_file():
        raise ConfigError(f"no data file at {path}; data.path and eval.path name .jsonl or .parquet files")
    readers = {".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise ConfigError(f"{path}: unknown kind of data file {path.suffix!r}; expected {', '.join(readers)}")
    prompts = [
        _to_prompt(row, index, path.stem, where)
        for index, (where, row) in enumerate(readers[path.suffix](path))
    ]
    if not prompts:
        raise DataError(f"{path} has no rows")
    return prompts


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield f"{path} line {number}", json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise DataError(f"{path} line {number} is not JSON ({error}); {_ROW}") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except pa.ArrowException as error:
        raise DataError(f"{path} cannot be read as Parquet ({error})") from error
    for number, row in enumerate(rows):
        yield f"{path} row {number}", row


def _to_prompt(row: Any, index: int, stem: str, where: str) -> Prompt:
    messages = row.get("messages") if isinstance(row, Mapping) else None
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where} has no 'messages' list; {_ROW}")
    for message in messages:
        _check_message(message, where)
    if messages[-1]["role"] == "assistant":
        raise DataError(
            f"{where} ends with the assistant's turn; a prompt ends before it "
            "(put a reference response into 'response')"
        )
    fields = {}
    for name in ("answer", "response"):
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: {name!r} is {value!r:.80}; expected a string")
        fields[name] = value
    return Prompt(messages=messages, index=index, source=str(row.get("source") or stem), **fields)


def _check_message(message: Any, where: str) -> None:
    """A template prints whatever it is given, None included: what is no message is refused here."""
    if not isinstance(message, Mapping) or message.get("role") not in _CHAT_ROLES:
        raise DataError(
            f"{where}: a message is {message!r:.80}; expected an object with 'content' and a 'role' of "
            f"{', '.join(_CHAT_ROLES)}"
        )
    content = message.get("content")
    parts = isinstance(content, list) and all(isinstance(p, Mapping) and "type" in p for p in content)
    calls_only = content is None and bool(message.get("tool_calls"))
    if not (isinstance(content, str) or (parts and content) or calls_only):
        raise DataError(
            f"{where}: the content of a {message['role']} message is {content!r:.80}; expected a string, or "
            "a list of parts with a 'type' each"
        )
