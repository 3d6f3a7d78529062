"""Updates that were skipped because a loss or gradient was not finite: counted, their batches kept."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.batch import Batch, BatchEndOfTurn, BatchProjection, BatchSharedTopK
from jaxdistill.errors import DataError, NonFiniteError

_PARTS: Mapping[str, type] = {"projection": BatchProjection, "shared": BatchSharedTopK, "end": BatchEndOfTurn}


class SkippedBatches:
    """Keeps the batches of the last `most` + 1 skipped updates in `folder`, and ends the run when more than
    `most` were skipped in a row."""

    def __init__(self, folder: Path, most: int):
        self.folder = folder
        self.most = most
        self._in_a_row = 0

    def note(self, step: int, batch: Batch, values: Mapping[str, float]) -> None:
        """What became of the update of `step`; `values` are its metrics. Raises `NonFiniteError` where it is
        one too many."""
        if not values["skipped"]:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"step-{step:08d}.npz"
        save_batch(path, batch)
        for old in sorted(self.folder.glob("step-*.npz"))[: -self.most - 1]:
            old.unlink()
        if self._in_a_row > self.most:
            raise NonFiniteError(
                f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; "
                f"{self._in_a_row} updates in a row were skipped because these were not finite, more than "
                f"optimizer.max_skipped={self.most}. The state is as it was before them, the batch is in "
                f"{path} (jaxdistill.skipped.load_batch reads it). Lower optimizer.learning_rate or "
                "optimizer.clip_norm, or look at the batch, and run the same command again to go on behind it"
            )


def save_batch(path: Path, batch: Batch) -> None:
    """Write a batch as one npz file: an array by the name of its field, those of a part as `part.field`."""
    arrays: dict[str, Any] = {}
    for name, value in _fields(batch).items():
        if name in _PARTS:
            arrays |= {f"{name}.{inner}": array for inner, array in _fields(value).items()}
        else:
            arrays[name] = value
    np.savez_compressed(path, **arrays)


def load_batch(path: Path) -> Batch:
    """What `save_batch` wrote, as host arrays. Raises `DataError` for another file."""
    fields: dict[str, dict[str, np.ndarray]] = {}
    try:
        with np.load(path) as file:
            for name in file.files:
                part, _, field = name.rpartition(".")
                fields.setdefault(part, {})[field] = file[name]
        own = fields.pop("")
        parts: dict[str, Any] = {name: _PARTS[name](**values) for name, values in fields.items()}
        return Batch(**own, **parts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no batch that a run set aside ({error})") from error


def _fields(record: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if value is not None}
