"""Rows the teacher writes: sequence-level distillation (Kim & Rush 2016, section 3.2, with a sample in the
place of the beam's best).

Letters: R student response tokens.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdistill.parallel import processes
from jaxdistill.records import END_OF_TURN, ROLE_NAMES, Prompt, Rollout, TokenSpans, Unscored
from jaxdistill.samplers.base import RolloutConfig, render_prompt
from jaxdistill.teachers import Teachers
from jaxdistill.teachers.base import carry_over
from jaxdistill.teachers.generation import Written
from jaxdistill.text import Tokenizer, concatenate


class TeacherSampler:
    """Lets each prompt's teacher answer it, and puts the answer into the student's tokens.

    The teacher reads the prompt through its own template and writes at most `rollout.max_new_tokens` of its
    tokens at `rollout.teacher_temperature` and `rollout.teacher_top_p`. The bytes are encoded by the
    student's tokenizer, role tokens go over by meaning, and an answer that ended by itself ends with the
    student's end of turn. What then is longer than `rollout.max_new_tokens` is cut, and has no end. A prompt
    the teacher has no room for becomes a row with an empty response and the reason.
    """

    def __init__(self, teachers: Teachers, tokenizer: Tokenizer, config: RolloutConfig, *, seed: int):
        self.teachers = teachers
        self.tokenizer = tokenizer
        self.config = config
        self.seed = seed

    def sample(self, prompts: Sequence[Prompt], step: int, *, samples: int | None = None) -> list[Rollout]:
        """One answer of the teacher to each prompt of this process's share, drawn from (seed, step, place,
        prompt index).

        Raises what `Teachers.generate` raises, and `DataError` for a prompt the student has no room for."""
        places = processes.share(len(prompts))
        prompts = [prompts[place] for place in places]
        prompt_ids = [render_prompt(self.tokenizer, prompt, self.config) for prompt in prompts]
        written = self.teachers.generate(
            prompts,
            [self._seed(step, place, prompt.index) for place, prompt in zip(places, prompts, strict=True)],
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.teacher_temperature,
            top_p=self.config.teacher_top_p,
        )
        responses = [
            (
                one.response if isinstance(one, Written) else concatenate([]),
                teacher.tokenizer.vocab_fingerprint,
            )
            for one, teacher in written
        ]
        return [
            self._rollout(prompt, ids, spans, one, step)
            for prompt, ids, spans, (one, _) in zip(
                prompts, prompt_ids, carry_over(responses, self.tokenizer), written, strict=True
            )
        ]

    def push(self, params: Any, version: int) -> None:
        """The teacher's answers do not depend on the student's weights."""

    def _rollout(
        self,
        prompt: Prompt,
        prompt_ids: np.ndarray,
        response: TokenSpans,
        answer: Written | Unscored,
        step: int,
    ) -> Rollout:
        finished = isinstance(answer, Written) and answer.finished
        if finished and (not len(response) or int(response.ids[-1]) not in self.tokenizer.stop_ids):
            # The teacher ended with a token that is not its end of turn, or one the server keeps to itself.
            response = concatenate([response, self.tokenizer.role_span(ROLE_NAMES[END_OF_TURN])])
        fits = len(response) <= self.config.max_new_tokens
        response = response.head(self.config.max_new_tokens)
        return Rollout(
            prompt=prompt,
            prompt_ids=prompt_ids,
            response=response,
            logprobs=np.zeros(len(response), np.float32),
            finished=finished and fits,
            policy_version=step,
            vocabulary=self.tokenizer.vocab_fingerprint,
            origin="teacher",
            unwritten=answer if isinstance(answer, Unscored) else None,
        )

    def _seed(self, *numbers: int) -> int:
        key = ":".join(map(str, (self.seed, *numbers))).encode()
        return int.from_bytes(hashlib.sha256(key).digest()[:4]) >> 1  # 31 bits, which every server takes
