"""`python -m jaxdistill.align --student A --teacher B`: how two tokenizers' cuts fit, by kind of text."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jaxdistill.align.compare import compare, lost_bytes, table
from jaxdistill.align.page import render_page
from jaxdistill.align.side import Side
from jaxdistill.align.texts import RunTexts, built_in, from_data, from_file, from_run
from jaxdistill.align.view import printable
from jaxdistill.cli import CommandParser, exit_code_of
from jaxdistill.errors import ConfigError

NOTE = (
    "Shares are of student tokens, coverage of bytes; token counts are student : teacher.\n"
    "M tok/s: millions of student tokens a second, the alignment alone on one core."
)


def parser() -> CommandParser:
    """What the command takes."""
    parser = CommandParser("align", "Show how a student's and a teacher's tokenizer cut the same text.")
    parser.add_argument("--student", metavar="DIR", help="folder or hub id of the student's tokenizer")
    parser.add_argument("--teacher", metavar="DIR", help="folder or hub id of the teacher's tokenizer")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--text", metavar="FILE", help="a response to align instead of the built-in texts; -: stdin"
    )
    source.add_argument(
        "--data", type=Path, metavar="FILE", help="align what is said in a run's data (.jsonl, .parquet)"
    )
    source.add_argument(
        "--run", type=Path, metavar="DIR", help="align the samples of a run folder, with the run's tokenizers"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with every chunk shown")
    return parser


def _given(arguments: argparse.Namespace) -> RunTexts:
    if arguments.run is not None:
        return from_run(arguments.run)
    if arguments.data is not None:
        return from_data(arguments.data)
    return RunTexts(built_in() if arguments.text is None else from_file(arguments.text), None, None)


def _chosen(arguments: argparse.Namespace) -> RunTexts:
    """The texts and the two paths; what the command line names wins over what a run's config names."""
    run = _given(arguments)
    paths = {"student": arguments.student or run.student, "teacher": arguments.teacher or run.teacher}
    for side, path in paths.items():
        if path is None:
            where = f"{arguments.run}/config.yaml names none" if arguments.run else "nothing else names it"
            raise ConfigError(
                f"--{side} is missing and {where}; give a folder with tokenizer.json, or a hub id"
            )
    # Another tokenizer than the run's has roles of its own.
    return replace(
        run,
        **paths,
        student_roles={} if arguments.student else run.student_roles,
        teacher_roles={} if arguments.teacher else run.teacher_roles,
    )


def _write(path: Path, page: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--html {path}: cannot be written ({error.strerror}); name another file"
        ) from error


def _run(arguments: argparse.Namespace) -> None:
    chosen = _chosen(arguments)
    assert chosen.student is not None and chosen.teacher is not None  # _chosen has refused the rest
    student = Side.load(chosen.student, chosen.student_roles)
    teacher = Side.load(chosen.teacher, chosen.teacher_roles)
    rows = compare(student.tokenizer, teacher.tokenizer, chosen.texts)
    notes = [*lost_bytes(rows), *filter(None, [chosen.note])]
    lines = [*student.lines("student"), *teacher.lines("teacher")]
    print(printable("\n".join([*lines, "", table(rows), "", NOTE, *notes])))
    if arguments.html is not None:
        _write(arguments.html, render_page(rows, student.name, teacher.name, [*lines, *notes]))
        print(arguments.html)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, writes the page where asked, and returns the exit code."""
    arguments = parser().read(argv)
    return exit_code_of(lambda: _run(arguments), arguments)


if __name__ == "__main__":
    sys.exit(main())
