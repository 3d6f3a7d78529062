"""Shared by several rooms: a tiny genuine model folder, servers on loopback, a headless browser."""

import asyncio
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TextIO

import pytest
from aiohttp import web
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers

TEMPLATE = (
    "<|begin|>{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTROL = ["<|begin|>", "<|user|>", "<|assistant|>", "<|end|>"]
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "n")]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder in Hugging Face format: random decoder, byte-level tokenizer, chat template."""
    from flax import nnx

    from jaxdistill.students import Decoder, read_config, save_decoder

    source = tmp_path_factory.mktemp("source")
    (source / "config.json").write_text(json.dumps(CONFIG))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = letters + [left + right for left, right in MERGES]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = RawTokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_decoder(Decoder(read_config(source), rngs=nnx.Rngs(3)), folder, source=source)
    return folder


def _plain_runner(app: web.Application) -> web.AppRunner:
    return web.AppRunner(app, access_log=None, shutdown_timeout=0.1)


@contextmanager
def _serving(
    app: web.Application, make_runner: Callable[[web.Application], web.AppRunner] = _plain_runner
) -> Iterator[str]:
    """Run `app` on a free loopback port, on a thread of its own; yields its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> tuple[web.AppRunner, int]:
        runner = make_runner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
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
def serving() -> Callable[..., AbstractContextManager[str]]:
    """`with serving(app) as url:` serves an aiohttp application on loopback."""
    return _serving


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., tuple[str, list[str]]]:
    """`browse(path, *options)` opens a file in headless Chromium: what it printed, console included, and
    the addresses that the page asked the network for.

    Without a Chromium the test is skipped, which CI does not accept.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium here; install it, on Debian with: apt-get install chromium")
    net = tmp_path / "net.json"
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--no-first-run", "--disable-default-apps",
        "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={net}",
        "--enable-logging=stderr", "--hide-scrollbars", "--window-size=1240,2700",
    ]  # fmt: skip
    environment = {**os.environ, "HOME": str(tmp_path)}

    def run(path: Path, *options: str) -> tuple[str, list[str]]:
        done = subprocess.run(
            [*command, *options, path.as_uri()], capture_output=True, timeout=120, env=environment, check=True
        )
        requests = [event.get("params") or {} for event in json.loads(net.read_text())["events"]]
        # The browser's own requests have no page as their initiator, and find no host.
        browsers_own = (None, "not an origin")
        asked = [one["url"] for one in requests if "url" in one and one.get("initiator") not in browsers_own]
        return done.stdout.decode() + done.stderr.decode(), asked

    return run


@pytest.fixture
def unread() -> Iterator[TextIO]:
    """A pipe whose reader has gone, to write lines to."""
    read, write = os.pipe()
    os.close(read)
    file = os.fdopen(write, "w", buffering=1)
    yield file
    with suppress(BrokenPipeError):
        file.close()
