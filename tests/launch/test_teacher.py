"""launch/teacher_sglang.sh and the example that calls it, with a stand-in for SGLang: how it is started,
waited for, and stopped. `tests/live/test_launch.py` has the genuine server."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.conftest import ROOT, Recorder, environment, executable

# Healthy at the second try, and with a child of its own, as the genuine server has.
SERVER = """
import http.server, json, os, subprocess, sys
if os.environ.get("STAND_IN_DIES"):
    sys.exit("no memory for the weights")
asked = 0
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global asked
        asked += self.path == "/health_generate"
        self.send_response(200 if asked > 1 else 503)
        self.end_headers()
        if self.path == "/end":
            os._exit(3)
    def log_message(self, *_):
        pass
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
config = sys.argv[sys.argv.index("--config") + 1] if "--config" in sys.argv else None
with open(os.environ["STAND_IN"], "w") as file:
    said = open(config).read() if config else ""
    json.dump([[os.getpid(), child.pid], sys.argv[1:], dict(os.environ), said], file)
print("its settings", said, flush=True)
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class Machine:
    """A model, an interpreter with the stand-in, and what that wrote down."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        self.model.mkdir()
        (self.model / "config.json").write_text("{}")
        package = folder / "site" / "sglang"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "launch_server.py").write_text(SERVER)
        self.python = executable(
            folder / "env" / "python", f'PYTHONPATH="{package.parent}" exec "{sys.executable}" "$@"'
        )
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.variables = environment(
            SGLANG_PYTHON=str(self.python),
            PORT=str(self.port),
            STAND_IN=str(folder / "server"),
            LOG=str(self.log),
        )

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def start(self, *words: str, script: str = "teacher_sglang.sh", **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(ROOT / "launch" / script), *words],
            cwd=ROOT,
            env=self.variables | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str, **more: str) -> tuple[int, str]:
        """Exit code and output of a call that ends by itself."""
        script = self.start(*words, **more)
        said, _ = script.communicate(timeout=60)
        return script.returncode, said

    def server(self) -> tuple[list[int], list[str], dict[str, str], str]:
        """The server's process ids, arguments, environment and configuration file."""
        return json.loads((self.folder / "server").read_text())

    def nothing_left(self) -> bool:
        deadline = time.monotonic() + 10
        pids = self.server()[0]
        while any(map(alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return not any(map(alive, pids))


def alive(pid: int) -> bool:
    """Running; a zombie that nobody has waited for is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def appears(folder: Path, pattern: str) -> None:
    deadline = time.monotonic() + 60
    while not list(folder.glob(pattern)):
        assert time.monotonic() < deadline, f"no {pattern} in {folder}"
        time.sleep(0.05)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_it_serves_beside_a_command_and_ends_with_its_code(machine: Machine) -> None:
    beside = "import os, sys, urllib.request as u; sys.exit(u.urlopen(os.environ['TEACHER_URL']).status)"
    code, said = machine.run(
        *(str(machine.model), "--context-length", "4096", "--", sys.executable, "-c", beside),
        GPUS="6,7",
        TEACHER_KEY='ke"y',
    )
    assert code == 200, said
    assert machine.nothing_left()
    _, arguments, variables, config = machine.server()
    where = ["--model-path", str(machine.model), "--host", "127.0.0.1", "--port", str(machine.port)]
    scoring = ["--chunked-prefill-size", "4096", "--mem-fraction-static", "0.75", "--tp", "2"]
    *found, flag, value = arguments
    assert (flag, value) == ("--context-length", "4096")  # behind ours, where it wins
    assert found[: len(where + scoring)] == where + scoring
    assert variables["CUDA_VISIBLE_DEVICES"] == "6,7"
    assert variables["SGLANG_ENABLE_LOGITS_PROCESSER_CHUNK"] == "1"
    # The key is in no command line, only in files that are nobody else's, and one of them is gone again.
    assert config == '{"api-key": "ke\\"y"}\n' and not any(
        "ke" in word for word in found[len(where + scoring) + 1 :]
    )
    assert not Path(found[-1]).exists() and stat.S_IMODE(machine.log.stat().st_mode) == 0o600


def test_a_signal_goes_to_the_command_and_the_server_is_stopped_behind_it(
    machine: Machine, recorder: Recorder
) -> None:
    recorder.ends_with("wait")
    script = machine.start(str(machine.model), "--", str(recorder.python))
    appears(recorder.folder, "waiting*")
    assert all(map(alive, machine.server()[0]))
    script.send_signal(signal.SIGTERM)
    said, _ = script.communicate(timeout=30)
    assert script.returncode == 75, said
    assert machine.nothing_left()


def test_a_signal_that_the_command_does_not_answer_is_75_too(machine: Machine) -> None:
    ready = machine.folder / "ready"
    script = machine.start(str(machine.model), "--", "sh", "-c", f"touch {ready}; sleep 60; true")
    appears(machine.folder, "ready")
    script.send_signal(signal.SIGINT)
    script.send_signal(signal.SIGTERM)
    said, _ = script.communicate(timeout=30)
    assert script.returncode == 75, said
    assert machine.nothing_left()


def test_without_a_command_it_serves_until_a_signal(machine: Machine) -> None:
    script = machine.start(str(machine.model), GPUS="")
    assert script.stdout is not None
    assert "healthy at http://127.0.0.1" in [script.stdout.readline() for _ in range(2)][1]
    script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=30) == 143
    script.stdout.close()
    assert machine.nothing_left()
    _, arguments, variables, _ = machine.server()
    assert "--tp" not in arguments
    assert variables.get("CUDA_VISIBLE_DEVICES") == os.environ.get("CUDA_VISIBLE_DEVICES")


def test_a_server_that_ends_is_told_with_the_end_of_its_log(machine: Machine) -> None:
    code, said = machine.run(str(machine.model), "--", "true", STAND_IN_DIES="1")
    assert code == 1
    assert "no memory for the weights" in said and "ended while starting" in said
    # While a command runs that is for the command to judge: its teacher's replicas may live on.
    ask = f"import contextlib, time, urllib.request as u\nwith contextlib.suppress(OSError):\n u.urlopen('http://127.0.0.1:{machine.port}/end')\ntime.sleep(1)"
    code, said = machine.run(str(machine.model), "--", sys.executable, "-c", ask)
    assert code == 0 and "ended while the command runs" in said


def test_a_start_that_takes_too_long_is_ended_and_so_is_one_that_is_not_wanted_any_more(
    machine: Machine,
) -> None:
    (machine.folder / "site" / "sglang" / "launch_server.py").write_text("import time; time.sleep(60)")
    code, said = machine.run(str(machine.model), "--", "true", START_TIMEOUT="1")
    assert code == 1 and "not healthy within START_TIMEOUT=1 s" in said
    script = machine.start(str(machine.model), "--", "true")
    assert script.stdout is not None and "starting" in script.stdout.readline()
    script.send_signal(signal.SIGTERM)
    said, _ = script.communicate(timeout=30)
    assert script.returncode == 75 and "got SIGTERM before the teacher was healthy" in said


@pytest.mark.parametrize(
    ("words", "more", "expected"),
    [
        ((), {}, "usage: "),
        (("--", "true"), {}, "usage: "),
        (("MODEL", "--"), {}, "no command behind --"),
        (("nowhere", "--", "true"), {}, "no model at nowhere"),
        (("MODEL",), {"GPUS": "6 7"}, "GPUS=6 7: expected numbers with commas"),
        (("MODEL",), {"START_TIMEOUT": "soon"}, "START_TIMEOUT=soon: expected"),
        (("MODEL",), {"SGLANG_PYTHON": "/bin/false"}, "/bin/false has no SGLang"),
        (("MODEL",), {"PORT": "TAKEN"}, "Address already in use"),
        (("MODEL",), {"PORT": "many"}, "cannot listen on 127.0.0.1:many"),
    ],
)
def test_what_cannot_work_is_told_in_one_line(machine: Machine, words, more, expected) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        given = [str(machine.model) if word == "MODEL" else word for word in words]
        code, said = machine.run(*given, **{k: port if v == "TAKEN" else v for k, v in more.items()})
    assert code == 2 and said.count("\n") == 1, said
    assert expected in said
    assert not (machine.folder / "server").exists()


EXAMPLE = "qwen3_8b_from_qwen3.5_35b_a3b_8xh200"


def test_the_example_starts_teacher_doctor_and_run_on_their_own_gpus(
    machine: Machine, recorder: Recorder, understood
) -> None:
    # The doctor is content; the run ends with 75.
    body = recorder.python.read_text()
    executable(recorder.python, f'case "$*" in *train*) printf 75 >"{recorder.folder}/code";; esac\n{body}')
    script = machine.start(
        *("run.steps=5", "run.dir=runs/mine"),
        script=f"{EXAMPLE}.sh",
        PYTHON=str(recorder.python),
        TEACHER=str(machine.model),
        GPUS="0",
    )
    said, _ = script.communicate(timeout=60)
    assert script.returncode == 75, said
    assert machine.nothing_left()
    assert machine.server()[2]["CUDA_VISIBLE_DEVICES"] == "6,7"
    asked, trained = recorder.calls
    assert {call.variables["CUDA_VISIBLE_DEVICES"] for call in (asked, trained)} == {"0,1,2,3,4,5"}
    path, overrides = Path(f"configs/{EXAMPLE}.yaml"), ["run.steps=5", "run.dir=runs/mine"]
    assert understood(asked.arguments) == (path, overrides)
    assert understood(trained.arguments) == (path, overrides, [], (None, None, None))


def test_a_doctor_that_finds_trouble_ends_the_example_before_the_run(
    machine: Machine, recorder: Recorder
) -> None:
    recorder.ends_with("2")
    script = machine.start(script=f"{EXAMPLE}.sh", PYTHON=str(recorder.python), TEACHER=str(machine.model))
    said, _ = script.communicate(timeout=60)
    assert script.returncode == 2, said
    assert [call.arguments[2] for call in recorder.calls] == ["doctor"]
    assert machine.nothing_left()
