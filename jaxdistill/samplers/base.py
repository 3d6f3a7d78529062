"""What every sampler is asked for."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from pydantic import Field, field_validator, model_validator

from jaxdistill.config import StrictConfig
from jaxdistill.errors import DataError, TooLongError
from jaxdistill.records import ORIGINS, Origin, Prompt, Rollout
from jaxdistill.text import Tokenizer

Share = float | tuple[float, float]


class OriginsConfig(StrictConfig):
    """Who answers a step's prompts: the `student`, the data's `reference`s, the `teacher`.

    Each has its share of the prompts, a number or `[start, end]`, linear from the run's first step to its
    last. At every step the shares sum to 1.
    """

    student: Share = 0.0
    reference: Share = 0.0
    teacher: Share = 0.0

    @model_validator(mode="after")
    def _sums(self) -> "OriginsConfig":
        for name, pair in self._ends.items():
            if not all(0 <= share <= 1 for share in pair):
                raise ValueError(f"{name}={list(pair)}, but a share lies between 0 and 1")
        for when, shares in zip(("first", "last"), zip(*self._ends.values(), strict=True), strict=True):
            total = math.fsum(shares)
            if abs(total - 1) > 1e-6:
                raise ValueError(
                    f"the shares sum to {total:g} at the {when} step, expected 1: every prompt is answered "
                    "by the student, a reference or the teacher"
                )
        return self

    def at(self, step: int, steps: int) -> dict[Origin, float]:
        """The shares at `step` of a run of `steps`."""
        done = step / max(steps - 1, 1)
        return {name: start + (end - start) * done for name, (start, end) in self._ends.items()}

    def most(self, origin: Origin) -> float:
        """The largest share `origin` has at any step."""
        return max(self._ends[origin])

    @property
    def _ends(self) -> Mapping[Origin, tuple[float, float]]:
        shares: dict[Origin, Share] = {name: getattr(self, name) for name in ORIGINS}
        return {name: s if isinstance(s, tuple) else (s, s) for name, s in shares.items()}


class RolloutConfig(StrictConfig):
    """How responses are made. Lengths are in student tokens.

    `samples_per_prompt` to each prompt, of at most `max_new_tokens`; prompts beyond `max_prompt_tokens` have
    no room (`too_long`). `template_kwargs` are given to the student's chat template.

    `too_long`: what becomes of a row of the data there is no room for. It ends the run before its first step,
    or such rows are left out; with `truncate` a reference is cut where its room ends, and has no end of turn
    then. A prompt is never cut: the teacher would read another one than the student.

    `max_staleness`: how many updates old the weights may be that a step's responses were sampled with; with 0
    every step waits for its own responses, with more the teacher scores while the student trains.
    `origins`: who answers the prompts (not set: what the objective says). `temperature`, `top_k` (0: all),
    `top_p` (1: all) and `min_p` (0: all) are the student's and work in this order (see `filters.filtered`); a
    response of its ends with its end of turn, or with the token that completes one of the strings of `stop`.
    `kv_dtype` is what its keys and values are kept in while it samples (not set: what it computes in): fewer
    bits make the cache smaller, and the samples those of a slightly other model.
    `teacher_temperature` is that of a teacher that writes; 0 takes the most likely token. `teacher_top_p`
    below 1 lets it draw from the fewest tokens alone that have that much of the probability.
    `reference_turns`: what is taken from a reference chat with several assistant turns, every one or the
    last; where a teacher scores the references it is always the last, since the teacher reads the turns
    before through its own template.
    """

    samples_per_prompt: int = Field(default=4, ge=1)
    max_staleness: int = Field(default=0, ge=0)
    max_prompt_tokens: int = Field(default=256, ge=1)
    max_new_tokens: int = Field(default=256, ge=1)
    too_long: Literal["drop", "truncate", "stop"] = "stop"
    temperature: float = Field(default=1.0, ge=0.0)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    stop: tuple[str, ...] = ()
    kv_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    teacher_temperature: float = Field(default=1.0, ge=0.0)
    teacher_top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    origins: OriginsConfig | None = None
    reference_turns: Literal["all", "last"] = "all"
    template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @field_validator("stop")
    @classmethod
    def _no_empty_string(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(value):
            raise ValueError(
                f"got an empty stop string in {list(value)}: every response has it; leave it out"
            )
        return value

    @property
    def off_policy(self) -> Mapping[str, int | float]:
        """The settings with which the student's samples are not drawn from its own distribution."""
        neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        values = {name: getattr(self, name) for name in neutral}
        return {name: value for name, value in values.items() if value != neutral[name]}


@runtime_checkable
class Sampler(Protocol):
    """`sample` is given the same prompts in every process and returns the responses to this process's share
    of them (`parallel.processes.share`), in the prompts' order, all samples of one prompt together, `samples`
    of each (default: the config's number), for the training step `step`, which the draw hangs on; `push`
    hands over new weights before the next call."""

    def sample(
        self, prompts: Sequence[Prompt], step: int, *, samples: int | None = None
    ) -> list[Rollout]: ...

    def push(self, params: Any, version: int) -> None: ...


def render_prompt(tokenizer: Tokenizer, prompt: Prompt, config: RolloutConfig) -> np.ndarray:
    """The prompt's ids by the student's template, int32 [P].

    Raises `DataError` naming the row when it has no token, `TooLongError` when it has more than
    `rollout.max_prompt_tokens`.
    """
    ids = tokenizer.render(prompt.messages, tools=prompt.tools, template_kwargs=config.template_kwargs)
    if not len(ids):
        raise DataError(
            f"{prompt.where}: the prompt has no student token, so there is nothing to go "
            "on from; give it text, or a chat template that begins with a token"
        )
    if len(ids) > config.max_prompt_tokens:
        raise TooLongError(
            f"{prompt.where}: the prompt has {len(ids)} student tokens, more than "
            f"rollout.max_prompt_tokens={config.max_prompt_tokens}",
            by=len(ids) - config.max_prompt_tokens,
            limit="rollout.max_prompt_tokens",
        )
    return ids
