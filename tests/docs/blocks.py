"""The fenced blocks of a Markdown file, and how what a block shows is compared with what came.

- ```` ```bash ````: commands, run as one script that ends at the first failure.
- ```` ```console ````: behind `$ ` a command, below it what it prints (stdout and stderr, as on a terminal).
- ```` ```python ````: run by itself.
- `<!-- not run: REASON -->` before a block: not run, and the reason stands in the page's source.
- `<!-- numbers within N % -->` before a block: numbers in what it shows may differ by so much.

In what is shown `...` stands for any text within a line, and a line of nothing else for any lines.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

RUN = ("bash", "console", "python")
SHOWN = ("yaml", "text", "json")  # nothing in it is a command
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\S*)\s*\n(?P<body>.*?)^(?P=indent)```\s*$", re.M | re.S)
_COMMENT = re.compile(r"<!--\s*((?:(?!-->).)*?)\s*-->\Z", re.S)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


@dataclass(frozen=True)
class Block:
    """One fenced block. `line` is that of its fence; `not_run` the reason why it is not run, None where it
    is; `tolerance` the share by which a number may differ from the shown one."""

    path: Path
    line: int
    language: str
    body: str
    not_run: str | None
    tolerance: float

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}"

    def commands(self) -> Iterator[tuple[str, list[str]]]:
        """Of a `console` block: each command with the lines shown below it."""
        command, shown = "", []
        for line in self.body.splitlines():
            if line.startswith("$ "):
                if command:
                    yield command, shown
                command, shown = line[2:], []
            elif command.endswith("\\"):
                command += f"\n{line}"
            elif command:
                shown.append(line)
            else:
                raise ValueError(f"{self.where}: a console block begins with `$ ` and a command: {line!r}")
        if command:
            yield command, shown


def blocks(root: Path, path: Path) -> list[Block]:
    """All fenced blocks of the Markdown file `path` below `root`. Raises `ValueError` for a comment before a
    block that looks like one of the rules above and is none."""
    text = (root / path).read_text()
    found = []
    for match in _FENCE.finditer(text):
        before = text[: match.start()].rstrip()
        comment = _COMMENT.search(before)
        said = comment[1] if comment else ""
        line = text.count("\n", 0, match.start()) + 1
        not_run = re.fullmatch(r"not run: (.+)", said, re.S)
        within = re.fullmatch(r"numbers within (\d+) %", said)
        if said and not (not_run or within):
            raise ValueError(f"{path}:{line}: the comment {said!r} before a block says nothing that is known")
        body = re.sub(f"^{match['indent']}", "", match["body"], flags=re.M)
        tolerance = int(within[1]) / 100 if within else 0.0
        found.append(Block(path, line, match["language"], body, not_run and not_run[1], tolerance))
    return found


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def line_fits(shown: str, came: str, tolerance: float = 0.0) -> bool:
    """Whether a line that came is the shown one."""
    if not tolerance:
        pattern = ".*?".join(re.escape(part) for part in shown.rstrip().split("..."))
        return re.fullmatch(pattern, came.rstrip()) is not None
    pattern, place = "", 0
    tokens = re.compile(rf"\.\.\.|\s+|{_NUMBER.pattern}")
    for match in tokens.finditer(shown.rstrip()):
        pattern += re.escape(shown[place : match.start()])
        place = match.end()
        # A number that is a digit longer moves what is beside it.
        pattern += ".*?" if match[0] == "..." else r"\s+" if match[0].isspace() else f"({_NUMBER.pattern})"
    fits = re.fullmatch(pattern + re.escape(shown.rstrip()[place:]), came.rstrip())
    if fits is None:
        return False
    wanted = [m[0] for m in tokens.finditer(shown.rstrip()) if m[0] != "..." and not m[0].isspace()]
    return all(
        math.isclose(_number(got), _number(want), rel_tol=tolerance)
        for got, want in zip(fits.groups(), wanted, strict=True)
    )


def fits(shown: Sequence[str], came: Sequence[str], tolerance: float = 0.0) -> bool:
    """Whether the lines that came are the shown ones."""
    if not shown:
        return not came
    if shown[0].strip() == "...":
        return any(fits(shown[1:], came[skipped:], tolerance) for skipped in range(len(came) + 1))
    return bool(came) and line_fits(shown[0], came[0], tolerance) and fits(shown[1:], came[1:], tolerance)
