"""The commands in README.md and docs/ are run as they stand, page by page, in a copy of the repository that
has no runs; what they show is what comes.

What differs from a reader's machine, and nothing else does:

- `.venv` is there and has the packages of this test's interpreter, so `make` installs nothing
  (tests/unit/test_setup.py holds the installation). It is activated.
- Port 30000 is a free one.
- The commands of `SHORTER` are given the settings that stand there, because they would take minutes.
- What is started with `&` is ended at the end of its page, where a reader presses Ctrl-C.
"""

import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import venv
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.docs.blocks import RUN, Block, blocks, fits
from tests.docs.test_blocks import PAGES

ROOT = Path(__file__).parents[2]
FOLDERS = ("assets", "configs", "jaxdistill", "launch", "scripts", "tests")
FILES = ("Makefile", "README.md", "pyproject.toml")
QUICKSTART = Path("docs/quickstart.md")
# In this order: the quickstart whole, once; the runs of the README; the others, which look at those runs.
ORDER = [
    QUICKSTART,
    Path("README.md"),
    *(page for page in PAGES if page.parent != Path() and page != QUICKSTART),
]
SHORTER: Mapping[str, str] = {
    ".venv/bin/python -m jaxdistill.train --config configs/quickstart.yaml run.dir=runs/mine": (
        "run.steps=4 eval.every=2 eval.prompts=16"
    ),
    ".venv/bin/python -m jaxdistill.train --config configs/quickstart.yaml run.dir=runs/lora "
    "student.lora.rank=8 optimizer.learning_rate=5e-3": "run.steps=2 eval.prompts=16",
    "jaxdistill evaluate --run runs/mine eval.prompts=1000": "eval.prompts=64",
}
TIMEOUT_S = 1800  # the quickstart takes two minutes, and ten where everything else runs too


class Workspace:
    """A copy of the repository in which the pages are followed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.done: dict[Path, str | None] = {}  # a page that was run, and what was wrong with it
        for name in FOLDERS:
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
        for name in FILES:
            shutil.copy(ROOT / name, root / name)
        (root / "scripts" / "setup.sh").write_text(
            "#!/usr/bin/env bash\n# The environment is this test's own.\n"
        )
        venv.create(root / ".venv", symlinks=True)
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(root / ".venv")}))
        # As a line in a .pth file a folder is not searched for more of them: jaxdistill is the copy's.
        (packages / "test.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        programs = root / ".venv" / "bin"
        command = programs / "jaxdistill"
        command.write_text(
            f"#!{programs / 'python'}\nfrom jaxdistill.__main__ import main\nraise SystemExit(main())\n"
        )
        command.chmod(0o755)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        # Compiled as users have it: what conftest.py sets makes programs slow, and their numbers others.
        # And started by nobody's `make`, which hands its own arguments on.
        left = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL", "ARGS")
        kept = {k: v for k, v in os.environ.items() if k not in left}
        self.environment = {
            **kept,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": str(root / "home"),
            "PYTHONPATH": str(root),
            "NO_COLOR": "1",
            "COLUMNS": "110",
        }
        (root / "home").mkdir()

    def follow(self, page: Path) -> str | None:
        """Run the blocks of a page in order, if that was not done: what was wrong, or None."""
        if page not in self.done:
            with Shell(self) as shell:
                wrong = (problem for block in blocks(ROOT, page) if (problem := shell.run(block)))
                self.done[page] = next(wrong, None)
        return self.done[page]


class Shell:
    """Runs the blocks of one page; leaving it ends what was started in the background."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace, self.groups = workspace, []

    def __enter__(self) -> "Shell":
        return self

    def __exit__(self, *_: object) -> None:
        for group in self.groups:
            try:
                os.killpg(group, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def run(self, block: Block) -> str | None:
        """What is wrong with a block; None if nothing is, or it is not to be run."""
        if block.language not in RUN or block.not_run:
            return None
        if block.language == "console":
            for command, shown in block.commands():
                code, came = self.call(["bash", "-c", self.here(command)])
                expected = self.here("\n".join(shown))
                if code or not fits(lines(expected), lines(came), block.tolerance):
                    return f"{block.where}: {command}\nexit code {code}; shown:\n{expected}\ncame:\n{came}"
            return None
        body = self.here(block.body)
        flags = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else ["python", "-c"]
        code, came = self.call([*flags, body])
        return f"{block.where}: exit code {code} from\n{body}\n{came}" if code else None

    def here(self, text: str) -> str:
        """A command or what it shows, with what differs here."""
        for command, settings in SHORTER.items():
            text = "\n".join(
                f"{line.partition('#')[0].rstrip()} {settings}"
                if line.partition("#")[0].rstrip() == command
                else line
                for line in text.split("\n")
            )
        return text.replace("30000", str(self.workspace.port))

    def call(self, command: list[str]) -> tuple[int, str]:
        """Exit code and output. The output goes through a file: what is in the background would keep a pipe
        open."""
        log = self.workspace.root / "home" / "output"
        with log.open("w") as out:
            process = subprocess.Popen(
                command,
                cwd=self.workspace.root,
                env=self.workspace.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.groups.append(process.pid)
            code = process.wait(TIMEOUT_S)
        return code, log.read_text()


def lines(text: str) -> list[str]:
    """The lines of an output without blank ones around them."""
    return [line.rstrip() for line in text.strip("\n").split("\n")] if text.strip() else []


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    yield Workspace(tmp_path_factory.mktemp("docs") / "jaxdistill")


@pytest.mark.slow
@pytest.mark.parametrize("page", ORDER, ids=str)
def test_the_commands_of_a_page_do_what_it_shows(page, workspace):
    if not any(block.language in RUN and not block.not_run for block in blocks(ROOT, page)):
        return  # test_blocks.py holds that a page without commands has none by a reason
    for before in ORDER[: min(2, ORDER.index(page))]:
        assert workspace.follow(before) is None, f"{before} went wrong, and {page} builds on it"
    wrong = workspace.follow(page)
    assert wrong is None, wrong


def test_what_is_shortened_stands_in_a_page():
    """A command that was changed in a page would else be run at full length, or its entry stay for ever."""
    lines = [
        line.removeprefix("$ ").partition("#")[0].rstrip()
        for page in PAGES
        for block in blocks(ROOT, page)
        if block.language in RUN and not block.not_run
        for line in block.body.splitlines()
    ]
    assert {command: lines.count(command) for command in SHORTER} == dict.fromkeys(SHORTER, 1)
