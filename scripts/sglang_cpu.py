"""A genuine SGLang server without a GPU, in an environment of its own: slow, and exact in float32.

    python scripts/sglang_cpu.py install
    python scripts/sglang_cpu.py serve --model DIR [--port N]
    python scripts/sglang_cpu.py run --model DIR -- COMMAND...

`run` starts the server, runs the command with its address in JAXDISTILL_SGLANG_URL, stops the server, and
ends with the command's exit code. The environment (about 2.5 GB) lies in JAXDISTILL_CACHE (default
~/.cache/jaxdistill); JAXDISTILL_SGLANG_ENV names one that is there already, which is left as it is.
Packages come from where pip is set to look for them; a CPU build of torch, where one is offered, is enough.
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO
from urllib.error import URLError
from urllib.request import urlopen

VERSION = "0.5.15"  # later releases import kernels that have no build for a CPU
PYTHON = (3, 11)  # what the versions below were tried with
CONSTRAINT = "torch==2.13.0"
# SGLang asks for CUDA builds of what it needs; what is left out with --no-deps is not used on a CPU.
WITHOUT_DEPENDENCIES = (
    f"sglang=={VERSION}", "torchvision==0.28.0", "triton==3.8.0", "compressed-tensors==0.18.0",
)  # fmt: skip
DEPENDENCIES = (
    "transformers==5.12.1", "tokenizers==0.22.2", "huggingface-hub>=1.5,<2", "numpy", "fastapi", "uvicorn",
    "uvloop", "orjson", "pyzmq", "requests", "aiohttp", "psutil", "setproctitle", "msgspec", "pybase64",
    "python-multipart", "prometheus-client", "partial_json_parser", "pydantic", "ipython", "tiktoken",
    "sentencepiece", "openai==2.6.1", "openai-harmony==0.0.4", "pillow", "scipy", "xxhash", "zstandard",
    "watchfiles", "einops", "regex", "interegular", "packaging", "tqdm", "distro", "jsonschema", "soundfile",
    "dill", "apache-tvm-ffi==0.1.11", "loguru", "gguf",
)  # fmt: skip
FLAGS = (
    "--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch",
    "--grammar-backend", "none", "--disable-cuda-graph", "--dtype", "float32", "--max-total-tokens", "16384",
    "--skip-server-warmup", "--sleep-on-idle",
)  # fmt: skip
SETTINGS = {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
LAUNCHER = Path(__file__).with_name("sglang_cpu_launch.py")
URL_VARIABLE = "JAXDISTILL_SGLANG_URL"
STOP_TIMEOUT_S = 20.0
PROOF = f"import ensurepip, ssl, sys, venv; sys.exit(sys.version_info[:2] != {PYTHON} or sys.maxsize < 2**32)"


class ScriptError(Exception):
    """What went wrong and what to do, in one line; `code` is the exit code."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


def environment() -> Path:
    """Folder of the server's environment, made or not."""
    if named := os.environ.get("JAXDISTILL_SGLANG_ENV"):
        return Path(named).expanduser()
    cache = Path(os.environ.get("JAXDISTILL_CACHE") or "~/.cache/jaxdistill").expanduser()
    return cache / f"sglang-{VERSION}"


def find_python() -> Path:
    """An interpreter of the version SGLang needs, from the PATH, pyenv, uv or conda."""
    name = f"python{PYTHON[0]}.{PYTHON[1]}"
    home = Path.home()
    pyenv = Path(os.environ.get("PYENV_ROOT") or home / ".pyenv")
    uv = Path(os.environ.get("UV_PYTHON_INSTALL_DIR") or home / ".local/share/uv/python")
    conda = Path(os.environ.get("CONDA_PREFIX") or home / "miniconda3")
    on_path = [Path(folder) for folder in os.get_exec_path()]
    candidates = [folder / file for file in (name, "python3", "python") for folder in on_path]
    for root, pattern in ((pyenv, f"versions/*/bin/{name}"), (uv, f"*/bin/{name}")):
        candidates += sorted(root.glob(pattern), reverse=True)
    candidates += [conda / "bin" / name, *sorted((conda / "envs").glob(f"*/bin/{name}"))]
    candidates += [Path("/usr/local/bin") / name, Path("/usr/bin") / name]
    for candidate in candidates:
        # A name proves nothing: shims that do not start, a Debian without venv.
        if os.access(candidate, os.X_OK) and _succeeds([str(candidate), "-I", "-c", PROOF]):
            return candidate
    raise ScriptError(
        f"SGLang {VERSION} needs Python {PYTHON[0]}.{PYTHON[1]} with venv and ensurepip, and none was found "
        f"on the PATH, in pyenv, uv or conda; install one (pyenv install {PYTHON[0]}.{PYTHON[1]})",
        code=2,
    )


def install(folder: Path) -> None:
    """Make the environment; where it is complete, do nothing. A killed installation is gone on with."""
    if os.environ.get("JAXDISTILL_SGLANG_ENV"):
        if not (folder / "bin" / "python").exists():
            raise ScriptError(f"JAXDISTILL_SGLANG_ENV is {folder}, which has no bin/python", code=2)
        return
    steps = (
        (CONSTRAINT,),
        ("--no-deps", *WITHOUT_DEPENDENCIES),
        ("--constraint", str(folder / "constraint.txt"), *DEPENDENCIES),
    )
    stamp = folder / "complete"
    wanted = hashlib.sha256(repr((steps, str(folder))).encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f"{folder.name}.lock")):
        if stamp.is_file() and stamp.read_text() == wanted:  # by the one that was waited for
            return
        python = folder / "bin" / "python"
        if not _succeeds([str(python), "-I", "-m", "pip", "--version"]):
            found = find_python()
            say(f"installing SGLang {VERSION} into {folder} with {found} (a few minutes)")
            _logged([str(found), "-I", "-m", "venv", "--clear", str(folder)], folder)
        (folder / "constraint.txt").write_text(f"{CONSTRAINT}\n")
        for step in steps:
            _logged([*map(str, (python, "-I", "-m", "pip", "install", "-qq", "--no-input")), *step], folder)
        stamp.write_text(wanted)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Two installations at once must not write over each other."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _succeeds(command: Sequence[str]) -> bool:
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _logged(command: Sequence[str], folder: Path) -> None:
    """Run an installation step; its output is shown only where it fails."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
    )
    if done.returncode:
        raise ScriptError(
            f"{' '.join(command[:6])} ... failed with {done.returncode}; the next call goes on in {folder}. "
            f"The end of its output:\n{done.stdout[-3000:]}"
        )


def server_command(folder: Path, model: Path, host: str, port: int) -> tuple[list[str], dict[str, str]]:
    """The server's command line and environment variables."""
    if not (model / "config.json").is_file():
        raise ScriptError(
            f"no model at {model}: expected a folder with config.json and *.safetensors", code=2
        )
    where = ["--model-path", str(model.resolve()), "--host", host, "--port", str(port)]
    command = [str(folder / "bin" / "python"), str(LAUNCHER), *where, *FLAGS]
    # The variables of this process's own environment would lead the server's astray.
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return command, {**kept, **SETTINGS}


def run(folder: Path, model: Path, command: Sequence[str], *, start_timeout_s: float) -> int:
    """Run `command` beside a server of `model`; its exit code."""
    with serving(folder, model, start_timeout_s=start_timeout_s) as url:
        code = subprocess.run(command, env={**os.environ, URL_VARIABLE: url}, check=False).returncode
        return code if code >= 0 else 128 - code


@contextlib.contextmanager
def serving(folder: Path, model: Path, *flags: str, start_timeout_s: float) -> Iterator[str]:
    """The address of a server of `model`, started with `flags` more, while the context lasts."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server_line, variables = server_command(folder, model, "127.0.0.1", port)
    with tempfile.TemporaryFile(mode="w+b") as log:
        began = time.monotonic()
        # In a session of its own, so that what the server spawned can be ended with it.
        server = subprocess.Popen(
            [*server_line, *flags],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            wait_healthy(server, f"{url}/health_generate", log, began + start_timeout_s)
            say(f"SGLang {VERSION} serves {model} at {url} after {time.monotonic() - began:.0f} s")
            yield url
            if server.poll() is not None:
                say(f"the server died meanwhile with {server.returncode}; end of its log:\n{tail(log)}")
        finally:
            stop(server)


def wait_healthy(server: subprocess.Popen[bytes], url: str, log: IO[bytes], deadline: float) -> None:
    """Return when the server generates; raise with the end of its log when it ended or time is up."""
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise ScriptError(
                f"the server ended with {server.returncode} while starting; end of its log:\n{tail(log)}"
            )
        try:
            with urlopen(url, timeout=10) as reply:
                if reply.status == 200:
                    return
        except (URLError, OSError):  # not listening yet, or 503 while it loads
            pass
        time.sleep(0.5)
    raise ScriptError(f"the server was not healthy in time; end of its log:\n{tail(log)}")


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and everything it spawned."""
    server.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(timeout=STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def tail(log: IO[bytes]) -> str:
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - 3000))
    return log.read().decode(errors="replace")


def free_port() -> int:
    """A port nobody listens on. The server takes it half a minute later, so it lies below those that Linux
    gives to whoever connects in the meantime."""
    while True:
        port = random.randrange(20000, 32000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def say(message: str) -> None:
    print(f"sglang_cpu: {message}", file=sys.stderr, flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sglang_cpu", description="A genuine SGLang server on a CPU.")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("install", help="make its environment")
    serve = actions.add_parser("serve", help="serve a model in the foreground")
    serve.add_argument("--model", type=Path, required=True, help="model folder in Hugging Face format")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=30000)
    beside = actions.add_parser("run", help="run a command beside a server")
    beside.add_argument("--model", type=Path, required=True, help="model folder in Hugging Face format")
    beside.add_argument("--start-timeout", type=float, default=300.0, help="seconds until it is healthy")
    beside.add_argument("command", nargs=argparse.REMAINDER, help="-- COMMAND...")
    options = parser.parse_args(argv)
    if options.action == "run":
        options.command = options.command[options.command[:1] == ["--"] :]
        if not options.command:
            parser.error("run needs a command after --")
    return options


def interrupted(number: int, _: object) -> None:
    """A signal ends what runs through the `finally` clauses, so that no server is left behind."""
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: the command's for `run`; 2 for a missing Python or model, 1 for what else fails."""
    options = parse(argv)
    signal.signal(signal.SIGTERM, interrupted)
    folder = environment()
    try:
        install(folder)
        if options.action == "serve":
            command, variables = server_command(folder, options.model, options.host, options.port)
            os.execve(command[0], command, variables)
        if options.action == "run":
            return run(folder, options.model, options.command, start_timeout_s=options.start_timeout)
    except ScriptError as error:
        say(str(error))
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
