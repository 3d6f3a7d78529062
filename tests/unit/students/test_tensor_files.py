"""Which files of a folder hold the model."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdistill.errors import ConfigError
from jaxdistill.students.tensor_files import TensorFiles, fingerprint, weight_files

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards and their index, one tensor each: a and b."""
    for name, file in zip("ab", SHARDS, strict=True):
        save_file({name: np.ones(2, np.float32)}, tmp_path / file)
    index = {"metadata": {}, "weight_map": dict(zip("ab", SHARDS, strict=True))}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("beside", ["consolidated.safetensors", "adapter_model.safetensors"])
def test_files_beside_those_of_the_index_are_left_alone(folder: Path, beside: str) -> None:
    before = fingerprint(folder)
    save_file({"a": np.zeros(3, np.float32), "other": np.zeros(3, np.float32)}, folder / beside)
    assert [file.name for file in weight_files(folder)] == SHARDS
    assert TensorFiles(folder).names() == {"a", "b"}
    assert fingerprint(folder) == before
    save_file({"b": np.zeros(2, np.float32)}, folder / SHARDS[1])
    assert fingerprint(folder) != before


def test_without_an_index_the_one_file_is_the_model_and_else_all_files(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    assert [file.name for file in weight_files(folder)] == SHARDS
    save_file({"whole": np.ones(2, np.float32)}, folder / "model.safetensors")
    assert TensorFiles(folder).names() == {"whole"}


def test_a_shard_that_the_index_names_and_the_folder_has_not_is_named(folder: Path) -> None:
    (folder / SHARDS[0]).unlink()
    for read in (TensorFiles, fingerprint):
        with pytest.raises(ConfigError, match=f"{SHARDS[0]} is missing, but model.safetensors.index.json"):
            read(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_cannot_be_read_is_named(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ConfigError, match=r"index\.json has no readable weight_map"):
        weight_files(folder)


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for read in (weight_files, fingerprint):
        with pytest.raises(ConfigError, match=r"no \*\.safetensors file"):
            read(tmp_path)
