"""What a scorer is, and how a config names one."""

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator

from jaxdistill.errors import ConfigError, DataError, JaxDistillError
from jaxdistill.records import Prompt, Rollout
from jaxdistill.scorers import gym, text

Function = Callable[[str, Prompt], Any]  # (response text, its prompt) -> a number in [0, 1], or a bool


@dataclass(frozen=True)
class Scorer:
    """A function from (response text, prompt) to how right the response is, in [0, 1].

    `judges` says whether a row holds what the function compares with, and raises `DataError` naming the row
    where that is there and of no use. Calling the scorer gives None for a row it does not judge, and 0 for
    a response that was cut at the length limit: what it would have said is not known.
    """

    name: str
    function: Function
    judges: Callable[[Prompt], bool]

    def __call__(self, rollout: Rollout) -> float | None:
        """Raises `DataError` naming the row and the scorer where the function raises anything, or returns
        what is not a number in [0, 1]."""
        prompt = rollout.prompt
        if not self.judges(prompt):
            return None
        if not rollout.finished:
            return 0.0
        where = f"scorer {self.name!r} on {prompt.where}"
        response = rollout.response.text
        try:
            value = self.function(response, prompt)
        except JaxDistillError:
            raise
        except Exception as error:  # somebody else's function may raise anything; the row must be named
            raise DataError(
                f"{where} raised {type(error).__name__}: {error}; the response was {response!r:.200}"
            ) from error
        number = isinstance(value, bool | int | float | np.bool_ | np.integer | np.floating)
        if not number or not math.isfinite(value) or not 0.0 <= value <= 1.0:
            raise DataError(
                f"{where} returned {value!r:.80}, expected a number in [0, 1] or a bool; the response was "
                f"{response!r:.200}"
            )
        return float(value)


def _has_answer(prompt: Prompt) -> bool:
    return prompt.answer is not None


SCORERS: Mapping[str, tuple[Function, Callable[[Prompt], bool]]] = {
    "exact": (text.exact, _has_answer),
    "final_line": (text.final_line, _has_answer),
    "numeric": (text.numeric, text.has_number),
    "reasoning_gym": (gym.score, gym.has_entry),
}


def load_scorer(name: str) -> Scorer:
    """The scorer a config names: one of `SCORERS`, or `package.module:function`, a callable
    (response: str, prompt: Prompt) -> float that judges every row.

    Raises `ConfigError` where there is no such thing to import or call.
    """
    if name in SCORERS:
        if name == "reasoning_gym":
            gym.require()
        return Scorer(name, *SCORERS[name])
    expected = f"expected one of {', '.join(SCORERS)}, or package.module:function"
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute) or module.startswith("."):
        raise ConfigError(f"scorer {name!r} is unknown; {expected}")
    try:
        function = importlib.import_module(module)
        for part in attribute.split("."):
            function = getattr(function, part)
    except Exception as error:  # somebody else's module may raise anything while it is loaded
        raise ConfigError(
            f"scorer {name!r} cannot be imported ({type(error).__name__}: {error}); {expected}, with the "
            "module where Python finds it (installed, or its folder in PYTHONPATH)"
        ) from error
    if not callable(function):
        raise ConfigError(f"scorer {name!r} is {function!r:.80}, which cannot be called; {expected}")
    return Scorer(name, function, lambda prompt: True)


def _checked(name: str) -> str:
    load_scorer(name)
    return name


ScorerName = Annotated[str, AfterValidator(_checked)]  # a config's value, known to load
