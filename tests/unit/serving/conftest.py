"""The scoring server as the command line runs it, on a loopback port, and a plain client of it."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from aiohttp import web

from jaxdistill.serving.app import make_runner

Serving = Callable[[web.Application], AbstractContextManager[str]]


@contextmanager
def _serving(app: web.Application) -> Iterator[str]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> tuple[web.AppRunner, int]:
        runner = make_runner(app, grace_s=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner, runner.addresses[0][1]

    runner, port = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(scope="session")
def serving() -> Serving:
    """`with serving(app) as url:` serves the application with the runner of the command line."""
    return _serving


def _call(
    url: str, body: Any = None, *, key: str | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """One request; its status, headers and body. An underscore in a header's name stands for a dash."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if key:
        sent["Authorization"] = f"Bearer {key}"
    try:
        with urlopen(Request(url, data=data, headers=sent), timeout=60) as response:
            return response.status, dict(response.headers), response.read()
    except HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


@pytest.fixture(scope="session")
def call() -> Callable[..., tuple[int, dict[str, str], bytes]]:
    """`call(url, body, key=..., Header_Name=...)` -> status, headers, body."""
    return _call
