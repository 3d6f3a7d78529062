"""`python -m jaxdistill.completion bash|zsh|fish`: what a shell needs to complete words, options, paths and
settings."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import shtab

from jaxdistill.cli import WORDS, CommandParser, exit_code_of, module_of
from jaxdistill.config import keys

# Bash ends a word at `=`: what comes behind is a value, a path perhaps, and a setting wants no space there.
_BASH = """
_jaxdistill() {
  COMPREPLY=()
  if [[ ${COMP_WORDS[COMP_CWORD]} == "=" || ${COMP_WORDS[COMP_CWORD-1]} == "=" ]]; then
    compopt -o default 2>/dev/null
    return
  fi
  _shtab_jaxdistill
  if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]]; then compopt -o nospace 2>/dev/null; fi
}
complete -o bashdefault -F _jaxdistill jaxdistill
"""
_AFTER: Mapping[str, str] = {"bash": _BASH, "zsh": "", "fish": ""}  # a shell, and what follows shtab's own


def parser() -> CommandParser:
    """What the command takes."""
    parser = CommandParser(
        "completion",
        "Print a script by which a shell completes words, options, paths and settings. For the shell that is "
        'open: `source <(jaxdistill completion bash)`, `eval "$(jaxdistill completion zsh)"`, '
        "`jaxdistill completion fish | source`; docs/commands.md says where to put it for good.",
    )
    parser.add_argument("shell", choices=list(_AFTER), help="the shell to print it for")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the script; the exit code (see `cli.exit_code_of`)."""
    arguments = parser().read(argv)
    return exit_code_of(lambda: print(script(arguments.shell)), arguments)


def script(shell: str) -> str:
    """The completion script for `shell`. It holds all there is to say, from the parsers of all words and the
    settings of `RunConfig`: while somebody types, nothing of ours is started."""
    everything = argparse.ArgumentParser(prog="jaxdistill")
    words = everything.add_subparsers()
    marks = _marks()
    for word, (does, _) in WORDS.items():
        one = words.add_parser(
            word, help=does, parents=[module_of(word).parser()], conflict_handler="resolve"
        )
        for action in one._actions:
            if action.metavar in marks:
                action.complete = marks[action.metavar]  # type: ignore[attr-defined]
    return shtab.complete(everything, shell=shell) + _AFTER[shell]


def _marks() -> dict[Any, Any]:
    """An argument's metavar, and what it is completed with, in shtab's terms."""
    from jaxdistill.run_config import RunConfig  # not above: it loads jax, which `--help` needs none of

    known = keys(RunConfig)
    settings = [f"{key}=" for key, section in known if not section]
    return {
        "FILE": shtab.FILE,
        "DIR": shtab.DIRECTORY,
        "RUN": shtab.DIRECTORY,
        "a.b=c": _listed("settings", settings),
        "a.b.c": _listed("keys", [key for key, _ in known]),
    }


def _listed(name: str, words: Sequence[str]) -> dict[str, Any]:
    """These words, by a function of each shell that prints them: no space follows those that end in `=`."""
    function, joined = f"_jaxdistill_{name}", " ".join(words)
    return {
        "bash": function,
        "zsh": function,
        "fish": f"({function})",
        "preamble": {
            "bash": f'{function}() {{ compgen -W "{joined}" -- "$1"; }}',
            "zsh": f"{function}() {{ compadd -S '' -- {joined} }}",
            "fish": f"function {function}; printf '%s\\n' {joined}; end",
        },
    }


if __name__ == "__main__":
    sys.exit(main())
