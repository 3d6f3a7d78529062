"""The scoring server as the command line runs it, on a loopback port, and a plain client of it."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from aiohttp import web

from jaxdistill.serving.app import make_runner

Serving = Callable[[web.Application], AbstractContextManager[str]]


@pytest.fixture(scope="session")
def serving(serving: Callable[..., AbstractContextManager[str]]) -> Serving:
    """`with serving(app) as url:` serves the application with the runner of the command line."""
    return partial(serving, make_runner=partial(make_runner, grace_s=0.1))


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
