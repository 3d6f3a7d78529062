"""`jaxdistill WORD`: the words, what they say of themselves, and how they speak."""

import contextlib
import io
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, get_args

import pytest

from jaxdistill import logs
from jaxdistill.__main__ import main
from jaxdistill.cli import WORDS, CommandParser, exit_code_of, module_of
from jaxdistill.completion import script
from jaxdistill.errors import ConfigError
from jaxdistill.metrics import MetricsLog, RowFile
from jaxdistill.stopping import Stopped
from jaxdistill.students import StoredDtype

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("word", WORDS)
def test_each_word_says_what_it_takes(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([word, "--help"])
    said = capsys.readouterr().out
    assert caught.value.code == 0
    assert said.startswith(f"usage: jaxdistill {word} ") and "--quiet" in said and "--log-format" in said
    assert "%(" not in said and "None" not in said
    parser: CommandParser = module_of(word).parser()
    assert all(action.help for action in parser._actions)


def test_help_does_not_wait_for_jax() -> None:
    """It takes seconds to import; what a word takes is known without it."""
    code = (
        "import sys; from jaxdistill.cli import WORDS, module_of; "
        "[module_of(word).parser() for word in WORDS]; sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_export_takes_every_dtype_that_can_be_stored() -> None:
    (dtype,) = [one for one in module_of("export").parser()._actions if one.dest == "dtype"]
    assert tuple(dtype.choices or ()) == get_args(StoredDtype)


def apart(code: str, **streams: Any) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own that writes as users' do, when a buffer is full or at the end."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", code]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.run(command, **piped, text=True, cwd=ROOT, env=environment, check=False, timeout=60)


COMMAND = "import sys; from jaxdistill.__main__ import main; sys.exit(main({words}))"


@pytest.mark.parametrize("words", [["--help"], ["schema"], ["train", "--help"]])
def test_a_reader_who_goes_ends_a_command_without_a_traceback(words: list[str], unread: TextIO) -> None:
    done = apart(COMMAND.format(words=words), stdout=unread)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("words", [["nope"], ["train", "--nope"], ["train", "--config", "nope"]])
def test_who_goes_changes_no_exit_code_of_a_mistake(words: list[str], stream: str, unread: TextIO) -> None:
    assert apart(COMMAND.format(words=words), **{stream: unread}).returncode == 2


STOPPED = """
import logging, sys
from pathlib import Path
from jaxdistill import logs
from jaxdistill.cli import exit_code_of
from jaxdistill.metrics import MetricsLog
from jaxdistill.stopping import Stopped

{streams}
def body():
    with MetricsLog(Path("{folder}"), total_steps=2, progress=True, every=1) as log:
        for step in range(2):
            log.log(step, {{"loss": 1.0}})
            logs.say(logging.WARNING, "said")
    logs.tell("report: here")
    {after}

sys.exit(exit_code_of(body))
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize(("after", "code"), [("", 0), ("raise Stopped('got SIGTERM')", 75)])
def test_a_run_that_nobody_listens_to_ends_as_it_would(
    after: str, code: int, stream: str, unread: TextIO, tmp_path: Path
) -> None:
    done = apart(STOPPED.format(folder=tmp_path, streams="", after=after), **{stream: unread})
    assert done.returncode == code, done
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_stream_that_was_closed_from_the_start_changes_nothing(stream: str, tmp_path: Path) -> None:
    closed = STOPPED.format(folder=tmp_path, streams=f"sys.{stream} = None", after="raise Stopped('x')")
    assert apart(closed).returncode == 75


def test_help_says_defaults() -> None:
    said = " ".join(module_of("serve").parser().format_help().split())
    assert "padded tokens of one device batch (default: 8192)" in said
    assert said.count("longest input and output together (default: the model's)") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no command given, expected one of {words}"),
        (["trian"], "unknown command 'trian', expected one of {words}; did you mean 'train'?"),
        (["zzz", "--config", "x"], "unknown command 'zzz', expected one of {words}"),
    ],
)
def test_other_words_are_one_line_and_exit_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    said = said.format(words=", ".join(WORDS))
    help_ = "`jaxdistill --help` says what each does"
    assert capsys.readouterr() == ("", f"jaxdistill: {said}; {help_}\n")


def test_help_names_every_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {word} " in said for word in WORDS)
    assert main(["--version"]) == 0
    assert re.fullmatch(r"jaxdistill \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--confg", "x"], "there is no --confg, did you mean --config?"),
        (["--config", "x", "--dry"], "there is no --dry, did you mean --dry-run?"),
        (["--config", "x", "--zzz=1"], "there is no --zzz;"),
        ([], "the following arguments are required: --config;"),
        (["--config", "x", "--processes", "two"], "argument --processes: invalid int value: 'two';"),
        (["--config", "x", "--device-memory", "8"], "--device-memory goes with --dry-run;"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", *arguments])
    out, err = capsys.readouterr()
    assert (caught.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("jaxdistill train: ") and said in err
    assert err.endswith("`jaxdistill train --help` says what there is\n")


# --- how a command speaks


def spoken(body: Callable[[], object], *flags: str) -> tuple[int, str]:
    """The exit code of a command, and what it said on stderr."""
    arguments = CommandParser("train", "").read(flags)
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = exit_code_of(body, arguments, after_stop="; run it again")
    assert not logs.as_json() and not logs.quiet(), "it is over"
    return code, err.getvalue()


def fail() -> None:
    raise ConfigError("run.steps is bad")


def stop() -> None:
    raise Stopped("got SIGTERM")


def warn() -> None:
    logging.getLogger("jaxdistill.loop").warning("the %s is late", "teacher")
    logging.getLogger("other.library").warning("deprecated")
    logging.getLogger("other.library").info("chatter")


def test_errors_and_warnings_in_text() -> None:
    assert spoken(fail) == (2, "jaxdistill: run.steps is bad\n")
    assert spoken(stop) == (75, "jaxdistill: got SIGTERM; run it again\n")
    assert spoken(warn) == (
        0,
        "jaxdistill: warning: the teacher is late\nother.library: warning: deprecated\n",
    )


def test_quiet_says_errors_alone() -> None:
    assert spoken(warn, "--quiet") == (0, "")
    assert spoken(fail, "--quiet") == (2, "jaxdistill: run.steps is bad\n")
    assert spoken(stop, "--quiet")[0] == 75


def test_json_lines_have_everything() -> None:
    code, said = spoken(warn, "--log-format", "json")
    rows = [json.loads(line) for line in said.splitlines()]
    assert code == 0
    assert [(row["level"], row["logger"], row["message"]) for row in rows] == [
        ("warning", "jaxdistill.loop", "the teacher is late"),
        ("warning", "other.library", "deprecated"),
    ]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", rows[0]["time"])
    code, said = spoken(fail, "--log-format", "json")
    (row,) = map(json.loads, said.splitlines())
    assert (code, row["level"], row["message"], row["error"], row["exit_code"]) == (
        2,
        "error",
        "run.steps is bad",
        "ConfigError",
        2,
    )


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        spoken(lambda: 1 / 0)
    code, said = spoken(lambda: 1 / 0, "--log-format", "json")
    (row,) = map(json.loads, said.splitlines())
    assert (code, row["level"]) == (1, "critical")
    assert row["message"] == "ZeroDivisionError: division by zero" and "Traceback" in row["traceback"]


def test_a_full_disk_is_no_bug(tmp_path: Path) -> None:
    rows = RowFile(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    code, said = spoken(lambda: rows.append([{"step": 0}]))
    assert code == 1 and rows.last_step is None
    why = "No space left on device; mend that, and run the same command again"
    assert said == f"jaxdistill: {tmp_path}/metrics.jsonl: {why}\n"


def test_warnings_of_python_are_lines_too() -> None:
    def body() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("soon gone", DeprecationWarning, stacklevel=1)

    (row,) = map(json.loads, spoken(body, "--log-format", "json")[1].splitlines())
    assert row["level"] == "warning" and "soon gone" in row["message"]
    assert spoken(body, "--quiet") == (0, "")


def log_steps(folder: Path) -> None:
    with MetricsLog(folder, total_steps=3, progress=True) as metrics:
        for step in range(3):
            metrics.log(step, {"loss": float("nan") if step == 1 else 0.5})


def test_each_step_is_a_line_of_json(tmp_path: Path) -> None:
    _, said = spoken(lambda: log_steps(tmp_path), "--log-format", "json")
    rows = [json.loads(line) for line in said.splitlines()]
    assert [(row["message"], row["step"], row["steps"]) for row in rows] == [
        (f"step {step} of 3", step, 3) for step in range(3)
    ]
    assert [row["metrics"]["loss"] for row in rows] == [0.5, None, 0.5]


def test_quiet_has_no_progress_and_text_has(tmp_path: Path) -> None:
    assert spoken(lambda: log_steps(tmp_path / "a"), "--quiet") == (0, "")
    assert "step 2/3  loss 0.5000" in spoken(lambda: log_steps(tmp_path / "b"))[1]


@pytest.mark.parametrize("no_color", [False, True])
def test_no_color(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_color: bool) -> None:
    """The bar of a terminal is coloured, but not where NO_COLOR asks for that."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    with contextlib.redirect_stderr(terminal):
        log_steps(tmp_path)
    said = terminal.getvalue()
    assert "loss 0.5000" in said
    colours = re.findall(r"\x1b\[[\d;]*m", said)
    assert bool([code for code in colours if re.search(r"\b[34]\d\b|38;", code)]) == (not no_color)


# --- the page about them

PAGE = (ROOT / "docs/commands.md").read_text()


def test_the_page_has_every_word_and_no_option_that_there_is_not() -> None:
    assert re.findall(r"^\| `([a-z]+)` \|", PAGE, flags=re.MULTILINE) == list(WORDS)
    there = {option for word in WORDS for option in module_of(word).parser()._option_string_actions}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", PAGE)) <= there


# --- completion


def completed(tmp_path: Path, *line: str) -> list[str]:
    """What bash offers for the last word of a command line."""
    source = tmp_path / "completion.bash"
    if not source.exists():
        source.write_text(script("bash"))
    body = (
        'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _jaxdistill; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", body, "bash", str(source), "jaxdistill", *line],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return done.stdout.split()


def test_bash_completes_words_options_files_and_settings(tmp_path: Path) -> None:
    assert completed(tmp_path, "") == list(WORDS)
    assert completed(tmp_path, "tr") == ["train"]
    assert completed(tmp_path, "train", "--dr") == ["--dry-run"]
    assert completed(tmp_path, "export", "--dtype", "b") == ["bfloat16"]
    assert completed(tmp_path, "train", "--config", "configs/quick") == ["configs/quickstart.yaml"]
    assert completed(tmp_path, "train", "--config", "configs/quickstart.yaml", "run.st") == ["run.steps="]
    assert completed(tmp_path, "doctor", "teacher.endp") == ["teacher.endpoint="]
    assert completed(tmp_path, "train", "--explain", "optim")[0] == "optimizer"
    assert completed(tmp_path, "train", "run.steps", "=", "5", "run.se") == ["run.seed="]
    assert completed(tmp_path, "train", "data.path", "=") == [], "bash completes a file there"
    assert completed(tmp_path, "compare", "doc") == ["docs"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_the_same_words(shell: str) -> None:
    text = script(shell)
    assert all(word in text for word in (*WORDS, "--dry-run", "--max-queued-requests"))
    assert "optimizer.learning_rate=" in text and " optimizer " in text


def test_completion_refuses_other_shells(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["completion", "ksh"])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and all(shell in said for shell in ("'ksh'", "bash", "zsh", "fish"))


def test_every_flag_of_a_path_is_completed() -> None:
    """A metavar says what completes an argument: one that takes a path must be FILE or DIR."""
    for word in WORDS:
        for action in module_of(word).parser()._actions:
            if action.type is Path:
                assert action.metavar in ("FILE", "DIR"), (word, action.dest)


def test_the_words_are_those_of_python_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jaxdistill.compare", "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: jaxdistill compare")
