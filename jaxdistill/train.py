"""`python -m jaxdistill.train --config FILE [a.b=c ...] [--dry-run]`: one run, from start or resumed."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxdistill.assemble import assemble, plan
from jaxdistill.cli import exit_code_of
from jaxdistill.config import load
from jaxdistill.loop import train
from jaxdistill.report import write_report
from jaxdistill.run_config import RunConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, assemble, run; the exit code (see `cli.exit_code_of`)."""
    parser = argparse.ArgumentParser(prog="jaxdistill train", description="Distil a teacher into a student.")
    parser.add_argument("--config", type=Path, required=True, help="a YAML file, see configs/")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan, run nothing"
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace the file's")
    arguments = parser.parse_intermixed_args(argv)

    def body() -> None:
        config = load(arguments.config, arguments.overrides, RunConfig)
        if arguments.dry_run:
            print(plan(config))
            return
        with assemble(config) as run:
            train(run)
        print(f"report: {write_report(config.run.dir)}")

    return exit_code_of(body)


if __name__ == "__main__":
    sys.exit(main())
