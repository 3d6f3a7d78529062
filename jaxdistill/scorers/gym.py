"""The verifiers of reasoning-gym, an optional dependency: each of its tasks says itself what is right."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

from jaxdistill.errors import ConfigError, DataError
from jaxdistill.records import Prompt

_ROW = 'expected "metadata": {"dataset": "leg_counting", "entry": {"question": ..., "answer": ..., ...}}'


def require() -> None:
    """Raise `ConfigError` where reasoning-gym is not installed."""
    if find_spec("reasoning_gym") is None:
        raise ConfigError(
            "scorer 'reasoning_gym' needs the package reasoning-gym, which is not installed; "
            "pip install 'jaxdistill[reasoning-gym]'"
        )


def score(response: str, prompt: Prompt) -> float:
    """What the task's own `score_answer` says of the response, in [0, 1].

    The answer is what stands between the last `<answer>` and `</answer>`, and the whole response without
    them. The row's `metadata` holds the task as `dataset`, and as `entry` what the task made.
    """
    from reasoning_gym.utils import extract_answer

    metadata = prompt.metadata or {}
    answer = extract_answer(response)
    return _verifier(metadata["dataset"])(response.strip() if answer is None else answer, metadata["entry"])


def has_entry(prompt: Prompt) -> bool:
    """Whether the row is of reasoning-gym; raises `DataError` for a broken one or an unknown task."""
    metadata = prompt.metadata
    if metadata is None or "dataset" not in metadata:
        return False
    where = prompt.where
    entry = metadata.get("entry")
    if not isinstance(entry, dict) or not {"answer", "metadata"} <= entry.keys():
        raise DataError(f"{where}: the entry of its metadata is {entry!r:.80}; {_ROW}")
    try:
        _verifier(str(metadata["dataset"]))
    except ValueError as error:
        raise DataError(f"{where}: reasoning-gym has no such task ({error}); {_ROW}") from error
    return True


@cache
def _verifier(dataset: str) -> Callable[..., float]:
    from reasoning_gym import get_score_answer_fn

    return get_score_answer_fn(dataset)
