"""An endless, shuffled, resumable stream of prompt groups, by Grain."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
from pydantic import Field

from jaxdistill.config import StrictConfig
from jaxdistill.errors import ConfigError
from jaxdistill.records import Prompt


class DataConfig(StrictConfig):
    """What is trained on: `prompts_per_step` rows of `path` each step, anew in each epoch where `shuffle`."""

    path: Path
    prompts_per_step: int = Field(default=32, ge=1)
    shuffle: bool = True


class PromptStream:
    """Groups of prompts, epoch after epoch, each epoch shuffled anew from the seed.

    `state()` is the position; `restore(state)` goes back to it. It says nothing of the rows: that they are
    the same, by `fingerprint`, is for the caller to see to (`manifest`).
    """

    def __init__(self, prompts: Sequence[Prompt], config: DataConfig, *, seed: int):
        if len(prompts) < config.prompts_per_step:
            raise ConfigError(
                f"data.prompts_per_step={config.prompts_per_step}, but {config.path} has only "
                f"{len(prompts)} rows; lower it, or give more"
            )
        self.rows = len(prompts)
        self.fingerprint = fingerprint(prompts)
        dataset = grain.MapDataset.source(list(prompts)).seed(seed)
        if config.shuffle:
            dataset = dataset.shuffle()
        # Grouping before repeating would drop each epoch's last rows; the stream has no seams instead.
        dataset = dataset.repeat().batch(config.prompts_per_step, drop_remainder=True, batch_fn=list)
        self._iterator = iter(dataset.to_iter_dataset())

    def __iter__(self) -> "PromptStream":
        return self

    def __next__(self) -> list[Prompt]:
        return next(self._iterator)

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint needs to continue with the next group; JSON-serialisable."""
        return {"position": self._iterator.get_state()}

    def restore(self, state: dict[str, Any]) -> None:
        self._iterator.set_state(state["position"])


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """A hash of every row, in order, and of its index where rows before it were left out: samples hang on
    that too."""
    digest = hashlib.sha256()
    for place, p in enumerate(prompts):
        row = [p.messages, p.answer, p.response, p.source, p.tools]
        row += [] if p.metadata is None else [p.metadata]
        row += [] if p.index == place else [p.index]
        digest.update(json.dumps(row, ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
