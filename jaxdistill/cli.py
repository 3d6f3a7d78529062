"""What every command line shares: the words, how arguments are read, and how it all ends."""

import argparse
import difflib
import errno
import importlib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn, get_args

from jaxdistill import logs
from jaxdistill.errors import JaxDistillError
from jaxdistill.stopping import Stopped

INTERRUPTED = 130
BUG = 1
UNREAD = 141  # as of a process that SIGPIPE ended
# What a machine may refuse anybody: no fault of ours, and a traceback would not help.
_OF_THE_MACHINE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE
}  # fmt: skip

# In the order of a first run: what is done, and what is given.
WORDS: Mapping[str, tuple[str, str]] = {
    "train": ("distil a student, from the start or from where it ended", "--config FILE [a.b=c ...]"),
    "doctor": ("check a run before it starts, its teachers too", "--config FILE [a.b=c ...]"),
    "align": ("how two tokenizers cut the same text", "--student DIR --teacher DIR"),
    "evaluate": (
        "held-out figures of a checkpoint or a model folder",
        "--run DIR | --config FILE [a.b=c ...]",
    ),
    "export": ("write a run's student as a Hugging Face folder", "--run DIR --out DIR"),
    "serve": ("serve a model folder over HTTP as a teacher", "--model DIR --port N"),
    "report": ("write report.html of a run folder", "--run DIR"),
    "compare": ("put runs side by side: settings, figures, curves", "RUN RUN ... [--html FILE]"),
    "completion": ("print what a shell needs to complete these words", "bash | zsh | fish"),
    "schema": ("print the JSON schema of a run's YAML file", ""),
}
_ROOMS = ("align", "report")  # packages with a command beside what others import of them


def module_of(word: str) -> ModuleType:
    """The module behind a word: its `parser()` and its `main(argv)`. Loaded here and not before, so that a
    mistyped word is told at once."""
    return importlib.import_module(f"jaxdistill.{word}.__main__" if word in _ROOMS else f"jaxdistill.{word}")


class CommandParser(argparse.ArgumentParser):
    """The arguments of one word, with the two that all words have: how it speaks.

    A wrong argument is one line with the nearest right one, and exit code 2."""

    def __init__(self, word: str, description: str) -> None:
        super().__init__(
            prog=f"jaxdistill {word}", description=description, formatter_class=_Help, allow_abbrev=False
        )
        speech = self.add_argument_group("what is said on the way (on stderr; results are on stdout)")
        speech.add_argument("--quiet", action="store_true", help="nothing but errors")
        speech.add_argument(
            "--log-format",
            choices=get_args(logs.Format),
            default="text",
            help="json: one object a line, each step's metrics among them",
        )
        self._given: Sequence[str] = ()

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The arguments in `argv` (None: those of this process); positional ones may stand anywhere."""
        self._given = sys.argv[1:] if argv is None else argv
        return self.parse_intermixed_args(self._given)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """End with `status`, behind `message` on stderr; `UNREAD` where nobody reads the help to its end."""
        if message:
            self._print_message(message, sys.stderr)
        sys.exit(ended(status))

    def error(self, message: str) -> NoReturn:
        """End with `message` in one line on stderr, and exit code 2."""
        known = list(self._option_string_actions)
        options = [one.partition("=")[0] for one in self._given if one.startswith("--") and one != "--"]
        unknown = next((option for option in options if option not in known), None)
        if unknown is not None:
            close = difflib.get_close_matches(unknown, known, n=1)
            message = f"there is no {unknown}" + (f", did you mean {close[0]}?" if close else "")
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` says what there is\n")


class _Help(argparse.HelpFormatter):
    """Says defaults that mean something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        said = action.help or ""
        silent = action.default in (None, False, argparse.SUPPRESS) or action.default == []
        return said if silent or "default" in said else f"{said} (default: %(default)s)"


def overrides(parser: argparse.ArgumentParser) -> None:
    """Add the settings that replace the file's, as `arguments.overrides`."""
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace the file's")


def exit_code_of(body: Callable[[], object], arguments: Any = None, *, after_stop: str = "") -> int:
    """Run `body`, which speaks as `arguments` (of a `CommandParser`) say; a deliberate error becomes one
    message on stderr and its exit code.

    0 done, 2 bad config or data, 75 try again later (of a run that was `Stopped` the message ends with
    `after_stop`), 130 interrupted, 141 where nobody reads stdout any more (`| head`), 1 otherwise. A file the
    machine refuses (a full disk, no permission) is one line too. Any other exception is a bug of ours and
    keeps its traceback, which is a field of the last line where lines are JSON.
    """
    style: logs.Format = "text" if arguments is None else arguments.log_format
    with logs.speaking(style, silent=arguments is not None and arguments.quiet):
        return ended(_outcome(body, after_stop))


def ended(code: int) -> int:
    """The code to end with when all is written, or forgotten where its reader has gone: `UNREAD` in the place
    of 0 where that was a result."""
    logs.flushed(sys.stderr)
    return code if logs.flushed(sys.stdout) or code else UNREAD


def _outcome(body: Callable[[], object], after_stop: str) -> int:
    """See `exit_code_of`."""
    try:
        body()
    except JaxDistillError as error:
        logs.say_error(error, error.exit_code)
        return error.exit_code
    except Stopped as stopped:
        logs.say_error(stopped, stopped.exit_code, f"{stopped}{after_stop}")
        return stopped.exit_code
    except KeyboardInterrupt as error:
        logs.say_error(error, INTERRUPTED, "interrupted")
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and logs.unread(sys.stdout):
            logs.forget(sys.stdout)
            return UNREAD
        if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
            where = error.filename or "a file"
            logs.say_error(
                error, BUG, f"{where}: {error.strerror}; mend that, and run the same command again"
            )
            return BUG
        if not logs.as_json():
            raise
        logging.getLogger(__name__).critical("%s: %s", type(error).__name__, error, exc_info=error)
        return BUG
    return 0
