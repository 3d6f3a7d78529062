"""Token spans made by hand, small genuine tokenizers, and tokenizers made by hand."""

import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from jaxdistill.records import TokenSpans
from jaxdistill.text import Tokenizer

ROOT = Path(__file__).parents[3]


def _spans_of(pieces: Sequence[bytes | int]) -> TokenSpans:
    data = b"".join(p for p in pieces if isinstance(p, bytes))
    sizes = [len(p) if isinstance(p, bytes) else 0 for p in pieces]
    roles = [0 if isinstance(p, bytes) else p for p in pieces]
    ids = np.arange(len(pieces), dtype=np.int32)
    return TokenSpans(ids, data, np.cumsum(sizes, dtype=np.int64), np.asarray(roles, np.int8))


@pytest.fixture(scope="session")
def spans_of() -> Callable[[Sequence[bytes | int]], TokenSpans]:
    """One token for each piece; an int is a token of that role. Ids are positions."""
    return _spans_of


def _load(file: Path) -> ModuleType:
    """Neither test folders nor scripts are packages: a module is loaded by its path."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def worlds() -> ModuleType:
    """scripts/credit_worlds.py: worlds whose every string can be counted."""
    return _load(ROOT / "scripts" / "credit_worlds.py")


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """A small tokenizer of each family, by name."""
    module = _load(Path(__file__).parents[1] / "text" / "small_tokenizers.py")
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: Tokenizer.load(str(make(root / name))) for name, make in module.FAMILIES.items()}


@pytest.fixture(scope="session")
def all_tokenizers(tokenizers: dict[str, Tokenizer]) -> dict[str, Tokenizer]:
    """A small tokenizer of each family, and the toy pair."""
    toy = {side: Tokenizer.load(str(ROOT / "assets/toy" / side)) for side in ("student", "teacher")}
    return {**tokenizers, **toy}


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory, worlds: ModuleType) -> Callable[..., Tokenizer]:
    """`bpe(pattern, merges, whole)`: byte-level BPE with these cuts and merges, and with `whole` tokens that
    no merges lead to. A space is written as the character that stands for it, U+0120."""

    def make(*arguments: Sequence) -> Tokenizer:
        return worlds.byte_level_bpe(tmp_path_factory.mktemp("bpe") / "made", *arguments)

    return make


@pytest.fixture(scope="session")
def pieces(tmp_path_factory: pytest.TempPathFactory, worlds: ModuleType) -> Callable[[int], Tokenizer]:
    """`pieces(size)` cuts runs of the digits 0 to 2 from the left into pieces of at most `size` digits."""

    @functools.cache
    def make(size: int) -> Tokenizer:
        return worlds.digit_pieces(tmp_path_factory.mktemp("pieces") / "made", size)

    return make
