"""The HTTP side of the scoring server: routes, API key, error shapes. One engine thread executes the
requests in the order they came; the event loop stays free to answer health checks meanwhile."""

import asyncio
import hmac
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from aiohttp import web
from aiohttp.typedefs import Handler

from jaxdistill.serving.protocol import Engine, RefusedRequest, ReplyForm, Row, refused_value
from jaxdistill.serving.queue import EngineQueue
from jaxdistill.serving.replies import generate_reply, model_info, models, server_info
from jaxdistill.serving.requests import parse_generate, refused_json

OPEN_PATHS = frozenset({"/health", "/health_generate"})  # served without the API key
MAX_BODY_BYTES = 16 * 2**20
BODY_TIMEOUT_S = 30.0
LINGER_S = 2.0  # how long the rest of a refused body is read, so that the client gets to the answer
DEFAULT_MAX_QUEUED = 64
WEIGHT_VERSION = "default"
QUEUE = web.AppKey("queue", EngineQueue)


@dataclass(frozen=True)
class Served:
    """What the server shows of itself. `config` is the model folder's config.json, `text` turns new
    token ids into the reply's text, and `token_texts` gives the text of each id of the vocabulary (None:
    the folder has no tokenizer)."""

    path: str
    config: Mapping[str, Any]
    text: Callable[[np.ndarray], str]
    token_texts: Callable[[], Sequence[str]] | None = None


class ScoringServer:
    """The handlers around one engine."""

    def __init__(self, engine: Engine, served: Served, queue: EngineQueue, body_timeout_s: float):
        self.engine = engine
        self.served = served
        self.queue = queue
        self.body_timeout_s = body_timeout_s
        self.started = int(time.time())
        self._probe: asyncio.Task[Any] | None = None

    async def generate(self, request: web.Request) -> web.Response:
        """Score and generate; 400 for every request that is not executed."""
        arrived = time.perf_counter()
        with self.queue.place():
            try:
                body = orjson.loads(await self._body(request))
            except orjson.JSONDecodeError as error:
                raise refused_json(error) from error
            rows, form = parse_generate(body, self.engine.limits, self.engine.stop_ids)
            if form.text and self.served.token_texts is None:
                raise refused_value("return_text_in_logprobs: this model's folder has no tokenizer.json")
            content = await self.queue.run(lambda: self._answer(rows, form, arrived))
        return web.Response(body=content, content_type="application/json")

    def _answer(self, rows: Sequence[Row], form: ReplyForm, arrived: float) -> bytes:
        """Execute the rows and write the reply: on the engine's thread, since a large one takes seconds."""
        results = self.engine.run(rows)
        token_texts = self.served.token_texts() if form.text and self.served.token_texts else None
        replies = [
            generate_reply(
                row,
                result,
                form,
                text=self.served.text,
                token_texts=token_texts,
                seconds=time.perf_counter() - arrived,
                weight_version=WEIGHT_VERSION,
            )
            for row, result in zip(rows, results, strict=True)
        ]
        return orjson.dumps(replies if form.batched else replies[0])

    async def _body(self, request: web.Request) -> bytes:
        """The body, bounded in bytes (413, by aiohttp) and in time; never decompressed."""
        if request.headers.get("Content-Encoding", "identity") != "identity":
            raise web.HTTPUnsupportedMediaType(reason="Compressed bodies are not read; send plain JSON")
        try:
            async with asyncio.timeout(self.body_timeout_s):
                return await request.read()
        except TimeoutError as error:
            raise web.HTTPRequestTimeout(reason=f"No whole body within {self.body_timeout_s:g} s") from error

    async def health(self, request: web.Request) -> web.Response:
        """The process answers, and is not about to end."""
        return web.Response(status=503 if self.queue.closing else 200)

    async def health_generate(self, request: web.Request) -> web.Response:
        """The engine answers: one token goes through the model.

        Checks that come at once share one probe: needing no key, they must not fill the queue.
        """
        if self._probe is None or self._probe.done():
            probe = {"input_ids": [0], "sampling_params": {"max_new_tokens": 0}, "return_logprob": True}
            rows, _ = parse_generate(probe, self.engine.limits, frozenset())
            self._probe = asyncio.create_task(self.queue.run(lambda: self.engine.run(rows)))
        await asyncio.shield(self._probe)
        return web.Response()

    async def model_info(self, request: web.Request) -> web.Response:
        return _json(model_info(self.served.path, self.served.config, WEIGHT_VERSION))

    async def server_info(self, request: web.Request) -> web.Response:
        most_waiting = self.queue.most_waiting
        return _json(server_info(self.served.path, self.engine.limits, most_waiting, WEIGHT_VERSION))

    async def models(self, request: web.Request) -> web.Response:
        return _json(models(self.served.path, self.started, self.engine.limits.context_length))

    async def close(self, _: web.Application) -> None:
        """The server is ending: requests that wait are refused, the one that runs may still be answered."""
        self.queue.close()


def make_app(
    engine: Engine,
    served: Served,
    *,
    api_key: str | None = None,
    max_queued_requests: int = DEFAULT_MAX_QUEUED,
    body_timeout_s: float = BODY_TIMEOUT_S,
) -> web.Application:
    """The application; with `api_key` every path but the health checks needs it as a bearer token.

    When more than `max_queued_requests` would wait, a request is answered 503 with Retry-After. Serve it
    with `make_runner`.
    """
    queue = EngineQueue(max_queued_requests)
    server = ScoringServer(engine, served, queue, body_timeout_s)
    app = web.Application(middlewares=[_error_shapes, _require(api_key)], client_max_size=MAX_BODY_BYTES)
    app[QUEUE] = queue
    app.add_routes(
        [
            web.post("/generate", server.generate),
            web.get("/health", server.health),
            web.get("/health_generate", server.health_generate),
            web.get("/model_info", server.model_info),
            web.get("/get_model_info", server.model_info),
            web.get("/server_info", server.server_info),
            web.get("/get_server_info", server.server_info),
            web.get("/v1/models", server.models),
        ]
    )
    app.on_shutdown.append(server.close)
    return app


def make_runner(app: web.Application, *, grace_s: float) -> web.AppRunner:
    """How the application is served. On cleanup, what runs has `grace_s` seconds to be answered."""
    return web.AppRunner(
        app,
        access_log=None,
        handle_signals=False,
        handler_cancellation=True,  # a client that goes away takes its request out of the queue
        auto_decompress=False,  # a few bytes of a compressed body may stand for gigabytes
        lingering_time=LINGER_S,
        shutdown_timeout=grace_s,
    )


@web.middleware
async def _error_shapes(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refusals and the router's own errors as JSON, in the genuine server's shapes."""
    try:
        return await handler(request)
    except RefusedRequest as refusal:
        return _json(refusal.body, status=refusal.status, headers=refusal.headers)
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


def _json(body: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    content = orjson.dumps(body)
    return web.Response(body=content, status=status, headers=headers, content_type="application/json")
