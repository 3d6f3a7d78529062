"""What a command says on its way, on stderr: text for people, or one JSON object a line for programs.

Everything goes through `logging`, warnings of the libraries included, so that one handler decides how it
looks. Results (a table, a path, a plan) are no part of it: they are what was asked for, and go to stdout.
"""

import json
import logging
import os
import select
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

Format = Literal["text", "json"]

_OURS = "jaxdistill"
_FIELDS = "fields"  # of a record: what JSON says beside the message

logger = logging.getLogger(__name__)


@dataclass
class _Speech:
    """How this process speaks; a library that nobody asked speaks text."""

    style: Format = "text"
    quiet: bool = False


_now = _Speech()


def quiet() -> bool:
    """Whether nothing but errors is wanted."""
    return _now.quiet


def as_json() -> bool:
    """Whether every line is to be a JSON object."""
    return _now.style == "json"


@contextmanager
def speaking(style: Format, *, silent: bool) -> Iterator[None]:
    """While the context lasts, what is logged goes to stderr as `style`; with `silent` errors alone.

    Warnings of Python's own `warnings` are logged too where they would break the lines of JSON or the
    silence. What libraries of C++ write to stderr by themselves cannot be caught here."""
    root, ours = logging.getLogger(), logging.getLogger(_OURS)
    handler = _Handler()
    handler.setFormatter(_Json() if style == "json" else _Text())
    handler.setLevel(logging.ERROR if silent else logging.INFO if style == "json" else logging.WARNING)
    before, level = replace(_now), ours.level
    _now.style, _now.quiet = style, silent
    captured = style == "json" or silent
    # A library that logs while it is imported gives the root a handler of its own: lines would come twice.
    others = [one for one in root.handlers if type(one) is logging.StreamHandler]
    for one in others:
        root.removeHandler(one)
    root.addHandler(handler)
    ours.setLevel(logging.INFO)
    if captured:
        logging.captureWarnings(True)
    try:
        yield
    finally:
        if captured:
            logging.captureWarnings(False)
        root.removeHandler(handler)
        for one in others:
            root.addHandler(one)
        ours.setLevel(level)
        _now.style, _now.quiet = before.style, before.quiet


def say(level: int, message: str, **fields: Any) -> None:
    """One line of ours: `message` for people; programs also get `fields` (what JSON can hold)."""
    logger.log(level, "%s", message, extra={_FIELDS: fields})


def say_error(error: BaseException, exit_code: int, message: str | None = None) -> None:
    """The last word of a command that ends with `exit_code`; `message` in the place of the error's own."""
    said = str(error) if message is None else message
    say(logging.ERROR, said, error=type(error).__name__, exit_code=exit_code)


def tell(result: str) -> None:
    """Print a result that nobody has to read: where stdout has no reader any more it is lost."""
    try:
        print(result, flush=True)
    except BrokenPipeError:
        forget(sys.stdout)


def flushed(stream: Any) -> bool:
    """Whether all that was written to `stream` has come through; if not, its reader has gone, and what is
    left for it is forgotten."""
    try:
        if stream is not None:
            stream.flush()
    except BrokenPipeError:
        forget(stream)
        return False
    return True


def unread(stream: Any) -> bool:
    """Whether `stream` is a pipe or a socket whose reader has gone."""
    asked = select.poll()
    with suppress(OSError, ValueError):  # of what is no stream of the system's nothing is asked
        if stream is not None:
            asked.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in asked.poll(0))


def forget(stream: Any) -> None:
    """From now on what is written to `stream`, or still held by it, goes nowhere: Python would try again to
    write it at the very end, and end with 120 for that."""
    with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
        if stream is not None:
            os.dup2(nowhere.fileno(), stream.fileno())


class _Handler(logging.Handler):
    """Writes to whatever stderr is at that moment: a live display puts itself in its place. Where nobody
    reads it any more what is said is lost, not what was being done."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr
        if stream is None:  # it was closed before Python began
            return
        said = self.format(record)
        try:
            # One write a line, so that the lines of several processes do not end up in each other.
            stream.write(said + "\n")
            stream.flush()
        except BrokenPipeError:
            forget(stream)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        name = _OURS if record.name.partition(".")[0] == _OURS else record.name
        kind = "warning: " if record.levelno == logging.WARNING else ""
        return f"{name}: {kind}{super().format(record)}"


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, Any] = getattr(record, _FIELDS, {})
        row = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **fields,
        }
        if record.exc_info:
            row["traceback"] = self.formatException(record.exc_info)
        return json.dumps(row, ensure_ascii=False, default=str)
