"""`python -m jaxdistill.report --run DIR`: writes DIR/report.html and prints its path."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxdistill.cli import exit_code_of
from jaxdistill.report.build import write_report


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, writes the report, and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="jaxdistill report", description="Write report.html of a run folder."
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="the run folder")
    arguments = parser.parse_args(argv)
    return exit_code_of(lambda: print(write_report(arguments.run)))


if __name__ == "__main__":
    sys.exit(main())
