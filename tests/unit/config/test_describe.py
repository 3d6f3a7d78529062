"""What `--explain` says of a setting."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from jaxdistill.config import StrictConfig, describe, json_schema
from jaxdistill.errors import ConfigError


class Inner(StrictConfig):
    """How fast. `rate` is the highest, in units; `unit: cm` is an example."""

    rate: float = Field(default=1e-5, gt=0, le=1)
    unit: str = "m"
    only: int


class Cat(StrictConfig):
    """A cat."""

    kind: Literal["cat"] = "cat"
    lives: int = Field(default=9, ge=1, description="how many are left")


class Dog(StrictConfig):
    """A dog."""

    kind: Literal["dog"] = "dog"
    tricks: tuple[str, ...] = ()


class Outer(StrictConfig):
    """Everything."""

    inner: Inner
    pet: Annotated[Cat | Dog, Field(discriminator="kind")] = Cat()
    more: Inner | None = None
    pets: tuple[Annotated[Cat | Dog, Field(discriminator="kind")], ...] = ()
    names: dict[str, str] = Field(default_factory=dict)


FILE = """\
inner:
  only: 3
pet: {kind: dog, tricks: [sit]}
pets:
  - {kind: cat, lives: 1}
names: {a: b}
"""


@pytest.fixture
def said(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """The rows of an explanation by their names; `key` is the first line."""
    path = tmp_path / "x.yaml"
    path.write_text(FILE)

    def explain(key: str, *overrides: str) -> dict[str, str]:
        first, *lines = describe(path, overrides, Outer, key).replace(str(path), "x.yaml").splitlines()
        rows, name = {"key": first}, ""
        for line in lines:
            name = line[2:11].strip() or name
            rows[name] = f"{rows.get(name, '')} {line[11:].strip()}".strip()
        return rows

    return explain


def test_a_setting_by_default(said) -> None:
    row = said("inner.rate")
    assert row.pop("defined").startswith(f"{Inner.__module__.replace('.', '/')}.py:")
    assert row == {
        "key": "inner.rate",
        "meaning": "`rate` is the highest, in units;",
        "value": "1.0e-05",
        "set by": "nobody: its default",
        "default": "1.0e-05",
        "takes": "a number, > 0, <= 1",
    }


def test_the_line_a_setting_is_defined_in(said) -> None:
    place = said("pet.tricks")["defined"]
    file, line = place.removesuffix(" (Dog)").rsplit(":", 1)
    assert file.endswith("test_describe.py")
    assert Path(__file__).read_text().splitlines()[int(line) - 1].strip() == "tricks: tuple[str, ...] = ()"


@pytest.mark.parametrize(
    ("key", "overrides", "row", "text"),
    [
        ("inner.only", [], "set by", "x.yaml:2"),
        ("inner.only", [], "default", "none, it must be given"),
        ("inner.only", ["inner.only=5"], "value", "5"),
        ("inner.only", ["inner.only=4", "inner.only=5"], "set by", "override 'inner.only=5'"),
        ("inner.unit", [], "meaning", "`unit: cm` is an example."),
        ("pet.kind", [], "takes", "cat or dog"),
        ("pet.kind", [], "default", "cat"),
        ("pet.tricks", [], "value", "[sit]"),
        ("pets.0.lives", [], "set by", "x.yaml:5"),
        ("pets.0.lives", [], "meaning", "how many are left"),
        ("names.a", [], "value", "b"),
        ("more", [], "takes", "a mapping or null"),
        ("more.rate", [], "value", "none"),
        ("more.rate", [], "set by", "nobody: more is null"),
        ("more.rate", [], "default", "1.0e-05"),
        ("more.rate", ["more.only=1"], "value", "1.0e-05"),
    ],
)
def test_rows(said, key: str, overrides: list[str], row: str, text: str) -> None:
    assert said(key, *overrides)[row] == text


def test_a_section_lists_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(FILE)
    lines = describe(path, ["inner.unit=km"], Outer, "inner").splitlines()
    assert lines[:2] == ["inner", "  How fast. `rate` is the highest, in units; `unit: cm` is an example."]
    assert [line.split(maxsplit=2) for line in lines[3:]] == [
        ["rate", "1.0e-05", "nobody: its default"],
        ["unit", "km", "override 'inner.unit=km'"],
        ["only", "3", f"{path}:2"],
    ]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("inner.rat", "did you mean inner.rate?"),
        ("pet.lives", "there are kind, tricks"),
        ("zzz", "there are inner, pet, more, pets, names"),
        ("", "there are inner"),
        ("inner.rate.x", "its section has none"),
        ("pets.7.kind.x", "its section has none"),
    ],
)
def test_a_key_that_there_is_none_of(said, key: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        said(key)
    assert str(caught.value).startswith(f"--explain {key}: there is no such setting; {hint}")


def test_a_broken_config_is_told_first(said) -> None:
    with pytest.raises(ConfigError, match=r"'inner\.only' is many"):
        said("inner.rate", "inner.only=many")


def test_the_schema_has_meanings_and_wants_the_tag() -> None:
    schema = json_schema(Outer)
    inner, dog = schema["$defs"]["Inner"], schema["$defs"]["Dog"]
    assert inner["properties"]["rate"]["description"] == "`rate` is the highest, in units;"
    assert schema["$defs"]["Cat"]["properties"]["lives"]["description"] == "how many are left"
    assert dog["required"] == ["kind"] and inner["required"] == ["only"]
    assert dog["additionalProperties"] is False and "title" not in dog
