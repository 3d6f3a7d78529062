"""`jaxdistill WORD ...`: the same as `python -m jaxdistill.WORD ...`."""

import difflib
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version

from jaxdistill.cli import WORDS, ended, exit_code_of, module_of


def main(argv: Sequence[str] | None = None) -> int:
    """Hands the arguments after the word to that command's `main` and returns its exit code.

    Without a word, or with an unknown one, says so on stderr and returns 2.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    word = arguments[0] if arguments else None
    if word is not None and word in WORDS:
        return module_of(word).main(arguments[1:])
    if word in ("-h", "--help"):
        return exit_code_of(lambda: print(_help()))
    if word == "--version":
        return exit_code_of(lambda: print(f"jaxdistill {version('jaxdistill')}"))
    choice = f"expected one of {', '.join(WORDS)}"
    if word is None:
        said = f"no command given, {choice}"
    else:
        close = difflib.get_close_matches(word, list(WORDS), n=1)
        said = f"unknown command '{word}', {choice}" + (f"; did you mean '{close[0]}'?" if close else "")
    with suppress(BrokenPipeError):
        print(f"jaxdistill: {said}; `jaxdistill --help` says what each does", file=sys.stderr)
    return ended(2)


def _help() -> str:
    lines = [f"  {word:<11}{does:<58}{given}".rstrip() for word, (does, given) in WORDS.items()]
    return "\n".join(
        [
            "usage: jaxdistill WORD ...",
            "",
            *lines,
            "",
            "`jaxdistill WORD --help` says more, `jaxdistill train --config FILE --explain a.b.c` explains",
            "a setting. Exit codes: 0 done, 2 a mistake in what was given, 75 try again later,",
            "130 interrupted, 141 nobody read the result, 1 else.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
