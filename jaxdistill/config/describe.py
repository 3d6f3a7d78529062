"""One setting explained: what it means, its value, its default, where it is defined and who set it."""

import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from jaxdistill.config.explain import Origins
from jaxdistill.config.load import load, read
from jaxdistill.config.model_keys import alternatives, is_model, is_tag, item, owners, suggest
from jaxdistill.config.yaml_text import KeyPath, dotted, show
from jaxdistill.errors import ConfigError

_WIDTH = 100


def describe(path: Path, overrides: Sequence[str], model: type[BaseModel], key: str) -> str:
    """What is to be said of the setting or section `key` (`a.b.c`) of the configuration that `load` reads
    from the same arguments, as some lines of text; of a section each of its settings in one line.

    Raises `ConfigError` for what `load` does, and for a key that there is none of, with the nearest."""
    values = load(path, overrides, model).model_dump(mode="json")
    _, origins = read(path, overrides)
    place: KeyPath = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
    value = _at(values, place)
    if isinstance(value, dict) and (sections := owners(model, place, values)):
        return "\n".join([key, *_section(sections[0], value, place, origins)])
    above = owners(model, place[:-1], values)
    owner = next((one for one in above if place[-1] in one.model_fields), None)
    if owner is None and value is None:
        close = suggest(model, place, values)
        names = ", ".join(dict.fromkeys(name for one in above for name in one.model_fields))
        hint = (
            f"did you mean {close}?" if close else f"there are {names}" if names else "its section has none"
        )
        raise ConfigError(f"--explain {key}: there is no such setting; {hint}")
    if owner is None:  # an item of a list or mapping: what there is to say of it stands with its owner
        return "\n".join([key, *_row("value", show(value)), *_row("set by", origins.of(place))])
    name = str(place[-1])
    field = owner.model_fields[name]
    there = len(place) == 1 or _at(values, place[:-1]) is not None
    setter = _setter(place, value, field, origins) if there else f"nobody: {dotted(place[:-1])} is null"
    return "\n".join(
        [
            key,
            *_row("meaning", meaning(owner, name)),
            *_row("value", show(value) if there else "none"),
            *_row("set by", setter),
            *_row("default", _default_tag(model, place) if is_tag(field) else _default(field)),
            *_row("takes", _takes(_same(model, place) if is_tag(field) else [field])),
            *_row("defined", _definition(owner, name)),
        ]
    )


def _at(values: Any, place: KeyPath) -> Any:
    for part in place:
        values = item(values, part)
    return values


def meaning(owner: type[BaseModel], name: str) -> str:
    """What the setting `name` of `owner` is: its own description, else the sentences of the docstrings that
    name it, else the first sentence of the section it is."""
    description = owner.model_fields[name].description
    if description:
        return description
    names = re.compile(rf"`(?:\w+\.)*{name}\b[^`]*`")
    for one in owner.__mro__:
        if named := [said for said in _sentences(one) if names.search(said)]:
            return " ".join(named)
    inner = [one for one in alternatives(owner.model_fields[name].annotation) if is_model(one)]
    return next(_sentences(inner[0]), "") if len(inner) == 1 else ""


def _sentences(owner: type[Any]) -> Iterator[str]:
    for paragraph in inspect.cleandoc(owner.__dict__.get("__doc__") or "").split("\n\n"):
        yield from re.split(r"(?<=[.;])\s+(?=[A-Z`])", " ".join(paragraph.split()))


def _section(section: type[BaseModel], values: Any, place: KeyPath, origins: Origins) -> list[str]:
    about = textwrap.indent(inspect.cleandoc(section.__doc__ or ""), "  ").splitlines()
    width = max(map(len, section.model_fields), default=0)
    lines = []
    for name, field in section.model_fields.items():
        setter = _setter((*place, name), values[name], field, origins)
        lines.append(f"  {name:<{width}}  {show(values[name], limit=40):<20}  {setter}")
    return [*about, "", *lines]


def _setter(place: KeyPath, value: Any, field: FieldInfo, origins: Origins) -> str:
    """Who gave the value: a line of the file or an override; of what nobody gave, where it comes from."""
    found = origins.of(place)
    if found != origins.source:
        return found
    if value == _default_value(field):
        return "nobody: its default"
    return "nobody: it follows from other settings"


def _default_value(field: FieldInfo) -> Any:
    return to_jsonable_python(field.get_default(call_default_factory=True, validated_data={}))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "none, it must be given"
    return show(_default_value(field))


def _default_tag(model: type[BaseModel], place: KeyPath) -> str:
    """Of the setting that tells the members of a union apart: that of the section as a whole, since each
    member has its own name here."""
    *above, name = place
    for section in _same(model, tuple(above)) if above else ():
        default = None if section.is_required() else _default_value(section)
        if isinstance(default, dict):
            return show(default.get(name))
    return "none, it must be given"


def _same(model: type[BaseModel], place: KeyPath) -> list[FieldInfo]:
    """The field of that name in every member of the union it tells apart."""
    name = str(place[-1])
    return [one.model_fields[name] for one in owners(model, place[:-1], None) if name in one.model_fields]


def _takes(fields: Sequence[FieldInfo]) -> str:
    """`an integer, >= 1`, `null or a path`, `cosine or constant`."""
    kinds = [_kind(one) for field in fields for one in alternatives(field.annotation)]
    words = " or ".join(dict.fromkeys(kinds))
    rules = [
        f"{sign} {getattr(rule, name):g}"
        for rule in fields[0].metadata
        for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        if hasattr(rule, name)
    ]
    return ", ".join([words, *rules])


def _kind(kind: Any) -> str:
    plain = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    if kind in plain:
        return plain[kind]
    if kind is type(None):
        return "null"
    origin = get_origin(kind)
    if origin is Literal:
        return " or ".join(map(str, get_args(kind)))
    if origin in (list, tuple):
        return "a list"
    return "a mapping"


def _definition(owner: type[BaseModel], name: str) -> str:
    """`jaxdistill/optimizer.py:24 (OptimizerConfig)`."""
    one = next(one for one in owner.__mro__ if name in inspect.get_annotations(one))
    lines, first = inspect.getsourcelines(one)
    at = next(n for n, line in enumerate(lines) if re.match(rf"\s+{name}\s*:", line))
    return f"{one.__module__.replace('.', '/')}.py:{first + at} ({one.__name__})"


def _row(name: str, text: str) -> list[str]:
    """One line of an explanation and what does not fit on it; nothing for an empty text."""
    return textwrap.wrap(
        text, _WIDTH, initial_indent=f"  {name:<9}", subsequent_indent=" " * 11, break_long_words=False
    )
