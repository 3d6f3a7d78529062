"""Token spans made by hand, and two small genuine tokenizers."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from jaxdistill.records import TokenSpans
from jaxdistill.text import Tokenizer


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


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """A small tokenizer of each family, by name."""
    # Test folders are no packages, so the module that trains them is loaded by its path.
    file = Path(__file__).parents[1] / "text" / "small_tokenizers.py"
    spec = importlib.util.spec_from_file_location("small_tokenizers", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: Tokenizer.load(str(make(root / name))) for name, make in module.FAMILIES.items()}
