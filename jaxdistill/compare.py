"""`python -m jaxdistill.compare RUN RUN ... [--html FILE] [--svg FILE]`: runs side by side."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxdistill.cli import CommandParser, exit_code_of
from jaxdistill.report.comparison import (
    Row,
    Runs,
    circumstances,
    figures,
    picture,
    read_runs,
    render,
    settings,
)
from jaxdistill.report.pages import write_page

_WIDE = 100_000  # columns of what is no terminal: nobody cuts lines there


def parser() -> CommandParser:
    """What the command takes."""
    parser = CommandParser(
        "compare",
        "Put runs side by side: their last and best figures, the settings in which they differ, and with "
        "--html their curves and samples.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folders, or LABEL=DIR to call one by another name"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with the curves")
    parser.add_argument(
        "--svg",
        type=Path,
        metavar="FILE",
        help="also draw held-out accuracy and reverse KL per byte as one picture",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, write the files asked for; the exit code (see `cli.exit_code_of`)."""
    options = parser()
    arguments = options.read(argv)
    if len(arguments.runs) < 2:
        options.error("one run is nothing to compare; name two or more")
    return exit_code_of(lambda: compare(arguments.runs, arguments.html, arguments.svg), arguments)


def compare(folders: Sequence[str], page: Path | None, drawing: Path | None) -> None:
    """Print the runs in `folders` (`DIR` or `LABEL=DIR`) side by side; write them as a page and as a picture
    where a file is given. Raises `ConfigError` and `DataError` (`read_runs`, `picture`, `write_page`)."""
    runs = read_runs(folders)
    if drawing is not None:  # before anything is printed: it can be refused
        write_page(drawing, picture(runs))
    if page is not None:
        write_page(page, render(runs))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDE)
    with console.capture() as said:
        for heading, rows in (
            ("figures, first to last", figures(runs)),
            ("settings that differ (config.yaml)", settings(runs)),
            ("what else differs (manifest.json)", circumstances(runs)),
        ):
            if rows:
                console.print(_table(heading, rows, runs))
    print("\n".join(line.rstrip() for line in said.get().splitlines()))
    for file in (page, drawing):
        if file is not None:
            print(file)


def _table(heading: str, rows: Sequence[Row], runs: Runs) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(Text(heading, style="bold"))
    for label in runs:
        table.add_column(Text(label, style="bold"), overflow="fold")
    for row in rows:
        cells = [Text(cell.text, style="bold green" if cell.best else "") for cell in row.cells]
        table.add_row(Text(row.name), *cells)
    table.add_row()
    return table


if __name__ == "__main__":
    sys.exit(main())
