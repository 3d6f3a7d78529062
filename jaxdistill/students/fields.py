"""The fields of a Hugging Face config, each read with a check of what it holds.

JSON of the wrong type often passes for a value ("false" is true, 4096.7 becomes 4096): it is refused here.
"""

import math
from collections.abc import Mapping
from typing import Any

from jaxdistill.errors import ConfigError


class Fields:
    """The fields of a JSON object. Every reader raises `ConfigError`, naming `where` the object stands, the
    field and its value, for a field that is missing or holds anything else than the reader is for."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where

    def says(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def get(self, name: str) -> Any:
        """The field, whatever it holds."""
        if name not in self.values:
            raise ConfigError(f"{self.where}: field {name!r} is missing")
        return self.values[name]

    def whole(self, name: str, least: int = 1) -> int:
        """A whole number from `least` on."""
        value = self.get(name)
        if type(value) is not int or value < least:
            raise self.wrong(name, f"a whole number, {least} or more")
        return value

    def positive(self, name: str) -> float:
        """A finite number above 0."""
        value = self.get(name)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.wrong(name, "a number above 0")
        return float(value)

    def flag(self, name: str, missing: bool = False) -> bool:
        """True or false; `missing` where the field is."""
        value = self.values.get(name, missing)
        if type(value) is not bool:
            raise self.wrong(name, "true or false")
        return value

    def numbers(self, name: str) -> list[float]:
        """A list of finite numbers above 0."""
        value = self.get(name)
        if not isinstance(value, list) or not all(
            type(x) in (int, float) and 0 < x < math.inf for x in value
        ):
            raise self.wrong(name, "a list of numbers above 0")
        return [float(x) for x in value]

    def inner(self, name: str) -> Mapping[str, Any]:
        """A JSON object; an empty one where the field is missing or null."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise self.wrong(name, "an object")
        return value or {}

    def wrong(self, name: str, expected: str) -> ConfigError:
        """What to raise for a field that is not what was `expected`."""
        return ConfigError(
            f"{self.where}: {name} is {self.get(name)!r}, expected {expected}; mend it, or download it again"
        )
