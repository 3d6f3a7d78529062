"""Dotted overrides, `a.b=c`: the value is YAML, the key a path through mappings and lists."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxdistill.config.yaml_text import Document, KeyPath, dotted, parse, show
from jaxdistill.errors import ConfigError

_KEY = re.compile(r"[A-Za-z_][\w-]*(?:\.[\w-]+)*")


@dataclass(frozen=True)
class Override:
    """One parsed override and the words it was given in."""

    path: KeyPath
    value: Any
    text: str


def parse_override(text: str) -> Override:
    """Reads `a.b=c`, where c is a YAML scalar or list; an empty c is null.

    Raises ConfigError where there is no `=`, the key is not a dotted name, or the value is broken YAML
    or a mapping (each of its keys is overridden by itself, so that nothing is dropped unseen).
    """
    key, equals, value = text.partition("=")
    if not equals or not _KEY.fullmatch(key):
        raise ConfigError(f"override {text!r} is not of the form a.b=c (for example run.steps=100)")
    parsed = parse(value, f"override {text!r}").value
    if isinstance(parsed, dict):
        raise ConfigError(
            f"override {text!r}: the value is a mapping; override its keys one by one ({key}.x=...), "
            "or quote it if it is text"
        )
    return Override(tuple(key.split(".")), parsed, text)


def apply(document: Document, overrides: Sequence[Override], source: str) -> Any:
    """The document's value with the overrides set in order, later ones winning; mappings that are
    missing on the way are made. Changes the document's value in place.

    Raises ConfigError where a path leads through a plain value or beside a list.
    """
    root = {} if document.value is None else document.value
    for override in overrides:
        here = root
        for depth, part in enumerate(override.path[:-1]):
            key = _key(here, part, override, depth, source)
            if isinstance(here, dict) and here.get(key) is None:
                here[key] = {}
            here = here[key]
        here[_key(here, override.path[-1], override, len(override.path) - 1, source)] = override.value
    return root


def _key(here: Any, part: str | int, override: Override, depth: int, source: str) -> str | int:
    """`part` as a key of `here`: itself in a mapping, an index in a list."""
    if isinstance(here, dict):
        return part
    above = f"'{dotted(override.path[:depth])}'" if depth else "the whole file"
    if isinstance(here, list):
        if str(part).isdecimal() and int(part) < len(here):
            return int(part)
        raise ConfigError(
            f"override {override.text!r}: {above} is a list of {len(here)} in {source}; "
            f"give an index below {len(here)} in place of '{part}', or the whole list"
        )
    raise ConfigError(
        f"override {override.text!r}: {above} is {show(here)} in {source}, "
        f"not a mapping, so it has no '{part}'"
    )
