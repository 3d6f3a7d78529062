"""YAML in and out: the YAML 1.2 reading of plain words, one value a key, and every key's line kept.

PyYAML alone reads `1e-5` as text, `on` as true, `1:30` as 90, and lets a second `steps:` win silently;
a configuration must not be read that way, and what `dump` writes must come back as it was.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml
from pydantic import BaseModel

from jaxdistill.errors import ConfigError

KeyPath = tuple[str | int, ...]

_WORDS = (
    ("tag:yaml.org,2002:null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    (
        "tag:yaml.org,2002:int",
        r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*|0x[0-9a-fA-F]+)$",
        list("-+0123456789"),
    ),
    (
        "tag:yaml.org,2002:float",
        r"(?:[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+0123456789."),
    ),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the plain words of YAML 1.2 only: no dates, no `on`, no base 60, no `<<`."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which this reader, or one of YAML 1.1, would take for something else."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Line ends and other invisible characters only survive, and show, as escapes in double quotes."""
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_text)


_PATTERNS = {tag: re.compile(pattern) for tag, pattern, _ in _WORDS}
_PLAIN_TAGS = {*_PATTERNS, "tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"}

for _tag, _, _first in _WORDS:
    _Loader.add_implicit_resolver(_tag, _PATTERNS[_tag], _first)
    _Dumper.add_implicit_resolver(_tag, _PATTERNS[_tag], _first)


@dataclass(frozen=True)
class Document:
    """A parsed YAML text: its value and the line (from 1) on which each key or item begins."""

    value: Any
    lines: dict[KeyPath, int]


def parse(text: str, source: str) -> Document:
    """Reads one YAML document; an empty one is None.

    Raises ConfigError, beginning with `source` and the line, for broken YAML, a repeated key, a key
    that is not text, or an alias that contains itself.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is None:
            return Document(None, {})
        lines: dict[KeyPath, int] = {}
        _check(node, (), lines, source, ())
        return Document(_construct(node), lines)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{source}{_place(error)}: not valid YAML: {_problem(error)}") from error
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error


def dump(model: BaseModel) -> str:
    """The model as YAML, keys in the order of its fields; `load` reads it back to an equal model."""
    data = _escape(model.model_dump(mode="json"))
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def show(value: Any, limit: int = 80) -> str:
    """A value as a person would write it on one line of YAML, shortened, for messages."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**6)
    text = text.removesuffix("...\n").removesuffix("\n")
    return text if len(text) <= limit else text[: limit - 3] + "..."


def dotted(path: KeyPath) -> str:
    """A key path as it is written in an override: `teacher.endpoint.0`."""
    return ".".join(str(part) for part in path)


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """{a: {b: 1}, c: [{d: 2}]} -> {"a.b": 1, "c.0.d": 2}."""
    if isinstance(node, list) and any(isinstance(inner, Mapping) for inner in node):
        node = dict(enumerate(node))
    if not isinstance(node, Mapping):
        return {prefix: node}
    return {
        key: value
        for name, inner in node.items()
        for key, value in flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _construct(node: yaml.Node) -> Any:
    loader = _Loader("")
    try:
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check(
    node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], source: str, above: tuple[int, ...]
) -> None:
    """Walks the tree before it is built: afterwards a repeated key would have vanished."""
    if id(node) in above:
        raise ConfigError(f"{source}:{_line(node)}: '{dotted(path)}' is an alias that contains itself")
    above = (*above, id(node))
    pattern = _PATTERNS.get(node.tag)
    if node.tag not in _PLAIN_TAGS or (pattern and not pattern.match(str(node.value))):
        tag = node.tag.removeprefix("tag:yaml.org,2002:")
        raise ConfigError(
            f"{source}:{_line(node)}: '{dotted(path)}' has the tag !!{tag}, which it cannot have here; "
            "write plain text, numbers, true, false, null, lists and mappings without tags"
        )
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*path, index)] = _line(item)
            _check(item, (*path, index), lines, source, above)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, item in node.value:
        line = _line(key)
        if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
            where = f" in '{dotted(path)}'" if path else ""
            raise ConfigError(
                f"{source}:{line}: a key{where} is {show(_construct(key))}, which is not text; "
                "every key must be a name (quote it if it is meant)"
            )
        here = (*path, key.value)
        if key.value in seen:
            raise ConfigError(
                f"{source}:{line}: key '{dotted(here)}' is given twice (first in line {seen[key.value]}); "
                "keep one of them"
            )
        seen[key.value] = lines[here] = line
        _check(item, here, lines, source, above)


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _place(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return f":{mark.line + 1}:{mark.column + 1}" if mark else ""


def _problem(error: yaml.MarkedYAMLError) -> str:
    text = error.problem or error.context or "unreadable"
    hint = ""
    if "\\t" in text:
        hint = " (indent with spaces, not tabs)"
    elif "cannot start any token" in text:
        hint = " (quote the value if the character is meant)"
    return text + hint


def _escape(value: Any) -> Any:
    """Marks `${` that is meant as text, which `load` would otherwise take for a reference."""
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value
