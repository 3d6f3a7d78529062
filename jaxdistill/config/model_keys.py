"""Which keys a configuration model has, at any depth: what a wrong key is compared with."""

import difflib
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, TypeAliasType, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from jaxdistill.config.yaml_text import KeyPath, dotted


def suggest(model: type[BaseModel], path: KeyPath, data: Any) -> str | None:
    """The key, in full, that the unknown key at the end of `path` was probably meant to be, or None.

    A misspelling of a key of the same mapping comes first, then the very name elsewhere in the model
    (`steps` at the top finds `run.steps`), then what is merely similar. `data` is the configuration,
    which decides between the members of a union.
    """
    word = str(path[-1])
    beside = [(*path[:-1], name) for owner in owners(model, path[:-1], data) for name in owner.model_fields]
    anywhere = [found for found, _ in _fields(model, ())]
    # Another member of a union may have this very key at this very place: that says nothing.
    anywhere = [found for found in anywhere if dotted(found) != dotted(path)]
    for candidates, cutoff in ((beside, 0.8), (anywhere, 1.0), (beside, 0.6), (anywhere, 0.75)):
        names = [str(candidate[-1]) for candidate in candidates]
        close = nearest(word, names, cutoff)
        if close is not None:
            return dotted(candidates[names.index(close)])
    return None


def owners(model: type[BaseModel], path: KeyPath, data: Any) -> list[type[BaseModel]]:
    """The models the mapping at `path` can be; more than one where a union leaves it open."""
    members: list[Any] = [model]
    for part in path:
        members = [inner for member in members for inner in _step(member, part)]
        data = item(data, part)
        members = [member for member in members if _agrees(member, data)] or members
    return [member for member in members if is_model(member)]


def nearest(word: str, words: Sequence[str], cutoff: float = 0.6) -> str | None:
    """The one of `words` that `word` was probably meant to be; None where none is as similar as `cutoff`."""
    folded = {name.lower().replace("-", "_"): name for name in words}
    close = difflib.get_close_matches(word.lower().replace("-", "_"), list(folded), n=1, cutoff=cutoff)
    return folded[close[0]] if close else None


def keys(model: type[BaseModel]) -> list[tuple[str, bool]]:
    """Every dotted key of the model, of all members of its unions, and whether it can hold others: what lies
    inside lists is left out."""
    found: dict[str, bool] = {}
    for path, field in _fields(model, ()):
        holds = any(is_model(one) for one in alternatives(field.annotation))
        found[dotted(path)] = found.get(dotted(path), False) or holds
    return list(found.items())


def item(data: Any, part: str | int) -> Any:
    """What lies under key or index `part` of parsed YAML, or None where nothing does."""
    if isinstance(data, dict):
        return data.get(part)
    if isinstance(data, list) and isinstance(part, int) and part < len(data):
        return data[part]
    return None


def is_model(member: Any) -> bool:
    """Whether an annotation is a model, whose values have keys."""
    return isinstance(member, type) and issubclass(member, BaseModel)


def alternatives(annotation: Any) -> list[Any]:
    """What a value of this annotation may be, without the aliases, Annotated and unions around it."""
    if isinstance(annotation, TypeAliasType):
        return alternatives(annotation.__value__)
    origin = get_origin(annotation)
    if origin is Annotated:
        return alternatives(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [inner for part in get_args(annotation) for inner in alternatives(part)]
    return [annotation]


def is_tag(field: FieldInfo) -> bool:
    """Whether a field has one word alone, which tells its model from the others of a union."""
    return get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1


def _step(member: Any, part: str | int) -> list[Any]:
    """What lies under key or index `part` of a value of type `member`."""
    if is_model(member):
        field = member.model_fields.get(part)
        return alternatives(field.annotation) if field else []
    arguments = [argument for argument in get_args(member) if argument is not Ellipsis]
    return alternatives(arguments[-1]) if arguments else []


def _agrees(member: Any, data: Any) -> bool:
    """Whether every `Literal` field given in `data` (a union's tag) allows what it says."""
    if not is_model(member) or not isinstance(data, dict):
        return True
    for name, field in member.model_fields.items():
        tags = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        if tags and data.get(name, tags[0]) not in tags:
            return False
    return True


def _fields(
    model: type[BaseModel], above: KeyPath, seen: frozenset[Any] = frozenset()
) -> Iterator[tuple[KeyPath, FieldInfo]]:
    """Every key of the model with its field, shallow ones before those under them."""
    for name, field in model.model_fields.items():
        yield (*above, name), field
        for member in alternatives(field.annotation):
            if is_model(member) and member not in seen:
                yield from _fields(member, (*above, name), seen | {model, member})
