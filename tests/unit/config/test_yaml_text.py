"""YAML is read as a person would read it, and what is written comes back."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdistill.config.yaml_text import parse, show
from jaxdistill.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E+3", 1000.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("-7", -7),
        ("1_000", 1000),
        ("0x1F", 31),
        (".inf", math.inf),
        ("true", True),
        ("~", None),
        ("", None),
        # what YAML 1.1 takes for something other than the text it looks like
        ("on", "on"),
        ("no", "no"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("007", "007"),
        ("http://127.0.0.1:30000", "http://127.0.0.1:30000"),
        ("<<", "<<"),
        ("'1'", "1"),
    ],
)
def test_plain_words(text: str, value: object) -> None:
    parsed = parse(text, "x").value
    assert parsed == value
    assert type(parsed) is type(value)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)


@given(VALUES)
def test_shown_values_read_back(value: object) -> None:
    assert parse(show(value, limit=10**9), "x").value == value


@given(st.text())
def test_values_are_shown_on_one_line(value: str) -> None:
    assert len(show({"key": value}).splitlines()) == 1


@given(st.text())
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        parse(text, "file.yaml")
    except ConfigError as error:
        assert str(error).startswith("file.yaml")
        assert "\n" not in str(error)


def test_lines_of_keys() -> None:
    document = parse("a:\n  b: 1\n  c:\n    - 2\n    - 3\n", "x")
    assert document.lines == {("a",): 1, ("a", "b"): 2, ("a", "c"): 3, ("a", "c", 0): 4, ("a", "c", 1): 5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "f:3: key 'a' is given twice (first in line 1); keep one of them"),
        ("a:\n- b: 1\n  b: 1\n", "f:3: key 'a.0.b' is given twice (first in line 2); keep one of them"),
        ("a: 1\nb: [1,\n", "f:3:1: not valid YAML"),
        ("a:\n\tb: 1\n", "f:2:1: not valid YAML: found character '\\t' that cannot start any token (indent"),
        ("a: @b\n", "f:1:4: not valid YAML: found character '@' that cannot start any token (quote"),
        ("a: {1: b}\n", "f:1: a key in 'a' is 1, which is not text"),
        ("a: &x [*x]\n", "f:1: 'a.0' is an alias that contains itself"),
        ("a: *nope\n", "f:1:4: not valid YAML: found undefined alias"),
        ("a: 1\n---\nb: 2\n", "f:2:1: not valid YAML: but found another document"),
        ("a: !!python/name:os.system x\n", "f:1: 'a' has the tag !!python/name:os.system"),
        ("a: !!bool perhaps\n", "f:1: 'a' has the tag !!bool"),
        ("a: !!binary aGk=\n", "f:1: 'a' has the tag !!binary"),
        ("a: \0", "f: not valid YAML: unacceptable character"),
    ],
)
def test_refusals_name_the_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "f")
    assert str(caught.value).startswith(message)


def test_long_values_are_shortened_in_messages() -> None:
    assert show(list(range(1000)), limit=20) == "[0, 1, 2, 3, 4, 5..."
