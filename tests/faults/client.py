"""The HTTP client as the tests of faults use it, with times scaled down, and what they ask with it."""

import asyncio
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jaxdistill.servers import TEACHER
from jaxdistill.servers.transport import Policy, Reply, Transport

from .server import FaultServer

KEY = "sk-a-secret-of-the-tests"
QUICK = Policy(
    max_concurrency=8,
    request_timeout_s=5.0,
    batch_budget_s=20.0,
    start_timeout_s=20.0,
    attempts=5,
    backoff_s=0.01,
    backoff_max_s=0.1,
    breaker_failures=5,
    breaker_probe_s=0.3,
    hedge_share=0.05,
)


def quick(**changes: Any) -> Policy:
    """`QUICK`, changed."""
    return Policy(**{**vars(QUICK), **changes})


@contextmanager
def to(*servers: FaultServer | str, policy: Policy = QUICK, **more: Any) -> Iterator[Transport]:
    """A client of these servers or addresses."""
    urls = [server if isinstance(server, str) else server.url for server in servers]
    transport = Transport(TEACHER, urls, policy, **more)
    try:
        yield transport
    finally:
        transport.close()


def bodies(count: int, length: int = 4) -> list[Any]:
    """Requests of one row each, no two alike."""
    scoring = {"logprob_start_len": [0], "sampling_params": {"max_new_tokens": 0}}
    return [{"input_ids": [[number, *range(1, length)]], **scoring} for number in range(count)]


def score(transport: Transport, asked: Sequence[Any], largest: int = 100_000) -> list[Reply]:
    """Replies of at most `largest` bytes each."""
    return transport.post_all("/generate", asked, largest_reply=[largest] * len(asked))


def values(replies: Sequence[Reply]) -> list[Any]:
    """What the replies hold, whoever sent them."""
    return [reply.body for reply in replies]


@contextmanager
def raw_server(*chunks: bytes, context: ssl.SSLContext | None = None, pause_s: float = 0.0) -> Iterator[str]:
    """Answers anything with these bytes, whether they are HTTP or not."""
    loop = asyncio.new_event_loop()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read(1)
            for chunk in chunks:
                writer.write(chunk)
                await writer.drain()
                await asyncio.sleep(pause_s)
            writer.close()
            await writer.wait_closed()
        except (ConnectionError, ssl.SSLError):
            pass
        finally:
            writer.transport.abort()

    async def start() -> asyncio.Server:
        return await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)

    async def stop(server: asyncio.Server) -> None:
        server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.01)  # for the aborted connections to be let go of

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield f"{'https' if context else 'http'}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        asyncio.run_coroutine_threadsafe(stop(server), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
