"""The script that fetches genuine tokenizers, as far as it goes without a network."""

import base64
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from jaxdistill.errors import DataError
from jaxdistill.text import Tokenizer

SCRIPT = Path(__file__).parents[3] / "scripts/fetch_tokenizers.py"
WORDS = [b"th", b"the", b" the", b" t", b"he", b"\xe4\xbd", b"\xe4\xbd\xa0", b"a\xcc", b"aa", b"aaa"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("fetch_tokenizers", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = {"PYTHONPATH": str(SCRIPT.parents[1])}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **root, **environment},
    )


def test_a_missing_npm_is_one_clear_line(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path / "out"), "qwen3", PATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "npm is not installed" in done.stderr
    assert not list((tmp_path / "out").iterdir())


def test_an_installer_that_fails_is_one_clear_line(tmp_path: Path) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\nexit 1\n")
    npm.chmod(0o755)
    done = run("--out", str(tmp_path / "out"), "qwen3", PATH=f"{tmp_path}:/bin:/usr/bin")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "npm error code ENOTFOUND" in done.stderr
    assert not list((tmp_path / "out").iterdir())


def test_unknown_names_and_folders_are_refused(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path), "qwen4")
    assert done.returncode == 2 and "unknown tokenizer 'qwen4'" in done.stderr
    (tmp_path / "file").touch()
    done = run("--out", str(tmp_path / "file"), "qwen3")
    assert done.returncode == 2 and "cannot be written" in done.stderr


def test_a_complete_folder_is_left_alone(script: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "qwen3"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "source.json").write_text(json.dumps(script.SOURCES["qwen3"].provenance))
    assert "already complete" in script.fetch("qwen3", tmp_path)
    assert not script.is_complete(folder, script.SOURCES["gemma3"].provenance)


def test_a_failed_fetch_leaves_nothing_behind(script: ModuleType, tmp_path: Path) -> None:
    def build(work: Path, made: Path) -> None:
        (made / "tokenizer.json").write_text("{}")
        raise DataError("broken off")

    with pytest.raises(DataError):
        script.make(tmp_path / "half", {"a": 1}, build)
    assert not list(tmp_path.iterdir())


def test_every_source_is_pinned(script: ModuleType) -> None:
    for source in script.SOURCES.values():
        assert len(source.sha256) == 64 and source.version[0].isdigit()
    assert "://" not in SCRIPT.read_text()


def test_a_tekken_file_becomes_a_byte_level_tokenizer(script: ModuleType, tmp_path: Path) -> None:
    tokens = [bytes([byte]) for byte in range(256)] + WORDS
    tekken = {
        "config": {
            "pattern": r" ?\p{L}+|\s+|[^\s\p{L}]+",
            "default_vocab_size": 1000 + len(tokens),
            "default_num_special_tokens": 1000,
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode()}
            for rank, token in enumerate(tokens)
        ],
    }
    script.write_json(tmp_path / "tokenizer.json", script.tekken_document(tekken))
    tokenizer = Tokenizer.load(str(tmp_path))
    assert tokenizer.vocab_size == 1000 + len(tokens)
    assert tokenizer.token_bytes(list(range(1000, 1000 + len(tokens)))) == tokens
    assert tokenizer.roles["tool_open"] == 9
    spans = tokenizer.encode(" the aaaa \u4f60")
    assert spans.data == " the aaaa \u4f60".encode()
    # The pair whose result has the lowest rank is joined first: "aa" + "aa", not "aaa" + "a".
    pieces = tokenizer.token_bytes(spans.ids)
    assert pieces == [b" the", b" ", b"aa", b"aa", b" ", b"\xe4\xbd\xa0"]
