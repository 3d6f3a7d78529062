"""Chat templates are programs of whoever published the model: bounded, killable, and otherwise as usual."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxdistill.errors import DataError
from jaxdistill.text import sandbox
from jaxdistill.text.render import ChatTemplate
from jaxdistill.text.sandbox import Limits

CHAT = [
    {"role": "note", "content": "Be brief <b>&</b> \u4f60\u597d."},
    {"role": "user", "content": "How many?", "n": 2},
    {"role": "assistant", "content": "Two.", "thinking": "1 + 1"},
]
TOOLS = [{"type": "function", "function": {"name": "sum", "parameters": {"a": [1, None, True]}}}]
SHORT = Limits(seconds=0.5, characters=10_000, memory=1 << 28)
EVIL = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a huge power": "{{ (10 ** (10 ** 9)) % 7 }}",
    "a long text": "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "much memory": "{{ ('x' * 10 ** 10) | length }}",
    "memory by doubling": "{% set n = namespace(x='x') %}{% for a in range(60) %}{% set n.x = n.x + n.x %}"
    "{% endfor %}{{ n.x | length }}",
}
TEMPLATES = {
    "blocks": "{% for m in messages %}\n    {% if m.role == 'user' %}\n  {{ m.content }}\n    {% endif %}\n"
    "{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}"
    "{% endfor %}",
    "json": "{{ tools | tojson }}|{{ tools | tojson(indent=2) }}|{{ messages[0].content | tojson }}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}/{{ m.thinking }};{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}",
    "arguments": "{{ bos_token }}{{ mood }}{{ absent }}{{ add_generation_prompt }}{{ dict(a=1).a }}",
    "date": "{{ strftime_now('%Y') }}",
}


@pytest.fixture(autouse=True)
def fresh_worker() -> Iterator[None]:
    """No test inherits another one's worker, nor leaves a tightly limited one behind."""
    sandbox.close()
    yield
    sandbox.close()


def chat_template(source: str, limits: Limits | None = None) -> ChatTemplate:
    return ChatTemplate("here", {"default": source}, {"bos_token": "<s>"}, limits or Limits())


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_templates_render_as_transformers_renders_them(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    values: dict[str, Any] = {"bos_token": "<s>", "mood": "calm", "add_generation_prompt": True}
    wanted, _ = render_jinja_template([CHAT], tools=TOOLS, chat_template=TEMPLATES[name], **values)
    got = chat_template(TEMPLATES[name]).render(CHAT, tools=TOOLS, template_kwargs={"mood": "calm"})
    assert got == wanted[0] != ""


@pytest.mark.parametrize("name", sorted(EVIL))
def test_an_evil_template_is_stopped_and_the_next_one_rendered(name: str) -> None:
    start = time.monotonic()
    with pytest.raises(DataError, match=r"here: the chat template was stopped on 3 messages: it"):
        chat_template(EVIL[name], SHORT).render(CHAT)
    assert time.monotonic() - start < 10
    assert chat_template("{{ messages[1].content }}", SHORT).render(CHAT) == "How many?"


def test_memory_is_limited_by_itself() -> None:
    # A quarter of a GiB does not hold these characters; the time would do.
    with pytest.raises(DataError, match="needed more memory than it is given"):
        chat_template("{{ ('x' * 10 ** 9) | length }}", Limits(seconds=60.0, memory=1 << 28)).render(CHAT)


def test_a_worker_nobody_waits_for_stops_itself() -> None:
    worker = subprocess.Popen(
        [sys.executable, "-I", str(sandbox._WORKER), str(1 << 28)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    request = {"template": EVIL["nested loops"], "values": {"messages": []}, "seconds": 0.1, "characters": 9}
    try:
        assert worker.stdin is not None
        worker.stdin.write(json.dumps(request) + "\n")
        worker.stdin.flush()
        assert worker.wait(timeout=30) == -signal.SIGALRM
    finally:
        worker.kill()
        worker.communicate()


def test_a_killed_worker_is_replaced() -> None:
    template = chat_template("{{ messages | length }}")
    assert template.render(CHAT) == "3"
    first = sandbox._current
    assert first is not None
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    assert template.render(CHAT) == "3"
    assert sandbox._current is not first


def test_one_worker_serves_all_threads() -> None:
    template = chat_template("{{ messages[0].content }}")
    got: dict[int, str] = {}

    def ask(number: int) -> None:
        got[number] = template.render([{"role": "user", "content": str(number) * 50_000}])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {number: str(number) * 50_000 for number in range(8)}


def test_the_worker_sees_no_keys_and_no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    assert chat_template("{{ messages | length }}").render(CHAT) == "3"
    assert sandbox._current is not None
    environment = Path(f"/proc/{sandbox._current.process.pid}/environ").read_bytes()
    assert b"hunter2" not in environment
    with pytest.raises(DataError, match="refuses"):
        chat_template("{{ ''.__class__.__mro__[1].__subclasses__() }}").render(CHAT)


def test_the_worker_ends_with_its_parent() -> None:
    code = (
        "from jaxdistill.text import sandbox; sandbox.render('x', {'messages': []}, sandbox.Limits()); "
        "print(sandbox._current.process.pid, flush=True); input()"
    )
    root = Path(__file__).parents[3]
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE, cwd=root, text=True
    )
    assert parent.stdout is not None and parent.stdin is not None
    worker = int(parent.stdout.readline())
    assert Path(f"/proc/{worker}").exists()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    parent.stdin.close()
    deadline = time.monotonic() + 10
    while _is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _is_running(worker)


def _is_running(process: int) -> bool:
    """False for a process that is gone, or that only waits for somebody to take its exit code."""
    try:
        state = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


def test_values_that_are_no_json_are_refused() -> None:
    with pytest.raises(DataError, match="must be JSON values"):
        chat_template("x").render(CHAT, template_kwargs={"mood": object()})


def test_the_worker_file_imports_nothing_of_the_package() -> None:
    code = "import sys, runpy; runpy.run_path(sys.argv[1], run_name='x'); print([*sys.modules])"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(sandbox._WORKER)], capture_output=True, text=True, check=True
    )
    loaded = json.loads(done.stdout.replace("'", '"'))
    assert not {name for name in loaded if name.split(".")[0] in ("jaxdistill", "transformers", "numpy")}
