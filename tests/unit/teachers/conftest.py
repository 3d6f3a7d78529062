"""A tokenizer and rollouts for the teachers' tests."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from jaxdistill.records import Prompt, Rollout
from jaxdistill.text import Tokenizer, concatenate


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.load(str(tiny_model))


@pytest.fixture(scope="session")
def rollout(tokenizer: Tokenizer) -> Callable[..., Rollout]:
    """`rollout("text", finished=True)`: a response (to `prompt`, or a question) by a student with the same
    tokenizer; bytes need not be UTF-8."""

    def make(
        text: str | bytes, *, finished: bool = True, question: str = "Why?", prompt: Prompt | None = None
    ) -> Rollout:
        parts = [tokenizer.encode(text)] if text else []
        response = concatenate(parts + ([tokenizer.role_span("end_of_turn")] if finished else []))
        messages = [{"role": "user", "content": question}]
        return Rollout(
            prompt=prompt or Prompt(messages=messages, index=0, source="test"),
            prompt_ids=tokenizer.render(messages),
            response=response,
            logprobs=np.zeros(len(response), np.float32),
            finished=finished,
            policy_version=0,
            vocabulary="another",
        )

    return make


@pytest.fixture(scope="session")
def rollouts(rollout: Callable[..., Rollout]) -> Sequence[Rollout]:
    texts = ["the answer is 42", "", "no end", "ünï ≈ 😀", "x" * 40]
    return [rollout(text, finished=text != "no end") for text in texts]
