"""What every sampler is asked for."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from pydantic import Field

from jaxdistill.config import StrictConfig
from jaxdistill.errors import DataError
from jaxdistill.records import Prompt, Rollout
from jaxdistill.text import Tokenizer


class RolloutConfig(StrictConfig):
    """How responses are made. Lengths are in student tokens.

    `reference_turns`: what an objective that trains on the data's own responses takes from a chat with
    several assistant turns, every one or the last.
    """

    samples_per_prompt: int = Field(default=4, ge=1)
    max_prompt_tokens: int = Field(default=256, ge=1)
    max_new_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=1.0, ge=0.0)
    reference_turns: Literal["all", "last"] = "all"
    template_kwargs: dict[str, Any] = Field(default_factory=dict)


@runtime_checkable
class Sampler(Protocol):
    """`sample` returns the responses of each prompt in the prompts' order, all samples of one prompt
    together, `samples` of each (default: the config's number); `push` hands over new weights before the
    next call."""

    def sample(
        self, prompts: Sequence[Prompt], version: int, *, samples: int | None = None
    ) -> list[Rollout]: ...

    def push(self, params: Any, version: int) -> None: ...


def render_prompt(tokenizer: Tokenizer, prompt: Prompt, config: RolloutConfig) -> np.ndarray:
    """The prompt's ids by the student's template, int32 [P].

    Raises `DataError` naming the row when it is longer than `rollout.max_prompt_tokens`.
    """
    ids = tokenizer.render(prompt.messages, tools=prompt.tools, template_kwargs=config.template_kwargs)
    if len(ids) > config.max_prompt_tokens:
        raise DataError(
            f"{prompt.source} row {prompt.index}: the prompt has {len(ids)} student tokens, more than "
            f"rollout.max_prompt_tokens={config.max_prompt_tokens}; raise it or drop the row"
        )
    return ids
