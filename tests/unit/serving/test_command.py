"""The command line: bad input is one line and exit 2 before the model is loaded; signals end it."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest

from jaxdistill.serve import main


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err
    return err


def test_a_port_in_use_is_told_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("not even JSON")  # read only after the port is taken
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--model", str(tmp_path), "--port", str(port)]) == 2
    line = one_line(capsys)
    assert str(port) in line and "in use" in line


def test_a_missing_folder_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tmp_path / "nowhere"), "--port", "0"]) == 2
    assert "nowhere" in one_line(capsys)


@pytest.mark.parametrize("port", [70000, -1])
def test_an_impossible_port_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], port: int) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["--model", str(tmp_path), "--port", str(port)]) == 2
    assert str(port) in one_line(capsys)


def test_an_unreadable_model_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("not JSON")
    assert main(["--model", str(tmp_path), "--port", "0"]) == 2
    assert "not JSON" in one_line(capsys)


def test_a_missing_key_variable_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.delenv("TEST_SERVER_KEY", raising=False)
    assert main(["--model", str(tmp_path), "--port", "0", "--api-key-env", "TEST_SERVER_KEY"]) == 2
    assert "TEST_SERVER_KEY" in one_line(capsys)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_a_signal_and_ends_cleanly(tiny_model: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "jaxdistill.serve", "--model", str(tiny_model), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stderr is not None
        line = server.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:")
        with urlopen(line.removeprefix("listening on ").strip() + "/health", timeout=10) as reply:
            assert reply.status == 200
        server.send_signal(number)
        assert server.wait(timeout=10) == 0
        assert server.stderr.read() == ""


def test_it_ends_when_its_stdin_closes(tiny_model: Path) -> None:
    command = [sys.executable, "-m", "jaxdistill.serve", "--model", str(tiny_model), "--port", "0"]
    server = subprocess.Popen(
        [*command, "--exit-with-parent"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=dict(os.environ),
    )
    assert server.stdin is not None
    began = time.monotonic()
    server.stdin.close()  # while it is still loading
    assert server.wait(timeout=10) == 0
    assert time.monotonic() - began < 10
