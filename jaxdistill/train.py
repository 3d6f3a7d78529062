"""`python -m jaxdistill.train --config FILE [a.b=c ...] [--dry-run [--device-memory GiB] | --explain a.b.c]`:
one run, from start or resumed."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from jaxdistill import logs
from jaxdistill.cli import CommandParser, exit_code_of, overrides
from jaxdistill.errors import ConfigError
from jaxdistill.stopping import Stop


def parser() -> CommandParser:
    """What the command takes."""
    parser = CommandParser(
        "train", "Distil a teacher into a student: one run, from its start or from its last checkpoint."
    )
    parser.add_argument(
        "--config", type=Path, required=True, metavar="FILE", help="a YAML file, see configs/"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan, run nothing"
    )
    parser.add_argument(
        "--explain",
        metavar="a.b.c",
        help="of a setting or a section: what it means, its value, its default, who set it; run nothing",
    )
    parser.add_argument(
        "--device-memory",
        type=_positive,
        metavar="GiB",
        help="with --dry-run: what each device has, for the plan of another machine",
    )
    parser.add_argument(
        "--allow-changed",
        action="append",
        default=[],
        metavar="a.b.c",
        help="go on although this has changed: a setting, a fingerprint of the manifest, teachers.NAME",
    )
    hosts = parser.add_argument_group("one of several processes (docs/hosts.md)")
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is reached")
    hosts.add_argument(
        "--processes", type=int, metavar="N", help="how many there are; 1: alone, whatever JAX finds"
    )
    hosts.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")
    overrides(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, assemble, run; the exit code (see `cli.exit_code_of`)."""
    options = parser()
    arguments = options.read(argv)
    path, given, memory = arguments.config, arguments.overrides, arguments.device_memory
    if arguments.explain is not None:
        return exit_code_of(lambda: show_setting(path, given, arguments.explain), arguments)
    if arguments.dry_run:
        bytes_of_each, allowed = memory and memory * 2**30, arguments.allow_changed
        return exit_code_of(lambda: show_plan(path, given, bytes_of_each, allowed), arguments)
    if memory is not None:
        options.error("--device-memory goes with --dry-run; a run takes the devices that are there")
    place = (arguments.coordinator, arguments.processes, arguments.process)
    return exit_code_of(
        lambda: run(path, given, arguments.allow_changed, place),
        arguments,
        after_stop="; run the same command again to go on from the last checkpoint, if there is one",
    )


Flags = tuple[str | None, int | None, int | None]  # coordinator, processes, process


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)  # argparse says it with the option's name
    return value


def show_setting(path: Path, overrides: Sequence[str], key: str) -> None:
    """Print what `--explain` says of a setting or section of the config at `path`."""
    from jaxdistill.config import describe  # as in `show_plan`
    from jaxdistill.run_config import RunConfig

    print(describe(path, overrides, RunConfig, key))


def show_plan(
    path: Path, overrides: Sequence[str], device_memory: float | None, allowed: Sequence[str]
) -> None:
    """Print the plan of the config at `path`, for devices of `device_memory` bytes (None: what those here
    say); `allowed` as in `run`.

    Raises `ConfigError` behind it where that run would be refused, or does not fit."""
    # Imported here, not above: jax takes seconds to import, and `--help` needs none of it.
    from jaxdistill.assemble import plan
    from jaxdistill.config import load
    from jaxdistill.run_config import RunConfig

    found = plan(load(path, overrides, RunConfig), device_memory, allowed)
    print(found.text, flush=True)
    if found.obstacles:
        raise ConfigError(f"this would not run: {'; and '.join(found.obstacles)}")


def run(
    path: Path,
    overrides: Sequence[str],
    allowed: Sequence[str] = (),
    place: Flags = (None, None, None),
) -> None:
    """One run of the config at `path`, with its report at the end, however it ends. `allowed`: what may have
    changed since it began (`assemble`); `place`: see `parallel.processes.find_place`."""
    stop = Stop()
    with ExitStack() as stack:
        stack.enter_context(stop.listening())
        with stop.at_once():
            from jaxdistill.assemble import assemble
            from jaxdistill.config import load
            from jaxdistill.loop import train
            from jaxdistill.parallel import processes
            from jaxdistill.report import write_report
            from jaxdistill.run_config import RunConfig

            config = load(path, overrides, RunConfig)
            if config.run.max_hours is not None:
                stop.after(config.run.max_hours)
            where = processes.find_place(*place)
            stack.enter_context(processes.joined(where, config.run.barrier_timeout_s))
            stop.agreed = processes.count() > 1
            assembled = stack.enter_context(assemble(config, stop, allowed))
        try:
            with processes.abandoning():  # at once: where a process is missing, nobody waits for a report
                try:
                    train(assembled)
                finally:
                    assembled.metrics.close()
        finally:
            if processes.leads() and (config.run.dir / "metrics.jsonl").is_file():
                page = write_report(config.run.dir)
                if not logs.quiet():
                    logs.tell(f"report: {page}")  # a reader who has gone is no failure of the run


if __name__ == "__main__":
    sys.exit(main())
