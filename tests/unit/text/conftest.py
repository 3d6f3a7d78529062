"""Small genuine tokenizers, trained once a session."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from jaxdistill.text import Tokenizer


@pytest.fixture(scope="session")
def makers() -> ModuleType:
    """The module that trains small tokenizers, loaded by path: test folders are no packages."""
    file = Path(__file__).with_name("small_tokenizers.py")
    spec = importlib.util.spec_from_file_location("small_tokenizers", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def folders(makers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer folder of each family, by name."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: make(root / name) for name, make in makers.FAMILIES.items()}


@pytest.fixture(scope="session")
def tokenizers(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    """A loaded tokenizer of each family, by name."""
    return {name: Tokenizer.load(str(folder)) for name, folder in folders.items()}


@pytest.fixture(params=["chatml", "llama3", "gemma", "llama2", "unigram"])
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    """Each family in turn."""
    return tokenizers[request.param]
