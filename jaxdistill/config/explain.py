"""pydantic's findings in one line of plain words: where, what was got, what was expected, what to do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from jaxdistill.config.model_keys import item, nearest, owners, suggest
from jaxdistill.config.overrides import Override
from jaxdistill.config.yaml_text import KeyPath, dotted, show

_MOST = 5  # more findings than this are counted, not listed: they mostly have one cause

_TYPES = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "none_required": "null",
}


@dataclass(frozen=True)
class Origins:
    """Where each key came from: the file, its lines, and the overrides in the order they were applied."""

    source: str
    lines: Mapping[KeyPath, int]
    overrides: Sequence[Override]

    def of(self, path: KeyPath) -> str:
        """`override 'run.steps=x'`, `file.yaml:12`, or `file.yaml` for a key that nobody gave."""
        line = self.lines.get(path)
        place, empty = (f"{self.source}:{line}", False) if line else (self.source, True)
        written = tuple(str(part) for part in path)
        for override in self.overrides:
            sets = written[: len(override.path)] == override.path
            # What holds nothing yet becomes a mapping by the first override of a key inside it.
            makes = empty and path and override.path[: len(path)] == written
            if sets or makes:
                place, empty = f"override {override.text!r}", sets and override.value is None
        return place


def explain(error: ValidationError, data: Any, model: type[BaseModel], origins: Origins) -> str:
    """All findings of `error` about `data` in one line: unknown keys first, since a mistyped key is
    also reported as a missing one.

    The members of a union report one by one; they are joined into "expected A or B".
    """
    groups: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False, include_context=True):
        groups.setdefault(_data_path(detail, data), []).append(detail)
    said = [
        _sentence(path, details, data, model, origins)
        for path, details in sorted(groups.items(), key=lambda group: not _unknown(group[1]))
    ]
    path, details = next(iter(groups.items()))
    if len(said) == 1 and _unknown(details) and suggest(model, path, data) is None:
        beside = [name for owner in owners(model, path[:-1], data) for name in owner.model_fields]
        said[0] += f"; there are {', '.join(dict.fromkeys(beside))}"
    more = [f"and {len(said) - _MOST} more"] if len(said) > _MOST else []
    return "; ".join([*said[:_MOST], *more])


def _data_path(detail: ErrorDetails, data: Any) -> KeyPath:
    """The finding's location without the names of union members that pydantic puts between the keys."""
    path: list[str | int] = []
    for depth, part in enumerate(detail["loc"]):
        last = depth == len(detail["loc"]) - 1
        if not _holds(data, part) and not (last and detail["type"] == "missing"):
            continue
        data = item(data, part)
        path.append(part)
    return tuple(path)


def _holds(data: Any, part: str | int) -> bool:
    if isinstance(data, dict):
        return part in data
    return isinstance(data, list) and isinstance(part, int) and part < len(data)


def _sentence(
    path: KeyPath, details: list[ErrorDetails], data: Any, model: type[BaseModel], origins: Origins
) -> str:
    place, key = origins.of(path), f"'{dotted(path)}'"
    kinds = {detail["type"] for detail in details}
    if _unknown(details):
        close = suggest(model, path, data)
        return f"{place}: unknown key {key}" + (f", did you mean '{close}'?" if close else "")
    if kinds == {"missing"}:
        return f"{place}: key {key} is required but not given; write it in the file or as an override"
    if kinds <= {"union_tag_invalid", "union_tag_not_found"}:
        return _tag_sentence(path, details[0], origins)
    contexts = [detail.get("ctx", {}) for detail in details]
    own = [str(context["error"]) for context in contexts if "error" in context]
    if own:
        return f"{place}: {key + ': ' if path else ''}{' or '.join(dict.fromkeys(own))}"
    wanted = " or ".join(dict.fromkeys(_expected(detail) for detail in details))
    return f"{place}: {key} is {_got(details[0]['input'])}, expected {wanted}{_meant(details)}"


def _unknown(details: list[ErrorDetails]) -> bool:
    return {detail["type"] for detail in details} == {"extra_forbidden"}


def _tag_sentence(path: KeyPath, detail: ErrorDetails, origins: Origins) -> str:
    """For a union told apart by one key, such as `kind`, where that key is absent or says nothing known."""
    context = detail.get("ctx", {})
    tag = (*path, str(context.get("discriminator", "")).strip("'"))
    if "tag" not in context:
        return f"{origins.of(path)}: key '{dotted(tag)}' is required: it tells which settings the others are"
    allowed = str(context.get("expected_tags", ""))
    close = nearest(str(context["tag"]), allowed.replace("'", "").split(", "))
    hint = f", did you mean '{close}'?" if close else ""
    return f"{origins.of(tag)}: '{dotted(tag)}' is {context['tag']} (text), expected one of {allowed}{hint}"


def _expected(detail: ErrorDetails) -> str:
    context = detail.get("ctx", {})
    if detail["type"] == "too_short":
        return f"at least {context['min_length']} of them"
    if detail["type"] == "too_long":
        return f"at most {context['max_length']} of them"
    known = _TYPES.get(detail["type"])
    if known:
        return known
    message = detail["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    message = message[:1].lower() + message[1:]
    return f"a value {message}" if message.startswith(("greater", "less")) else message


def _got(value: Any) -> str:
    """The value with the kind that matters for telling `3` from `"3"`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return show(value)
    kinds = {int: "integer", float: "number", str: "text", list: "list", dict: "mapping"}
    return f"{show(value)} ({kinds.get(type(value), type(value).__name__)})"


def _meant(details: list[ErrorDetails]) -> str:
    """A hint where text is close to one of the allowed words."""
    for detail in details:
        if detail["type"] in ("literal_error", "enum") and isinstance(detail["input"], str):
            allowed = str(detail.get("ctx", {}).get("expected", "")).replace(" or ", ", ")
            close = nearest(detail["input"], [word.strip("'") for word in allowed.split(", ")])
            if close:
                return f", did you mean '{close}'?"
    return ""
