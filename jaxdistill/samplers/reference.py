"""Off-policy rows: each prompt's own reference response, for `sft`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdistill.errors import DataError
from jaxdistill.records import Prompt, Rollout
from jaxdistill.samplers.base import RolloutConfig, render_prompt
from jaxdistill.text import Tokenizer, concatenate


class ReferenceSampler:
    """Turns `Prompt.response` into a rollout, end of turn included; nothing is sampled."""

    def __init__(self, tokenizer: Tokenizer, config: RolloutConfig):
        self.tokenizer = tokenizer
        self.config = config

    def sample(self, prompts: Sequence[Prompt], version: int, *, samples: int | None = None) -> list[Rollout]:
        """The reference of each prompt, once: a second sample would be the same one."""
        return [self._rollout(prompt, version) for prompt in prompts]

    def push(self, params: Any, version: int) -> None:
        """References do not depend on the weights."""

    def _rollout(self, prompt: Prompt, version: int) -> Rollout:
        if prompt.response is None:
            raise DataError(
                f"{prompt.source} row {prompt.index} has no 'response'; "
                "objective.kind=sft trains on reference responses"
            )
        response = concatenate(
            [self.tokenizer.encode(prompt.response), self.tokenizer.role_span("end_of_turn")]
        )
        if len(response) > self.config.max_new_tokens:
            raise DataError(
                f"{prompt.source} row {prompt.index}: the response has {len(response)} student tokens, more "
                f"than rollout.max_new_tokens={self.config.max_new_tokens}; raise it or drop the row"
            )
        return Rollout(
            prompt=prompt,
            prompt_ids=render_prompt(self.tokenizer, prompt, self.config),
            response=response,
            logprobs=np.zeros(len(response), np.float32),
            finished=True,
            policy_version=version,
            vocabulary=self.tokenizer.vocab_fingerprint,
        )
