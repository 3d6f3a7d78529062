"""Token spans made by hand, small genuine tokenizers, and tokenizers made by hand."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

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


@pytest.fixture(scope="session")
def all_tokenizers(tokenizers: dict[str, Tokenizer]) -> dict[str, Tokenizer]:
    """A small tokenizer of each family, and the toy pair."""
    toy = {side: Tokenizer.load(str(ROOT / "assets/toy" / side)) for side in ("student", "teacher")}
    return {**tokenizers, **toy}


def _bpe(
    folder: Path, pattern: str, merges: Sequence[tuple[str, str]], whole: Sequence[str] = ()
) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    joined = [left + right for left, right in merges]
    pieces = list(dict.fromkeys([*alphabet, *joined, *whole]))
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    raw = RawTokenizer(models.BPE(vocab=vocabulary, merges=list(merges), ignore_merges=bool(whole)))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    folder.mkdir(parents=True)
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({}))
    return Tokenizer.load(str(folder))


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tokenizer]:
    """`bpe(pattern, merges, whole)`: byte-level BPE with these cuts and merges, and with `whole` tokens that
    no merges lead to. A space is written as the character that stands for it, U+0120."""

    def make(*arguments: Sequence) -> Tokenizer:
        return _bpe(tmp_path_factory.mktemp("bpe") / "made", *arguments)

    return make
