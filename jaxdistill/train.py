"""`python -m jaxdistill.train --config FILE [a.b=c ...] [--dry-run]`: one run, from start or resumed."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxdistill.cli import exit_code_of


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, assemble, run; the exit code (see `cli.exit_code_of`)."""
    parser = argparse.ArgumentParser(prog="jaxdistill train", description="Distil a teacher into a student.")
    parser.add_argument("--config", type=Path, required=True, help="a YAML file, see configs/")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan, run nothing"
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace the file's")
    arguments = parser.parse_intermixed_args(argv)
    return exit_code_of(
        lambda: run(arguments.config, arguments.overrides, dry_run=arguments.dry_run),
        after_interrupt="; run the same command again to go on from the last checkpoint",
    )


def run(path: Path, overrides: Sequence[str], *, dry_run: bool) -> None:
    """One run of the config at `path`, with its report at the end, however it ends."""
    # Imported here, not above: jax takes seconds to import, and `--help` needs none of it.
    from jaxdistill.assemble import assemble, plan
    from jaxdistill.config import load
    from jaxdistill.loop import train
    from jaxdistill.report import write_report
    from jaxdistill.run_config import RunConfig

    config = load(path, overrides, RunConfig)
    if dry_run:
        print(plan(config))
        return
    with assemble(config) as assembled:
        try:
            train(assembled)
        finally:
            assembled.metrics.close()
            if (config.run.dir / "metrics.jsonl").is_file():
                print(f"report: {write_report(config.run.dir)}")


if __name__ == "__main__":
    sys.exit(main())
