"""The script that serves genuine SGLang on a CPU, with a stand-in for the server's interpreter: its part is
to start, wait, run a command beside it, and leave nothing behind. `tests/live` has the genuine one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "sglang_cpu.py"
# Healthy at the third try, and with a child of its own, as the genuine server has.
SERVER = """
import http.server, os, subprocess, sys
asked = 0
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global asked
        asked += 1
        self.send_response(200 if asked > 2 else 503)
        self.end_headers()
    def log_message(self, *_):
        pass
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
with open(os.environ["STAND_IN_PIDS"], "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
DYING = "import sys; sys.exit('no memory for the weights')"


def stand_in(folder: Path, program: str) -> Path:
    """An environment whose interpreter runs `program` in the place of the launcher."""
    (folder / "bin").mkdir(parents=True)
    (folder / "program.py").write_text(program)
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{folder}/program.py" "$@"\n')
    python.chmod(0o755)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


def command(model: Path, *words: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "run", "--model", str(model), "--start-timeout", "60", "--", *words]


def variables(tmp_path: Path, env: Path) -> dict[str, str]:
    pids = str(tmp_path / "pids")
    return {**os.environ, "JAXDISTILL_SGLANG_ENV": str(env), "STAND_IN_PIDS": pids}


def alive(pid: int) -> bool:
    """Running; a zombie that nobody has waited for is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def nothing_left(tmp_path: Path) -> bool:
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return len(pids) == 2 and not any(map(alive, pids))


def test_it_runs_the_command_beside_a_healthy_server_and_ends_with_its_code(
    tmp_path: Path, model: Path
) -> None:
    env = stand_in(tmp_path / "env", SERVER)
    beside = (
        "import os, sys, urllib.request as u; sys.exit(u.urlopen(os.environ['JAXDISTILL_SGLANG_URL']).status)"
    )
    done = subprocess.run(
        command(model, sys.executable, "-c", beside),
        env=variables(tmp_path, env),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 200, done.stderr
    assert nothing_left(tmp_path)


def test_a_signal_takes_the_server_along(tmp_path: Path, model: Path) -> None:
    env = stand_in(tmp_path / "env", SERVER)
    beside = [sys.executable, "-c", "print('here', flush=True); import time; time.sleep(300)"]
    with subprocess.Popen(
        command(model, *beside),
        env=variables(tmp_path, env),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as script:
        assert script.stdout is not None and script.stdout.readline() == "here\n"
        script.send_signal(signal.SIGTERM)
        assert script.wait(timeout=30) == 128 + signal.SIGTERM
        assert nothing_left(tmp_path)


def test_a_server_that_dies_at_the_start_is_told_with_the_end_of_its_log(tmp_path: Path, model: Path) -> None:
    env = stand_in(tmp_path / "env", DYING)
    done = subprocess.run(
        command(model, "true"),
        env=variables(tmp_path, env),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "ended with 1 while starting" in done.stderr and "no memory for the weights" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("missing", ["model", "environment", "python"])
def test_what_is_missing_is_told_in_one_line(tmp_path: Path, model: Path, missing: str) -> None:
    settings = {"HOME": str(tmp_path), "PATH": str(tmp_path)}
    if missing == "model":
        settings["JAXDISTILL_SGLANG_ENV"] = str(stand_in(tmp_path / "env", SERVER))
        model = tmp_path / "nowhere"
    elif missing == "environment":
        settings["JAXDISTILL_SGLANG_ENV"] = str(tmp_path / "nowhere")
    else:
        settings["JAXDISTILL_CACHE"] = str(tmp_path / "cache")
        if any(Path(folder, "python3.11").exists() for folder in ("/usr/bin", "/usr/local/bin")):
            settings["JAXDISTILL_SGLANG_ENV"] = str(tmp_path / "python3.11-nowhere")
    done = subprocess.run(
        command(model, "true"), env=settings, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert {"model": "nowhere", "environment": "nowhere", "python": "3.11"}[missing] in done.stderr
