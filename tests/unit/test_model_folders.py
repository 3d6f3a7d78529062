"""Where a model comes from. The hub here is a server on loopback, asked by the genuine client in a process of
its own, as a run asks it; what it stands in for is the hub's faults, and a small model on it."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxdistill.errors import ConfigError
from jaxdistill.model_folders import hub_commit, model_folder, without_revision

ROOT = Path(__file__).parents[2]
TOY = ROOT / "assets/toy/student"
TOKEN = "hf_NeverToBeSeenAnywhere"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# What lies on the hub beside the model, and is none of ours to fetch.
STRANGERS = {
    "pytorch_model.bin": b"\x80\x04pickle",
    "modeling.py": b"raise SystemExit",
    "original/params.json": b"{}",
}


class Hub:
    """One small model, toys/student, as the hub serves it. `fault`: the status and error code with which it
    answers everything, "silent" for 5 s, or "hangs up"; `asked` has each request's method, path and token."""

    def __init__(self) -> None:
        self.files = {path.name: path.read_bytes() for path in TOY.iterdir()} | STRANGERS
        self.fault: tuple[int, str] | str | None = None
        self.asked: list[tuple[str, str, str | None]] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, to: http.server.BaseHTTPRequestHandler, *, body: bool) -> None:
        path = to.path.partition("?")[0]
        self.asked.append((to.command, path, to.headers.get("Authorization")))
        if isinstance(self.fault, str):
            time.sleep(5 if self.fault == "silent" else 0)
            return
        status, headers, data = self.found(path)
        to.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            to.send_header(name, value)
        to.end_headers()
        if body:
            to.wfile.write(data)

    def found(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content for `path`."""
        if isinstance(self.fault, tuple):
            status, code = self.fault
            # A hub that repeats what it was sent must not make us repeat it.
            return status, {"X-Error-Code": code, "X-Error-Message": f"your token {TOKEN}"}, b"{}"
        about = "/api/models/toys/student"
        if path in (f"{about}/revision/main", f"{about}/revision/v1", about):
            known = {
                "id": "toys/student",
                "sha": COMMIT,
                "siblings": [{"rfilename": name} for name in self.files],
            }
            return 200, {"Content-Type": "application/json"}, json.dumps(known).encode()
        if path == f"{about}/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
        if path.startswith(f"{about}/revision/"):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        name = path.removeprefix(f"/toys/student/resolve/{COMMIT}/")
        if name not in self.files:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        data = self.files[name]
        return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, data

    def got(self, name: str) -> int:
        """How often the content of a file was fetched."""
        return sum(method == "GET" and path.endswith(f"/{name}") for method, path, _ in self.asked)


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub()
    thread = threading.Thread(target=made.server.serve_forever, daemon=True)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()


Fetch = Callable[..., subprocess.CompletedProcess[str]]
# Prints the folder, or the error as a command would.
ASK = """
import sys
from jaxdistill.cli import exit_code_of
from jaxdistill.model_folders import hub_commit, model_folder, without_revision
def body():
    print(model_folder(sys.argv[1], weights=sys.argv[2] == "weights"), hub_commit(sys.argv[1]))
sys.exit(exit_code_of(body))
"""


@pytest.fixture
def started(hub: Hub, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts a process that asks `hub` for a model, with a cache of its own for this test."""

    def start(
        name: str,
        what: str = "weights",
        command: list[str] | None = None,
        cwd: Path = tmp_path,
        **variables: str,
    ) -> subprocess.Popen[str]:
        ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        ours |= {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1", "PYTHONPATH": str(ROOT)}
        kept = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
        return subprocess.Popen(
            command or [sys.executable, "-c", ASK, name, what],
            cwd=cwd,
            env=kept | ours | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def fetch(started: Callable[..., subprocess.Popen[str]]) -> Fetch:
    def run(name: str, what: str = "weights", **variables: str) -> subprocess.CompletedProcess[str]:
        process = started(name, what, **variables)
        out, err = process.communicate(timeout=120)
        assert TOKEN not in out + err and "Traceback" not in err
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


def test_a_model_is_fetched_whole_and_nothing_else(hub: Hub, fetch: Fetch) -> None:
    done = fetch("toys/student@v1", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    place, commit = done.stdout.split()
    assert commit == COMMIT
    assert {path.name: path.read_bytes() for path in Path(place).iterdir()} == {
        path.name: path.read_bytes() for path in TOY.iterdir()
    }
    assert {token for _, path, token in hub.asked if path.startswith("/api/models/")} == {f"Bearer {TOKEN}"}
    assert any("/revision/v1" in path for _, path, _ in hub.asked)
    # What is there is not fetched again, and is found without a hub.
    before = hub.got("model.safetensors")
    assert fetch("toys/student@v1").stdout == done.stdout and hub.got("model.safetensors") == before == 1
    assert fetch("toys/student@v1", HF_HUB_OFFLINE="1").stdout == done.stdout
    for fault, said in (((500, ""), "HfHubHTTPError"), ("silent", "ReadTimeout")):
        hub.fault = fault
        again = fetch("toys/student@v1")
        assert again.stdout == done.stdout
        assert f"did not give it ({said}); what the cache has is used, commit {COMMIT}" in again.stderr


def test_a_tokenizer_comes_without_weights(hub: Hub, fetch: Fetch) -> None:
    done = fetch("toys/student", "tokenizer")
    assert done.returncode == 0, done.stderr
    assert (
        hub.got("tokenizer.json") == 1 and hub.got("model.safetensors") == 1
    )  # hub_commit asks for all of it


@pytest.mark.slow
def test_a_plan_of_a_model_of_the_hub_fetches_no_weights(
    hub: Hub, started: Callable[..., subprocess.Popen[str]]
) -> None:
    code = "from jaxdistill.train import main; import sys; sys.exit(main(sys.argv[1:]))"
    options = ["--config", "configs/quickstart.yaml", "student.path=toys/student", "--dry-run"]
    process = started("", command=[sys.executable, "-c", code, *options], cwd=ROOT, COLUMNS="300")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "student: " in out and "its weights were not fetched from the hub" in err
    assert (hub.got("config.json"), hub.got("model.safetensors")) == (1, 0)


@pytest.mark.slow
def test_the_processes_of_a_host_fetch_once(hub: Hub, started: Callable[..., subprocess.Popen[str]]) -> None:
    both = [started("toys/student") for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[0][0] == said[1][0] and hub.got("model.safetensors") == 1


OFFLINE, WITH_TOKEN = {"HF_HUB_OFFLINE": "1"}, {"HF_TOKEN": TOKEN}


@pytest.mark.slow  # all of them together: each is a process of its own
@pytest.mark.parametrize(
    ("fault", "name", "variables", "said"),
    [
        ((404, "RepoNotFound"), "toys/studnet", {}, ("no such model, or a private one", "no token was sent")),
        (
            (401, ""),
            "toys/student",
            WITH_TOKEN,
            ("status 401 (the token of HF_TOKEN was sent)", "check HF_TOK"),
        ),
        ((403, "GatedRepo"), "toys/student", WITH_TOKEN, ("terms must be accepted first", "set HF_TOKEN")),
        (None, "toys/student@v2", {}, ("it has no revision 'v2'", "name a branch, a tag or a commit")),
        ((500, ""), "toys/student", {}, ("no answer (HfHubHTTPError)", "has not all of it", "name a folder")),
        ("hangs up", "toys/student", {}, ("no answer (RemoteProtocolError)", "check the network")),
        ("silent", "toys/student", {}, ("no answer (ReadTimeout)", "has not all of it", "check the network")),
        (None, "toys/student", OFFLINE, ("HF_HUB_OFFLINE is set", "has not all of it", "unset it")),
        (None, "toys/stu--dent", {}, ("that is no hub id",)),
    ],
)
def test_a_hub_that_does_not_give_it_is_one_clear_error(
    hub: Hub,
    fetch: Fetch,
    fault: tuple[int, str] | str | None,
    name: str,
    variables: dict[str, str],
    said: tuple[str, ...],
) -> None:
    hub.fault = fault
    done = fetch(name, **variables)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert f"jaxdistill: {name}: no such folder here, and not fetched from the hub at {hub.url[7:]}: " in last
    for words in said:
        assert words in last


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"HF_TOKEN": "clé"}, "the token of HF_TOKEN has letters that no request can carry"),
        ({"HF_HUB_ETAG_TIMEOUT": "soon"}, "one of the variables HF_HUB_*_TIMEOUT is no number"),
    ],
)
def test_a_variable_the_client_cannot_use_is_named(
    hub: Hub, fetch: Fetch, variables: dict[str, str], said: str
) -> None:
    done = fetch("toys/student", **variables)
    assert done.returncode == 2 and said in done.stderr.splitlines()[-1]
    assert "clé" not in done.stderr and not hub.asked


def test_a_folder_is_itself_and_asks_nobody() -> None:
    assert model_folder(str(TOY)) == TOY and hub_commit(str(TOY)) is None


def test_other_libraries_are_told_the_id_alone(tmp_path: Path) -> None:
    assert (
        without_revision("Qwen/Qwen3-1.7B@main") == without_revision("Qwen/Qwen3-1.7B") == "Qwen/Qwen3-1.7B"
    )
    (tmp_path / "mine@2").mkdir()
    assert without_revision(f"{tmp_path}/mine@2") == f"{tmp_path}/mine@2"


@pytest.mark.parametrize(
    "name", ["no/such/model", "/no/such", "./here", "", "a b", "x" * 300, "toys/student@"]
)
def test_what_is_neither_is_told_both(name: str) -> None:
    with pytest.raises(ConfigError, match=r"expected a folder with .* or a hub id such as Qwen/Qwen3-1\.7B"):
        model_folder(name)
