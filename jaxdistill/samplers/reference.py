"""Off-policy rows: the assistant's own turns of a chat.

Letters: P ids of the chat before the first turn trained on, R ids from there to the end of the last turn.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdistill.errors import DataError, TooLongError
from jaxdistill.parallel import processes
from jaxdistill.records import Prompt, Rollout
from jaxdistill.samplers.base import RolloutConfig
from jaxdistill.text import Tokenizer


class ReferenceSampler:
    """Turns each prompt and its `Prompt.response` into a rollout; nothing is sampled.

    The response is the stretch from the first assistant turn of the chat to the last (or the last turn alone,
    by `rollout.reference_turns`), ends of turn included; what stands between turns is in it to be read, and
    masked. With `scored`, a teacher is to read the rows: then it is the last turn alone.
    """

    def __init__(self, tokenizer: Tokenizer, config: RolloutConfig, *, scored: bool):
        self.tokenizer = tokenizer
        self.config = config
        self._last_only = scored or config.reference_turns == "last"

    def sample(self, prompts: Sequence[Prompt], step: int, *, samples: int | None = None) -> list[Rollout]:
        """The reference of each prompt of this process's share, once: a second sample would be the same one.

        Raises what `rollout` raises."""
        return [self.rollout(prompts[number], step) for number in processes.share(len(prompts))]

    def push(self, params: Any, version: int) -> None:
        """References do not depend on the weights."""

    def rollout(self, prompt: Prompt, step: int) -> Rollout:
        """The reference of one prompt. With `rollout.too_long` "truncate" one that is too long is cut where
        its room ends: not finished, without an end of turn.

        Raises `DataError` naming the row that has no reference or cannot be rendered, `TooLongError` where
        there is no room for it, or with "truncate" not for one token of it."""
        where = prompt.where
        if prompt.response is None:
            raise DataError(
                f"{where} has no reference, expected messages that end with the assistant's turn, or a "
                "'response'; add one, or leave references out (rollout.origins, objective.kind=sft)"
            )
        try:
            chat = self.tokenizer.render_turns(
                [*prompt.messages, prompt.response],
                tools=prompt.tools,
                template_kwargs=self.config.template_kwargs,
                last_only=self._last_only,
            )
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        start, stop = chat.turns[0].start, chat.turns[-1].stop
        longest = self.config.max_prompt_tokens + self.config.max_new_tokens
        fits = stop <= longest
        if not fits and (self.config.too_long != "truncate" or start >= longest):
            raise TooLongError(
                f"{where}: the chat has {stop} student tokens up to the end of its last turn, more than "
                f"rollout.max_prompt_tokens + rollout.max_new_tokens = {longest}",
                by=stop - longest,
                limit="rollout.max_prompt_tokens + rollout.max_new_tokens",
            )
        stop = min(stop, longest)
        return Rollout(
            prompt=prompt,
            prompt_ids=chat.ids[:start],
            response=self.tokenizer.spans(chat.ids[start:stop]),
            logprobs=np.zeros(stop - start, np.float32),
            finished=fits,
            policy_version=step,
            vocabulary=self.tokenizer.vocab_fingerprint,
            assistant_mask=chat.assistant_mask[start:stop],
            origin="reference",
        )
