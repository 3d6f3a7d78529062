"""`python -m jaxdistill.report --run DIR`: writes DIR/report.html and prints its path."""

import sys
from collections.abc import Sequence
from pathlib import Path

from jaxdistill.cli import CommandParser, exit_code_of
from jaxdistill.report.build import write_report


def parser() -> CommandParser:
    """What the command takes."""
    parser = CommandParser("report", "Write report.html of a run folder: curves, samples, settings.")
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="the run folder")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, writes the report, and returns the exit code."""
    arguments = parser().read(argv)
    return exit_code_of(lambda: print(write_report(arguments.run)), arguments)


if __name__ == "__main__":
    sys.exit(main())
