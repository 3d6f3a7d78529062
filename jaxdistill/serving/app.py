"""The HTTP side of the scoring server: routes, API key, error shapes. One engine thread executes the
requests in the order they came; the event loop stays free to answer health checks meanwhile."""

import asyncio
import hmac
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from aiohttp import web
from aiohttp.typedefs import Handler

from jaxdistill.serving.protocol import Engine, RefusedRequest, Row, RowResult
from jaxdistill.serving.replies import generate_reply, model_info, models
from jaxdistill.serving.requests import parse_generate, refused_json

OPEN_PATHS = frozenset({"/health", "/health_generate"})  # served without the API key
MAX_BODY_BYTES = 64 * 2**20
WEIGHT_VERSION = "default"


@dataclass(frozen=True)
class Served:
    """What the server shows of itself. `config` is the model folder's config.json; `text` turns new
    token ids into the reply's text."""

    path: str
    config: Mapping[str, Any]
    text: Callable[[np.ndarray], str]


class ScoringServer:
    """The handlers around one engine."""

    def __init__(self, engine: Engine, served: Served):
        self.engine = engine
        self.served = served
        self.started = int(time.time())
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")

    async def generate(self, request: web.Request) -> web.Response:
        """Score and generate; 400 for every request that is not executed."""
        arrived = time.perf_counter()
        try:
            body = orjson.loads(await request.read())
        except orjson.JSONDecodeError as error:
            raise refused_json(error) from error
        rows, batched = parse_generate(body, self.engine.limits, self.engine.stop_ids)
        results = await self._run(rows)
        replies = [
            generate_reply(
                row,
                result,
                text=self.served.text,
                seconds=time.perf_counter() - arrived,
                weight_version=WEIGHT_VERSION,
            )
            for row, result in zip(rows, results, strict=True)
        ]
        return _json(replies if batched else replies[0])

    async def health(self, request: web.Request) -> web.Response:
        """The process answers."""
        return web.Response()

    async def health_generate(self, request: web.Request) -> web.Response:
        """The engine answers: one token goes through the model."""
        probe = {"input_ids": [0], "sampling_params": {"max_new_tokens": 0}, "return_logprob": True}
        await self._run(parse_generate(probe, self.engine.limits, frozenset())[0])
        return web.Response()

    async def model_info(self, request: web.Request) -> web.Response:
        return _json(model_info(self.served.path, self.served.config, WEIGHT_VERSION))

    async def models(self, request: web.Request) -> web.Response:
        return _json(models(self.served.path, self.started, self.engine.limits.context_length))

    async def _run(self, rows: Sequence[Row]) -> list[RowResult]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.engine.run, rows)

    async def close(self, _: web.Application) -> None:
        """Drop what is queued; a batch on the device is waited for by the interpreter's exit."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def make_app(engine: Engine, served: Served, *, api_key: str | None = None) -> web.Application:
    """The application; with `api_key` every path but the health checks needs it as a bearer token."""
    server = ScoringServer(engine, served)
    app = web.Application(middlewares=[_error_shapes, _require(api_key)], client_max_size=MAX_BODY_BYTES)
    app.add_routes(
        [
            web.post("/generate", server.generate),
            web.get("/health", server.health),
            web.get("/health_generate", server.health_generate),
            web.get("/model_info", server.model_info),
            web.get("/get_model_info", server.model_info),
            web.get("/v1/models", server.models),
        ]
    )
    app.on_cleanup.append(server.close)
    return app


@web.middleware
async def _error_shapes(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refusals and the router's own errors as JSON, in the genuine server's shapes."""
    try:
        return await handler(request)
    except RefusedRequest as refusal:
        return _json(refusal.body, status=refusal.status)
    except web.HTTPException as error:
        return _json({"detail": error.reason}, status=error.status)


def _require(api_key: str | None) -> Any:
    """Middleware that answers 401 to requests without the key, compared in constant time."""
    expected = None if api_key is None else f"Bearer {api_key}".encode()

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if expected is not None and request.path not in OPEN_PATHS:
            given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
            if not hmac.compare_digest(given, expected):
                return _json({"error": "Unauthorized"}, status=401)
        return await handler(request)

    return check


def _json(body: Any, *, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(body), status=status, content_type="application/json")
