"""A teacher's server that fails on schedule, on loopback, on a thread of its own.

It answers `/generate` as SGLang does, with numbers that are a function of the ids alone, so that what a
client gets through all faults can be compared with what it gets without them. The faults are listed below:
`with FaultServer(script(status(503), reset)) as server: ... server.url`.
"""

import asyncio
import gzip
import json
import math
import random
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson
from aiohttp import web


@dataclass(frozen=True)
class Asked:
    """One `/generate` request, as a fault sees it."""

    server: "FaultServer"
    request: web.Request
    body: Any


Fault = Callable[[Asked], Awaitable[web.StreamResponse]]
Schedule = Callable[[int], Fault | None]  # number of the request, from 0 -> what becomes of it
Edit = Callable[[list[Any]], Any]  # changes the honest reply in place, or returns what is sent instead


class FaultServer:
    """Serves from `__enter__` on; `down()` and `up()` close the port and open the same one again.

    What it saw: `updates` of its weights, `bodies` and `headers` of the requests to `/generate`,
    `most_at_once`, `sent` bytes of endless replies. `version`, `drift` (added to every log-probability:
    another model), `schedule` and `keeps_weights`, with which it refuses new ones, may be changed while it
    runs. `texts` decodes an id, for `return_text_in_logprobs`; None: no tokenizer.
    """

    def __init__(
        self,
        schedule: Schedule | None = None,
        *,
        vocab_size: int = 50_000,
        context: int = 4096,
        key: str | None = None,
        texts: Callable[[int], str] | None = None,
    ):
        self.schedule: Schedule = schedule or (lambda _: None)
        self.vocab_size, self.context, self.key, self.texts = vocab_size, context, key, texts
        self.version, self.drift = "default", 0.0
        self.keeps_weights = False
        self.updates: list[Any] = []
        self.bodies: list[Any] = []
        self.headers: list[Any] = []
        self.at_once = self.most_at_once = 0
        self.sent = 0
        self.port = 0
        self._runner: web.AppRunner | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-server", daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        self.up()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.down()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def up(self) -> None:
        """Listen; on the port of before, if there was one."""
        self._run(self._up())

    def down(self) -> None:
        """Close the port and cut every connection; nothing if it is closed."""
        self._run(self._down())

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _up(self) -> None:
        app = web.Application(client_max_size=2**28)
        app.add_routes(
            [
                web.post("/generate", self._generate),
                web.get("/v1/models", self._models),
                web.get("/model_info", self._info),
                web.post("/update_weights_from_disk", self._update),
            ]
        )
        # As SGLang does, it stops working on a request whose client has gone.
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.05, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]

    async def _down(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        self._runner = None

    async def _models(self, request: web.Request) -> web.Response:
        models = [{"id": "fault", "max_model_len": self.context}]
        return web.json_response({"object": "list", "data": models})

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"model_path": "fault", "model_type": "llama", "weight_version": self.version}
        )

    async def _update(self, request: web.Request) -> web.Response:
        """Takes weights that it can see, unless it is told not to."""
        order = await request.json()
        if self.keeps_weights or not Path(order["model_path"]).is_dir():
            said = "Failed to get weights iterator"
            return web.json_response({"success": False, "message": said}, status=400)
        self.updates.append(order)
        self.version = order["weight_version"]
        return web.json_response({"success": True, "message": "Succeeded"})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        number = len(self.bodies)
        body = orjson.loads(await request.read())
        self.bodies.append(body)
        self.headers.append(request.headers.copy())
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
                return web.json_response({"error": "Unauthorized"}, status=401)
            fault = self.schedule(number) or honest
            return await fault(Asked(self, request, body))
        finally:
            self.at_once -= 1

    def reply(self, body: Any) -> list[Any]:
        """What an honest server answers to `body` (batched ids)."""
        count = len(body["input_ids"])
        settings = body["sampling_params"]
        settings = settings if isinstance(settings, list) else [settings] * count
        starts = body["logprob_start_len"]
        starts = starts if isinstance(starts, list) else [starts] * count
        rows = zip(body["input_ids"], starts, settings, strict=True)
        return [
            self._write(ids, params, body.get("return_logprob") is True)
            if params["max_new_tokens"]
            else {"meta_info": self._meta(body, ids, start)}
            for ids, start, params in rows
        ]

    def _write(self, ids: Sequence[int], params: Any, scored: bool = False) -> dict[str, Any]:
        """New tokens that are a function of the prompt and the seed, the first stop token among them."""
        stops = params["stop_token_ids"]
        state = prefix_states([*ids, params["sampling_seed"]])[-1]
        length = 1 + state % 12  # the stop token comes here, where it is reached
        written = [(state // 7 + 13 * i) % 64 + 32 for i in range(length - 1)] + stops[:1]
        new = written[: params["max_new_tokens"]]
        stopped = len(new) == length
        finish = {"type": "stop", "matched": new[-1]} if stopped else {"type": "length", "length": len(new)}
        meta = {"finish_reason": finish, "prompt_tokens": len(ids), "weight_version": self.version}
        if scored:
            states = prefix_states([*ids, *new])[len(ids) :]
            meta["output_token_logprobs"] = [
                [self.logprob(state, token), token, None] for state, token in zip(states, new, strict=False)
            ]
        return {"text": "", "output_ids": new, "meta_info": meta}

    def _meta(self, body: Any, ids: Sequence[int], start: int) -> dict[str, Any]:
        top, chosen = body.get("top_logprobs_num") or 0, body.get("token_ids_logprob")
        text = self.texts if body.get("return_text_in_logprobs") and self.texts else lambda _: None
        if chosen is not None and chosen and isinstance(chosen[0], list):
            chosen = chosen[0]
        states = prefix_states(ids)

        def entry(state: int, token: int) -> list[Any]:
            return [self.logprob(state, token), token, text(token)]

        def best(state: int) -> list[Any]:
            return [entry(state, (state + rank) % self.vocab_size) for rank in range(top)]

        def picked(state: int) -> list[Any]:
            return [entry(state, token) for token in chosen or ()]

        inner = range(start + 1, len(ids))
        meta: dict[str, Any] = {
            "prompt_tokens": len(ids),
            "weight_version": self.version,
            "input_token_logprobs": [
                [None, ids[start], text(ids[start])],
                *(entry(states[i], ids[i]) for i in inner),
            ],
        }
        if top:
            meta["input_top_logprobs"] = [None, *(best(states[i]) for i in inner)]
            meta["output_top_logprobs"] = [best(states[len(ids)])]
        if chosen is not None:
            meta["input_token_ids_logprobs"] = [None, *(picked(states[i]) for i in inner)]
            meta["output_token_ids_logprobs"] = [picked(states[len(ids)])]
        return meta

    def logprob(self, state: int, token: int) -> float:
        """log p(token) after a prefix: 1 + 2 log(1 + rank) below 0, ranks counted from the prefix's own
        most likely token. The probabilities sum to at most pi^2 / (6 e), about 0.6."""
        rank = (token - state) % self.vocab_size
        return -1.0 - 2.0 * math.log1p(rank) - self.drift


def prefix_states(ids: Sequence[int]) -> list[int]:
    """A number for each prefix of `ids`, the empty one first, that depends on all tokens in it."""
    states = [7]
    for token in ids:
        states.append((states[-1] * 31 + token + 11) % 1_000_003)
    return states


# Schedules


def script(*faults: Fault | None) -> Schedule:
    """The first requests meet `faults`, one each; the others none."""
    return lambda number: faults[number] if number < len(faults) else None


def always(fault: Fault) -> Schedule:
    """Every request meets `fault`."""
    return lambda _: fault


def every(count: int, fault: Fault) -> Schedule:
    """Every `count`-th request meets `fault`."""
    return lambda number: fault if number % count == count - 1 else None


def share(part: float, faults: Sequence[Fault], seed: int = 0) -> Schedule:
    """That part of the requests meets one of `faults`, drawn by the request's number."""

    def draw(number: int) -> Fault | None:
        drawn = random.Random(f"{seed} {number}")
        return drawn.choice(faults) if drawn.random() < part else None

    return draw


# Faults


async def honest(asked: Asked) -> web.StreamResponse:
    """No fault."""
    return _json(asked.server.reply(asked.body))


async def never(asked: Asked) -> web.StreamResponse:
    """Accepts, and never answers."""
    await asyncio.Event().wait()
    raise AssertionError("nobody sets the event")


async def reset(asked: Asked) -> web.StreamResponse:
    """Cuts the connection instead of answering."""
    assert asked.request.transport is not None
    asked.request.transport.abort()
    return web.Response()


async def cut(asked: Asked) -> web.StreamResponse:
    """Cuts the connection in the middle of the reply."""
    content = orjson.dumps(asked.server.reply(asked.body))
    response = await _stream(asked, {"Content-Length": str(len(content))})
    await response.write(content[: len(content) // 2])
    assert asked.request.transport is not None
    asked.request.transport.close()
    return response


def status(code: int, body: Any = b"Internal Server Error", **headers: str) -> Fault:
    """An error status; `Retry_After="1"` becomes a header."""
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    named = {name.replace("_", "-"): value for name, value in headers.items()}

    async def fault(asked: Asked) -> web.StreamResponse:
        return web.Response(status=code, body=content, headers=named)

    return fault


def redirect(target: str, code: int = 307) -> Fault:
    """Sends the client somewhere else."""
    return status(code, b"", Location=target)


def slow(seconds: float, then: Fault = honest) -> Fault:
    """Answers, after a while."""

    async def fault(asked: Asked) -> web.StreamResponse:
        await asyncio.sleep(seconds)
        return await then(asked)

    return fault


def drip(pause_s: float = 0.02) -> Fault:
    """A byte at a time, without end."""

    async def fault(asked: Asked) -> web.StreamResponse:
        response = await _stream(asked, {})
        while True:
            await response.write(b" ")
            await asyncio.sleep(pause_s)

    return fault


def huge(size: int, *, announced: bool) -> Fault:
    """A reply of `size` bytes, its length announced or not; `server.sent` counts what left."""

    async def fault(asked: Asked) -> web.StreamResponse:
        response = await _stream(asked, {"Content-Length": str(size)} if announced else {})
        block = b" " * 65536
        for _ in range(size // len(block)):
            await response.write(block)
            asked.server.sent += len(block)
        return response

    return fault


def gzip_bomb(size: int) -> Fault:
    """`size` blanks, compressed."""
    content = gzip.compress(b" " * size)

    async def fault(asked: Asked) -> web.StreamResponse:
        return web.Response(body=content, headers={"Content-Encoding": "gzip"})

    return fault


def sends(content: bytes, kind: str = "application/json", **headers: str) -> Fault:
    """Status 200 with any content: broken JSON, a web page."""

    async def fault(asked: Asked) -> web.StreamResponse:
        return web.Response(body=content, content_type=kind, headers=headers)

    return fault


BROKEN_JSON = sends(b'[{"meta_info": {"input_tok')
WEB_PAGE = sends(b"<html>welcome</html>", "text/html")
DEEP_JSON = sends(b"[" * 100_000)


# Lies: honest replies, changed. They change the first row; row 1 must be there for those that mix rows.


def lies(edit: Edit) -> Fault:
    """The honest reply after `edit`; NaN and Infinity are written as Python's json writes them."""

    async def fault(asked: Asked) -> web.StreamResponse:
        reply = asked.server.reply(asked.body)
        changed = edit(reply)
        return web.Response(body=json.dumps(reply if changed is None else changed).encode())

    return fault


def _entries(reply: list[Any], row: int = 0) -> list[Any]:
    return reply[row]["meta_info"]["input_token_logprobs"]


def _value(value: Any) -> Edit:
    return lambda reply: _entries(reply)[-1].__setitem__(0, value)


def _shifted(reply: list[Any]) -> None:
    entries = _entries(reply)
    values = [entry[0] for entry in entries]
    for entry, value in zip(entries, [*values[1:], values[-1]], strict=True):
        entry[0] = value


def _other_row(reply: list[Any]) -> None:
    reply[0]["meta_info"]["input_token_logprobs"] = _entries(reply, 1)


LIES: dict[str, Edit] = {
    "one row short": lambda reply: reply[:-1],
    "one row long": lambda reply: [*reply, reply[0]],
    "not a list": lambda reply: {"results": reply},
    "short": lambda reply: _entries(reply).pop() and None,
    "long": lambda reply: _entries(reply).append(_entries(reply)[-1]),
    "shifted": _shifted,
    "reordered": lambda reply: reply[::-1],
    "other row": _other_row,
    "other id": lambda reply: _entries(reply)[-1].__setitem__(1, _entries(reply)[-1][1] + 1),
    "null": _value(None),
    "NaN": _value(float("nan")),
    "inf": _value(float("inf")),
    "-inf": _value(float("-inf")),
    "positive": _value(0.5),
    "text": _value("-1.0"),
}


async def _stream(asked: Asked, headers: dict[str, str]) -> web.StreamResponse:
    response = web.StreamResponse(headers=headers)
    await response.prepare(asked.request)
    return response


def _json(reply: Any) -> web.Response:
    return web.Response(body=orjson.dumps(reply), content_type="application/json")
