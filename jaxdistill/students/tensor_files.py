"""The tensors of a model folder's safetensors files, read a piece at a time.

The library checks a file and its header; the bytes come from a memory map, because its readers either know
no bfloat16 (numpy) or put every piece on a device first (flax), and a model may be larger than the host's
memory.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxdistill.errors import ConfigError

Piece = tuple[slice, ...]

_DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


_INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a model folder, in order of their names: those that its index names,
    else model.safetensors, else every `*.safetensors` file. Others may lie beside them: the same weights in
    another layout (consolidated.safetensors), or adapters.

    Raises `ConfigError` for a folder without any, an index that cannot be read, and a file it names that is
    missing.
    """
    index, one = folder / _INDEX, folder / "model.safetensors"
    if index.is_file():
        try:
            files = sorted({folder / name for name in json.loads(index.read_bytes())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{index} has no readable weight_map ({error!r}); download it again") from error
        for file in files:
            if not file.is_file():
                raise ConfigError(f"{file} is missing, but {_INDEX} names it; download or export it again")
    else:
        files = [one] if one.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder}: no *.safetensors file; only safetensors weights are read")
    return files


def fingerprint(folder: Path) -> str:
    """A digest (SHA-256, in hexadecimal) of a model folder's config.json and its `weight_files`, whose errors
    it raises."""
    whole = hashlib.sha256()
    for file in [folder / "config.json", *weight_files(folder)]:
        with file.open("rb") as opened:
            whole.update(hashlib.file_digest(opened, "sha256").digest())
    return whole.hexdigest()


class TensorFiles:
    """Every tensor of the `weight_files` of `folder`, by name.

    Raises `ConfigError` as `weight_files` does, for a file that cannot be read, and for a tensor that two
    files hold.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._tensors: dict[str, np.ndarray] = {}
        self._other: dict[str, str] = {}
        for file in weight_files(folder):
            try:
                self._open(file)
            except (SafetensorError, OSError, ValueError) as error:
                raise ConfigError(f"{file} cannot be read ({error}); download or export it again") from error

    def _open(self, file: Path) -> None:
        with safe_open(file, framework="numpy"):
            pass  # the header is well-formed, and the file as long as it says
        data = np.memmap(file, np.uint8, mode="r")
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:start].tobytes())
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if name in self._tensors or name in self._other:
                raise ValueError(f"tensor {name} is in another file of the folder, too")
            if entry["dtype"] not in _DTYPES:
                self._other[name] = entry["dtype"]
                continue
            first, last = entry["data_offsets"]
            piece = data[start + first : start + last]
            self._tensors[name] = piece.view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])

    def names(self) -> set[str]:
        """All tensors, also those of a dtype that is not read."""
        return self._tensors.keys() | self._other.keys()

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises `ConfigError` unless there is a floating-point tensor `name` of this shape."""
        if name in self._other:
            raise ConfigError(
                f"{self.folder}: tensor {name} is stored as {self._other[name]}; readable are "
                f"{', '.join(_DTYPES)}: use the checkpoint that is not quantised"
            )
        if name not in self._tensors:
            raise ConfigError(
                f"{self.folder}: tensor {name} is missing; the download or export is incomplete"
            )
        if (found := self._tensors[name].shape) != shape:
            raise ConfigError(
                f"{self.folder}: tensor {name} has shape {found}, config.json says {shape}; they are of two "
                "models: download or export both again"
            )

    def dtype(self, name: str) -> np.dtype:
        """What a tensor is read as: bfloat16 as it is, anything else as float32."""
        stored = self._tensors[name].dtype
        return stored if stored == ml_dtypes.bfloat16 else np.dtype(np.float32)

    def read(self, name: str, piece: Piece) -> np.ndarray:
        """A piece of a tensor in its `dtype`; the file's own memory where it is stored so, not to be kept."""
        return self._tensors[name][piece].astype(self.dtype(name), copy=False)
