"""Files of chats -> `Prompt`s. A bad row is named by file and line; nothing is skipped silently."""

import json
import logging
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jaxdistill.config import nearest
from jaxdistill.errors import ConfigError, DataError
from jaxdistill.records import Prompt

logger = logging.getLogger(__name__)

_CHAT_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_KEYS = frozenset({"messages", "answer", "response", "tools", "metadata", "source"})
_ROW = 'a row is an object like {"messages": [{"role": "user", "content": "..."}], "answer": "..."}'


def read_prompts(path: Path) -> list[Prompt]:
    """All rows of a .jsonl, .json-lines or .parquet file, in order.

    A row has `messages`, and optionally `answer` (what a scorer compares with), `response` (the text of a
    reference response), `tools` (tool descriptions, as a list or as its JSON text), `metadata` (an object
    for the row's scorer, or its JSON text) and `source` (default: the file's stem). Messages that end with
    the assistant's turn are a prompt and its reference. Other keys are not read; of one that
    is nearly one of these, and stands in its place, it is said.
    Raises `ConfigError` for a missing or unknown kind of file, `DataError` for a row that is none.
    """
    if not path.is_file():
        raise ConfigError(f"no data file at {path}; data.path and eval.path name .jsonl or .parquet files")
    readers = {".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise ConfigError(f"{path}: unknown kind of data file {path.suffix!r}; expected {', '.join(readers)}")
    prompts, doubted = [], set[str]()
    for index, (where, row) in enumerate(readers[path.suffix](path)):
        prompts.append(_to_prompt(row, index, path.stem, where))
        _warn_of_misspelt(row, where, doubted)
    if not prompts:
        raise DataError(f"{path} has no rows; {_ROW}")
    return prompts


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield f"{path} line {number}", json.loads(line.rstrip())
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
        yield f"{path} row {number}", _without_absent(row)


def _without_absent(value: Any) -> Any:
    """Parquet gives every message all keys of the column, absent ones as None; many templates ask whether a
    key is there."""
    if isinstance(value, dict):
        return {key: _without_absent(inner) for key, inner in value.items() if inner is not None}
    return [_without_absent(inner) for inner in value] if isinstance(value, list) else value


def _to_prompt(row: Any, index: int, stem: str, where: str) -> Prompt:
    messages = row.get("messages") if isinstance(row, Mapping) else None
    if not isinstance(messages, list) or not messages:
        has = f" (it has {', '.join(map(repr, row))})" if isinstance(row, Mapping) and row else ""
        raise DataError(f"{where} has no 'messages' list{has:.200}; {_ROW}")
    for message in messages:
        _check_message(message, where)
    for name in ("answer", "response"):
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: {name!r} is {value!r:.80}; expected a string")
    response = None if row.get("response") is None else {"role": "assistant", "content": row["response"]}
    if messages[-1]["role"] == "assistant":
        if response is not None:
            raise DataError(
                f"{where} ends with the assistant's turn and has a 'response' too; expected one of them, the "
                "reference that follows the prompt"
            )
        *messages, response = messages
        if not messages:
            raise DataError(f"{where} holds nothing but an assistant's turn; expected a prompt before it")
    return Prompt(
        messages=messages,
        index=index,
        source=str(row.get("source") or stem),
        answer=row.get("answer"),
        response=response,
        tools=_tools(row.get("tools"), where),
        metadata=_metadata(row.get("metadata"), where),
        place=where,
    )


@cache  # rows mostly have the same keys
def _meant(name: str) -> str | None:
    return nearest(name, sorted(_KEYS), 0.82)  # anwser, but not resources


def _warn_of_misspelt(row: Mapping[str, Any], where: str, said: set[str]) -> None:
    """Say once a key that is not read and is nearly one the row lacks."""
    for name in row.keys() - _KEYS - said:
        meant = _meant(name)
        if meant is not None and meant not in row:
            said.add(name)
            logger.warning("%s has %r, which is not read, and no %r; did you mean that?", where, name, meant)


def _from_text(name: str, value: Any, where: str) -> Any:
    """`tools` and `metadata` differ in shape from row to row, which a Parquet column cannot hold: there
    they are written as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: {name!r} is text that is not JSON ({error})") from error


def _metadata(value: Any, where: str) -> Mapping[str, Any] | None:
    value = _from_text("metadata", value, where)
    if value is not None and not isinstance(value, Mapping):
        raise DataError(f"{where}: 'metadata' is {value!r:.80}; expected an object, or its JSON text")
    return value


def _tools(value: Any, where: str) -> list[Mapping[str, Any]] | None:
    value = _from_text("tools", value, where)
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise DataError(
            f"{where}: 'tools' is {value!r:.80}; expected a list of tool descriptions, or its JSON text"
        )
    return value


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
