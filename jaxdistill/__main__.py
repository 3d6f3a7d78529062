"""`jaxdistill <word> ...`: the same as `python -m jaxdistill.<word> ...`."""

import difflib
import importlib
import sys
from collections.abc import Sequence

_WORDS = {
    "train": "distil a student: --config FILE [a.b=c ...] [--dry-run]",
    "evaluate": "held-out figures: --run DIR [--step N] or --config FILE [--model DIR] [a.b=c ...]",
    "serve": "serve a model folder over HTTP as a teacher: --model DIR --port N",
    "export": "write a run's student as a Hugging Face folder: --run DIR [--step N] --out DIR",
    "report": "write report.html of a run folder: --run DIR",
    "doctor": "check a run before it starts: --config FILE [a.b=c ...]",
    "align": "how two tokenizers cut the same text: --student DIR --teacher DIR [--text FILE] [--html OUT]",
}
_MODULES = {word: f"jaxdistill.{word}.__main__" for word in ("align", "report")}  # rooms with a command


def main(argv: Sequence[str] | None = None) -> int:
    """Hands the arguments after the word to that command's `main` and returns its exit code.

    The command's module is only loaded here, so that `--help` and a mistyped word answer at once.
    Without a word, or with an unknown one, says so on stderr and returns 2.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    word = arguments[0] if arguments else None
    if word in _WORDS:
        return importlib.import_module(_MODULES.get(word, f"jaxdistill.{word}")).main(arguments[1:])
    if word in ("-h", "--help"):
        lines = [f"  {name:<9}{does}" for name, does in _WORDS.items()]
        print("\n".join(["usage: jaxdistill WORD ...", *lines, "`jaxdistill WORD --help` says more."]))
        return 0
    choice = f"expected one of {', '.join(_WORDS)}"
    if word is None:
        print(f"jaxdistill: no command given, {choice}", file=sys.stderr)
        return 2
    close = difflib.get_close_matches(word, list(_WORDS), n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    print(f"jaxdistill: unknown command '{word}', {choice}{hint}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
