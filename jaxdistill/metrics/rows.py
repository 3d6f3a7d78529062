"""JSON lines on disk, each with its `step`: the format of metrics.jsonl and samples.jsonl.

A process can die between any two bytes. A row is therefore one write of one whole line, a last line
without its end counts as never written, and whatever changes earlier rows writes a new file and
renames it into place.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, SupportsFloat

import numpy as np

from jaxdistill.errors import DataError


class _Line(NamedTuple):
    raw: bytes  # as it stands in the file, without the line end
    row: dict[str, Any]


def jsonable(value: Any) -> Any:
    """`value` as JSON can hold it: numbers of any library become plain ones, NaN and infinity null.

    Mappings, sequences and numpy arrays are converted through and through; whatever is left and is
    not a number raises TypeError.
    """
    match value:
        case None | bool() | str():
            return value
        case Mapping():
            return {str(key): jsonable(item) for key, item in value.items()}
        case list() | tuple():
            return [jsonable(item) for item in value]
        case np.ndarray() | np.generic():
            return jsonable(value.tolist())
        case int():
            return value
        case SupportsFloat():
            number = float(value)
            return number if math.isfinite(number) else None
    raise TypeError(f"got a {type(value).__name__} in a row, expected numbers, text, lists or mappings")


def _encode(row: Mapping[str, Any]) -> bytes:
    text = json.dumps(jsonable(row), ensure_ascii=False, allow_nan=False)
    # A lone surrogate has no UTF-8 form; its backslash escape happens to be the JSON escape as well.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _read_lines(path: Path | None) -> list[_Line]:
    if path is None or not path.exists():
        return []
    *whole, tail = path.read_bytes().split(b"\n")
    lines = [_parse(raw, path, number) for number, raw in enumerate(whole, 1) if raw.strip()]
    if tail:
        # No line end: the writer died inside its write. JSON closes an object with its last byte,
        # so what still parses is whole and anything else is half a row.
        try:
            lines.append(_parse(tail, path, len(whole) + 1))
        except DataError:
            return lines
    return lines


def _parse(raw: bytes, path: Path, number: int) -> _Line:
    try:
        row = json.loads(raw)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
        raise DataError(
            f"{path}, line {number}: got {raw[:80]!r}, expected one JSON object a line ({error}); "
            "repair or delete the line"
        ) from error
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise DataError(
            f"{path}, line {number}: got {raw[:80]!r}, expected an object with a whole number `step`; "
            "repair or delete the line"
        )
    return _Line(raw, row)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a file, in its order; [] where there is no file. A half-written last line is
    left out; a broken line before the last raises DataError."""
    return [line.row for line in _read_lines(path)]


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces the file by `data`: a reader, or a crash, sees the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut as well
    finally:
        os.close(folder)


class RowFile:
    """One append-only file of rows whose steps never fall.

    Without a `path` nothing is written: for a process whose rows another one writes.

    Opening it repairs a half-written last line, so that the next row does not get glued to it.
    `last_step` is the step of the last row, None for an empty file.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        lines = _read_lines(path)
        self.last_step: int | None = lines[-1].row["step"] if lines else None
        if path is not None and path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
            self._rewrite(lines)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows in a single write, and returns when they are on disk.

        Their steps must not lie before `last_step` (ValueError)."""
        if not rows:
            return
        steps = [row["step"] for row in rows]
        if steps != sorted(steps) or (self.last_step is not None and steps[0] < self.last_step):
            raise ValueError(
                f"{self.path}: got rows of steps {steps[:8]} after step {self.last_step}, expected steps "
                "that never fall; call resume_at(step) before logging an earlier step again"
            )
        if self.path is not None:
            data = b"".join(_encode(row) for row in rows)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                try:
                    file.write(data)
                    os.fsync(file.fileno())
                except OSError as error:  # of a full disk the system says no name
                    raise OSError(error.errno, error.strerror, str(self.path)) from error
        self.last_step = steps[-1]

    def replace_from(self, step: int, rows: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
        """Drops every row at or after `step`, puts `rows` in their place, and returns the rows kept.

        Atomic: the file changes as a whole or not at all, and only if something changes."""
        lines = _read_lines(self.path)
        kept = [line for line in lines if line.row["step"] < step]
        added = [_Line(_encode(row).rstrip(b"\n"), dict(row)) for row in rows]
        if len(kept) < len(lines) or added:
            self._rewrite([*kept, *added])
        self.last_step = next((line.row["step"] for line in reversed([*kept, *added])), None)
        return [line.row for line in kept]

    def _rewrite(self, lines: Iterable[_Line]) -> None:
        if self.path is not None:
            write_atomically(self.path, b"".join(line.raw + b"\n" for line in lines))
