"""`python -m jaxdistill.serve --model DIR --port N`: serve a model folder over HTTP, in the subset of
SGLang's interface that the trainer uses.

Prints `listening on http://HOST:PORT` on stdout when the model is loaded and requests are answered.
"""

import argparse
import asyncio
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdistill.cli import CommandParser, exit_code_of
from jaxdistill.errors import ConfigError
from jaxdistill.model_folders import model_folder

PARENT_POLL_S = 1.0
GRACE_S = 3.0  # after a signal, for the request that runs


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code (2: bad arguments, folder or port)."""
    options = parser().read(argv)
    if options.exit_with_parent:
        threading.Thread(target=_exit_with, args=(os.getppid(),), daemon=True).start()

    def body() -> None:
        # Whatever can be wrong with the arguments is said before seconds go into jax and the weights.
        folder = _model_folder(options.model)
        roles = _roles(options.role)
        api_key = _api_key(options.api_key_env)
        with _bind(options.host, options.port) as listener:
            asyncio.run(_serve(_make_app(folder, options, api_key, roles), listener))

    return exit_code_of(body, options)


def parser() -> CommandParser:
    """What the command takes."""
    parser = CommandParser(
        "serve", "Serve a model folder over HTTP, in the subset of SGLang's interface that a run uses."
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="model folder in Hugging Face format, or a hub id"
    )
    parser.add_argument(
        "--port", required=True, type=int, metavar="N", help="port to listen on; 0 takes a free one"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s, which this machine alone reaches)",
    )
    parser.add_argument("--api-key-env", metavar="NAME", help="environment variable that holds the API key")
    parser.add_argument(
        "--max-batch-tokens",
        type=positive_number,
        metavar="N",
        default=8192,
        help="padded tokens of one device batch",
    )
    parser.add_argument(
        "--max-queued-requests",
        type=positive_number,
        metavar="N",
        default=64,
        help="requests that may wait; more are answered 503 with Retry-After",
    )
    parser.add_argument(
        "--context-length",
        type=positive_number,
        metavar="N",
        help="longest input and output together (default: the model's)",
    )
    parser.add_argument(
        "--role",
        action="append",
        default=[],
        metavar="NAME=TOKEN",
        help="which token plays a role; may be given again",
    )
    parser.add_argument(
        "--exit-with-parent", action="store_true", help="end when stdin is closed or the parent is gone"
    )
    return parser


def positive_number(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _exit_with(parent: int) -> None:
    """End this process when its stdin closes or its parent changes.

    Both are watched: a fork of the parent may hold the pipe open after it died. Ends at once, from
    wherever the main thread is (compiling, loading): the server holds nothing worth saving.
    """
    stdin = sys.stdin.fileno()
    while os.getppid() == parent:
        readable, _, _ = select.select([stdin], [], [], PARENT_POLL_S)
        if readable and not os.read(stdin, 4096):
            break
    os._exit(0)


def _model_folder(name: str) -> Path:
    folder = model_folder(name)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"no model at {folder}: expected a folder with config.json and *.safetensors; "
            "check the path given to --model"
        )
    return folder


def _roles(settings: Sequence[str]) -> dict[str, str]:
    roles = {}
    for setting in settings:
        role, _, token = setting.partition("=")
        if not (role and token):
            raise ConfigError(f"--role {setting!r} is not NAME=TOKEN, such as end_of_turn=<|end|>")
        roles[role] = token
    return roles


def _api_key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name)
    if not key:
        raise ConfigError(
            f"environment variable {name}, named by --api-key-env, is not set; export the key in it"
        )
    return key


def _bind(host: str, port: int) -> socket.socket:
    """Take the port before anything slow happens. It listens only once the model is loaded."""
    if not 0 <= port < 2**16:
        raise ConfigError(f"--port is {port}, expected 0 (any free one) to 65535")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error}") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}; stop what uses it, choose "
            "another --port, or 0 for a free one"
        ) from error
    return listener


def _make_app(
    folder: Path, options: argparse.Namespace, api_key: str | None, roles: Mapping[str, str]
) -> Any:
    # Imported here, not above: jax takes seconds to import, and wrong arguments are told before.
    from jaxdistill.serving.app import make_app
    from jaxdistill.serving.model import load_engine

    engine, served = load_engine(
        folder,
        max_batch_tokens=options.max_batch_tokens,
        context_length=options.context_length,
        roles=roles,
    )
    return make_app(engine, served, api_key=api_key, max_queued_requests=options.max_queued_requests)


async def _serve(app: Any, listener: socket.socket) -> None:
    from aiohttp import web  # as in _make_app

    from jaxdistill.serving.app import QUEUE, make_runner

    runner = make_runner(app, grace_s=GRACE_S)
    await runner.setup()
    try:
        site = web.SockSite(runner, listener)
        try:
            await site.start()
        except OSError as error:  # another process began to listen while the model was loading
            host, port = listener.getsockname()[:2]
            raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}") from error
        host, port = listener.getsockname()[:2]
        print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        await _terminated()
    finally:
        await runner.cleanup()
    if app[QUEUE].busy:
        # A batch on the device cannot be interrupted, and the interpreter's own end would wait for it.
        os._exit(0)


async def _terminated() -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await stop.wait()


if __name__ == "__main__":
    sys.exit(main())
