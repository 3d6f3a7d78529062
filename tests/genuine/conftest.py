"""Every fetched tokenizer, loaded once a session, and the nasty corpus in each tokenizer's tokens."""

import importlib.util
import os
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from jaxdistill.records import Alignment, TokenSpans
from jaxdistill.text import Tokenizer

ROOT = Path(__file__).parents[2]
FETCHED = Path(os.environ.get("JAXDISTILL_CACHE", "~/.cache/jaxdistill")).expanduser() / "tokenizers"
TOY = {"toy_student": ROOT / "assets/toy/student", "toy_teacher": ROOT / "assets/toy/teacher"}
NAMES = (
    *("qwen3", "gemma3", "llama3", "gptoss", "deepseek_v3", "mistral_v1", "tekken", "claude", "smollm2"),
    *TOY,
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `name` runs for every tokenizer, one that takes `pair` for every ordered pair."""
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", NAMES)
    if "pair" in metafunc.fixturenames:
        pairs = [(a, b) for a in NAMES for b in NAMES if a != b]
        metafunc.parametrize("pair", pairs, ids=[f"{a}-{b}" for a, b in pairs])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder need fetched material."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.genuine)


def folder_of(name: str) -> Path:
    """The tokenizer's folder; skips the test where it has not been fetched."""
    folder = TOY.get(name, FETCHED / name)
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"no tokenizer in {folder}; make it with: .venv/bin/python scripts/fetch_tokenizers.py")
    return folder


@cache
def _loaded(folder: Path) -> Tokenizer:
    return Tokenizer.load(str(folder))


class Genuine:
    """The tokenizers by name, and the tokens of contents that several tests look at."""

    def __init__(self) -> None:
        self._encoded: dict[tuple[str, bytes], TokenSpans] = {}

    def folder(self, name: str) -> Path:
        return folder_of(name)

    def __getitem__(self, name: str) -> Tokenizer:
        return _loaded(folder_of(name))

    def encode(self, name: str, contents: list[bytes]) -> list[TokenSpans]:
        """`encode_batch`, remembered: a pair's texts are the same for all pairs."""
        new = [content for content in contents if (name, content) not in self._encoded]
        for content, spans in zip(new, self[name].encode_batch(new), strict=True):
            self._encoded[name, content] = spans
        return [self._encoded[name, content] for content in contents]


@pytest.fixture(scope="session")
def genuine() -> Genuine:
    """`genuine["qwen3"]` is that tokenizer; skips where it has not been fetched."""
    return Genuine()


@pytest.fixture(scope="session")
def corpus() -> ModuleType:
    """`tests/corpus/corpus.py`."""
    file = ROOT / "tests/corpus/corpus.py"
    spec = importlib.util.spec_from_file_location("nasty_corpus", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_chunks(student: TokenSpans, teacher: TokenSpans, alignment: Alignment) -> None:
    """Chunks rise, cover their tokens without a gap, and hold the same bytes on both sides: by slicing."""
    sides = []
    for spans, labels in ((student, alignment.student_chunk), (teacher, alignment.teacher_chunk)):
        tokens = np.flatnonzero(labels >= 0)
        owner = labels[tokens]
        assert (np.diff(owner) >= 0).all()
        chunks, first, counts = np.unique(owner, return_index=True, return_counts=True)
        assert chunks.tolist() == list(range(alignment.num_chunks))
        starts, ends = spans.starts[tokens[first]], spans.ends[tokens[first + counts - 1]]
        assert int((ends - starts).sum()) == int((spans.ends - spans.starts)[tokens].sum())
        pairs = zip(starts.tolist(), ends.tolist(), strict=True)
        roles = [spans.roles[tokens[i]] for i in first.tolist()]
        sides.append(([spans.data[a:b] for a, b in pairs], roles, counts))
    assert sides[0][0] == sides[1][0]
    assert sides[0][1] == sides[1][1]
    assert ((sides[0][2] == 1) & (sides[1][2] == 1)).tolist() == alignment.exact.tolist()


@pytest.fixture(scope="session", name="check_chunks")
def _check_chunks():
    return check_chunks
