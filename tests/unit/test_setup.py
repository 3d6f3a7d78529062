"""scripts/setup.sh: which Python it finds where, what it says when there is none, and when it installs."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETUP = ROOT / "scripts" / "setup.sh"
REAL = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
TOOLS = ["bash", "dirname", "flock", "rm"]  # what the script itself needs besides the shell's own words


class Machine:
    """A pretended machine: its PATH, home and system folders hold only what a test puts there."""

    def __init__(self, root: Path) -> None:
        self.root, self.home, self.bin = root, root / "home", root / "bin"
        for folder in (self.home, self.bin):
            folder.mkdir()
        for tool in TOOLS:
            found = next((p for d in os.environ["PATH"].split(":") if (p := Path(d, tool)).exists()), None)
            if found is not None:
                (self.bin / tool).symlink_to(found)

    def python(self, path: str) -> Path:
        """A working interpreter at `path`."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(REAL)
        return target

    def script(self, path: str, body: str) -> Path:
        """An executable shell script at `path`."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f"#!{self.bin / 'bash'}\n{body}\n")
        target.chmod(0o755)
        return target

    def run(
        self, *arguments: str, script: Path = SETUP, extra: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": str(self.bin),
            "HOME": str(self.home),
            "JAXDISTILL_SYSTEM_ROOT": str(self.root / "system"),
            **(extra or {}),
        }
        command = [str(self.bin / "bash"), str(script), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    def found(self, **extra: str) -> str:
        done = self.run("--find", extra=extra)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


OLD_PYTHON = 'case "$*" in *version_info*) exit 1;; *) echo "Python 3.11.7";; esac'
DEAD_SHIM = 'echo "pyenv: python3.12: command not found" >&2; exit 127'


def test_none_found_is_one_sentence_and_exit_2(machine: Machine) -> None:
    for name in ("python", "python3"):
        machine.script(f"bin/{name}", OLD_PYTHON)
    machine.script("bin/python3.12", DEAD_SHIM)
    machine.script("home/.pyenv/versions/3.11.7/bin/python3", OLD_PYTHON)
    for arguments in (["--find"], []):
        script = SETUP
        if not arguments:  # not in this checkout, whose own .venv would be current
            script = machine.root / "checkout" / "scripts" / "setup.sh"
            script.parent.mkdir(parents=True)
            script.write_text(SETUP.read_text())
        done = machine.run(*arguments, script=script)
        assert done.returncode == 2
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("jaxdistill needs Python 3.12 or newer")
        assert "PYTHON=" in done.stderr
    assert not (machine.root / "checkout" / ".venv").exists()


@pytest.mark.parametrize(
    "place",
    [
        "home/.pyenv/versions/3.12.1/bin/python3.12",
        "home/.local/share/uv/python/cpython-3.12.1-linux-x86_64-gnu/bin/python3.12",
        "home/.asdf/installs/python/3.12.1/bin/python3.12",
        "home/.local/share/mise/installs/python/3.12/bin/python3.12",
        "home/miniforge3/envs/some name/bin/python3.12",
        "home/miniconda3/bin/python",
        "system/usr/local/bin/python3.12",
        "system/opt/python/bin/python3.12",
    ],
)
def test_found_only_there(machine: Machine, place: str) -> None:
    """The PATH holds an old python3 and a shim that exists but does not start, as pyenv leaves them."""
    machine.script("bin/python3", OLD_PYTHON)
    machine.script("bin/python3.12", DEAD_SHIM)
    expected = machine.python(place)
    assert machine.found() == str(expected)


def test_pyenv_root_elsewhere(machine: Machine) -> None:
    expected = machine.python("tools/pyenv/versions/3.12.1/bin/python3.12")
    assert machine.found(PYENV_ROOT=str(machine.root / "tools/pyenv")) == str(expected)
    machine.script("bin/pyenv", f"echo {machine.root}/tools/pyenv")
    assert machine.found() == str(expected)


def test_uv_is_asked_and_must_not_download(machine: Machine) -> None:
    expected = machine.python("elsewhere/bin/python3.12")
    machine.script(
        "bin/uv",
        f'[ "$UV_PYTHON_DOWNLOADS" = never ] && [ "$*" = "python find 3.12" ] && echo {expected}',
    )
    assert machine.found() == str(expected)


def test_named_interpreter_comes_first(machine: Machine) -> None:
    machine.python("bin/python3.12")
    named = machine.python("mine/bin/python3.12")
    assert machine.found(PYTHON=str(named)) == str(named)


def test_useless_named_interpreter_is_said_and_passed_over(machine: Machine) -> None:
    expected = machine.python("bin/python3.12")
    done = machine.run("--find", extra={"PYTHON": "/nonexistent/python"})
    assert done.returncode == 0
    assert done.stdout.strip() == str(expected)
    assert "PYTHON=/nonexistent/python is not a usable Python" in done.stderr


def test_a_shim_hides_nothing_behind_it_on_the_path(machine: Machine) -> None:
    machine.script("bin/python3.12", DEAD_SHIM)
    expected = machine.python("later/python3.12")
    assert machine.found(PATH=f"{machine.bin}:{expected.parent}") == str(expected)


def test_environment_of_another_project_is_not_built_upon(machine: Machine) -> None:
    """The interpreter behind a virtual environment is printed: the environment may go away."""
    subprocess.run([str(REAL), "-m", "venv", "--without-pip", str(machine.root / "other")], check=True)
    found = machine.found(PATH=f"{machine.root}/other/bin:{machine.bin}")
    assert Path(found).resolve() == REAL.resolve()
    assert not found.startswith(str(machine.root))


# A build backend of a few lines, so that the true pip can install without a network. It logs each build.
BACKEND = """
import os, pathlib, zipfile

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    here = pathlib.Path.cwd()
    with open(here / "builds", "a") as log:
        log.write("built\\n")
    if (here / "broken").exists():
        raise SystemExit("this build is broken on purpose")
    info = "jaxdistill-0.1.0.dist-info"
    with zipfile.ZipFile(os.path.join(wheel_directory, "jaxdistill-0.1.0-py3-none-any.whl"), "w") as wheel:
        wheel.writestr("jaxdistill.pth", str(here / "packages"))
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: jaxdistill\\nVersion: 0.1.0\\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/RECORD", "")
    return "jaxdistill-0.1.0-py3-none-any.whl"
"""
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""


class Checkout:
    """A project in miniature around the genuine setup.sh."""

    def __init__(self, machine: Machine, root: Path) -> None:
        self.machine, self.root = machine, root

    def fill(self) -> None:
        (self.root / "scripts").mkdir(parents=True)
        (self.root / "scripts" / "setup.sh").write_text(SETUP.read_text())
        (self.root / "pyproject.toml").write_text(PROJECT)
        (self.root / "constraints.txt").write_text("")
        (self.root / "backend.py").write_text(BACKEND)
        for name in ("jaxdistill", "jax", "pytest"):
            (self.root / "packages" / name).mkdir(parents=True)
            (self.root / "packages" / name / "__init__.py").write_text("")

    def setup(self) -> subprocess.CompletedProcess[str]:
        offline = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1"}
        return self.machine.run(script=self.root / "scripts" / "setup.sh", extra=offline)

    @property
    def builds(self) -> int:
        return len((self.root / "builds").read_text().splitlines())

    def mark(self) -> Path:
        """A file in the environment, which is gone when the environment is made anew."""
        marker = self.root / ".venv" / "marker"
        marker.write_text("")
        return marker


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """One for the tests below, which run in order: each true environment takes seconds."""
    root = tmp_path_factory.mktemp("setup")
    machine = Machine(root)
    machine.python("home/.pyenv/versions/3.12.1/bin/python3.12")
    checkout = Checkout(machine, root / "check out")
    checkout.fill()
    return checkout


@pytest.mark.slow
def test_life_of_an_environment(checkout: Checkout) -> None:
    first = checkout.setup()
    assert first.returncode == 0, first.stderr
    assert first.stdout == ""
    assert [line.split(":")[0] for line in first.stderr.splitlines()] == ["setup", "setup"]
    python = checkout.root / ".venv" / "bin" / "python"
    subprocess.run([python, "-c", "import jaxdistill"], check=True, cwd="/")

    again = checkout.setup()
    assert (again.returncode, again.stdout, again.stderr, checkout.builds) == (0, "", "", 1)

    marker = checkout.mark()
    (checkout.root / "constraints.txt").write_text("# changed\n")
    assert checkout.setup().returncode == 0
    assert checkout.builds == 2
    assert marker.exists(), "a changed file needs an installation, not a new environment"

    (checkout.root / "broken").write_text("")
    (checkout.root / "pyproject.toml").write_text(PROJECT + "# changed\n")
    failed = checkout.setup()
    assert failed.returncode == 1
    assert "this build is broken on purpose" in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("setup: the installation failed")

    (checkout.root / "broken").unlink()
    assert checkout.setup().returncode == 0
    assert not marker.exists(), "what a failed installation left is not built upon"
    assert checkout.setup().stderr == ""


@pytest.mark.slow
def test_broken_or_moved_environment_is_remade(checkout: Checkout) -> None:
    checkout.setup()
    marker = checkout.mark()
    python = checkout.root / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/nonexistent/python3.12")
    assert checkout.setup().returncode == 0
    assert not marker.exists()

    marker = checkout.mark()
    moved = Checkout(checkout.machine, checkout.root.with_name("moved"))
    checkout.root.rename(moved.root)
    done = moved.setup()
    assert done.returncode == 0, done.stderr
    assert not (moved.root / ".venv" / "marker").exists()
    subprocess.run([moved.root / ".venv/bin/python", "-c", "import jaxdistill"], check=True, cwd="/")


def test_foreign_file_in_the_place_of_the_environment(machine: Machine) -> None:
    machine.python("bin/python3.12")
    checkout = Checkout(machine, machine.root / "checkout")
    checkout.fill()
    (checkout.root / ".venv").write_text("name of an environment of another tool")
    done = checkout.setup()
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "is not a folder" in done.stderr
    assert (checkout.root / ".venv").read_text().startswith("name of")
