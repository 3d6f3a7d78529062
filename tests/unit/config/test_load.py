"""A configuration is read whole, or refused in one line that says what to change."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, field_validator, model_validator

from jaxdistill.config import StrictConfig, dump, load
from jaxdistill.errors import ConfigError

BASE = "run:\n  steps: 3\n  dir: runs/x\n"


class Replay(StrictConfig):
    kind: Literal["replay"] = "replay"
    path: Path = Path("scores")


class Server(StrictConfig):
    kind: Literal["server"]
    endpoint: str | list[str]
    timeout: float = Field(30.0, gt=0)


class Run(StrictConfig):
    steps: int = Field(gt=0)
    dir: Path
    seed: int = 0
    rate: float = 1e-5
    signal: Literal["chunk", "exact"] = "chunk"

    @field_validator("dir")
    @classmethod
    def not_root(cls, value: Path) -> Path:
        if value == Path("/"):
            raise ValueError("must not be the root folder")
        return value


class Whole(StrictConfig):
    run: Run
    teacher: Annotated[Replay | Server, Field(discriminator="kind")] = Replay()
    sizes: tuple[int, ...] = (64, 128)
    extra: dict[str, bool | str] = Field(default_factory=dict)
    spare: Server | None = None
    notes: list[Replay] = Field(default_factory=list)

    @model_validator(mode="after")
    def seed_below_steps(self) -> "Whole":
        if self.run.seed > 1000 * self.run.steps:
            raise ConfigError("run.seed is more than 1000 run.steps, expected less")
        return self


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "c.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    """The message of the ConfigError, with the temporary folder taken out."""
    with pytest.raises(ConfigError) as caught:
        load(path, overrides, Whole)
    message = str(caught.value).replace(f"{path.parent}/", "")
    assert "\n" not in message
    return message


def test_file_alone(written: Callable[[str], Path]) -> None:
    loaded = load(written(BASE), [], Whole)
    assert loaded == Whole(run=Run(steps=3, dir=Path("runs/x")))


def test_overrides_win_in_order(written: Callable[[str], Path]) -> None:
    loaded = load(
        written(BASE),
        [
            "run.rate=1e-3",
            "run.rate=2e-3",
            "sizes=[1, 2, 3]",
            "sizes.0=7",
            "teacher.kind=server",
            "teacher.endpoint=[http://a:1, http://b:2]",
            "extra.enable_thinking=false",
            "extra.style=a=b",
        ],
        Whole,
    )
    assert loaded.run.rate == 2e-3
    assert loaded.sizes == (7, 2, 3)
    assert loaded.teacher == Server(kind="server", endpoint=["http://a:1", "http://b:2"])
    assert loaded.extra == {"enable_thinking": False, "style": "a=b"}


def test_references(written: Callable[[str], Path]) -> None:
    text = BASE + "teacher:\n  kind: replay\n  path: ${run.dir}/scores\nextra:\n  literal: \\${run.dir}\n"
    loaded = load(written(text), ["run.dir=elsewhere"], Whole)
    assert loaded.teacher == Replay(path=Path("elsewhere/scores"))
    assert loaded.extra == {"literal": "${run.dir}"}


def test_whole_numbers_are_valid_floats(written: Callable[[str], Path]) -> None:
    assert load(written(BASE), ["run.rate=1"], Whole).run.rate == 1.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.stpes=4", "override 'run.stpes=4': unknown key 'run.stpes', did you mean 'run.steps'?"),
        ("steps=4", "override 'steps=4': unknown key 'steps', did you mean 'run.steps'?"),
        ("tescher.x=4", "override 'tescher.x=4': unknown key 'tescher', did you mean 'teacher'?"),
        ("run.qqqqq=4", "override 'run.qqqqq=4': unknown key 'run.qqqqq'"),
        ("endpoint=a", "override 'endpoint=a': unknown key 'endpoint', did you mean 'teacher.endpoint'?"),
        (
            "teacher.path=a",
            "override 'teacher.path=a': key 'teacher.kind' is required: it tells which settings",
        ),
        (
            "notes=[{path: a}, {paht: b}]",
            "override 'notes=[{path: a}, {paht: b}]': "
            "unknown key 'notes.1.paht', did you mean 'notes.1.path'?",
        ),
        ("run.steps=ten", "override 'run.steps=ten': 'run.steps' is ten (text), expected an integer"),
        ("run.steps='4'", "override \"run.steps='4'\": 'run.steps' is '4' (text), expected an integer"),
        ("run.steps=4.0", "override 'run.steps=4.0': 'run.steps' is 4.0 (number), expected an integer"),
        ("run.steps=true", "override 'run.steps=true': 'run.steps' is true, expected an integer"),
        ("run.steps=", "override 'run.steps=': 'run.steps' is null, expected an integer"),
        (
            "run.steps=0",
            "override 'run.steps=0': 'run.steps' is 0 (integer), expected a value greater than 0",
        ),
        ("run.rate=fast", "override 'run.rate=fast': 'run.rate' is fast (text), expected a number"),
        ("run.dir=3", "override 'run.dir=3': 'run.dir' is 3 (integer), expected text"),
        ("run.dir=/", "override 'run.dir=/': 'run.dir': must not be the root folder"),
        ("run=3", "override 'run=3': 'run' is 3 (integer), expected a mapping"),
        ("sizes=3", "override 'sizes=3': 'sizes' is 3 (integer), expected a list"),
        ("sizes=[1, a]", "override 'sizes=[1, a]': 'sizes.1' is a (text), expected an integer"),
        ("extra.a=3", "override 'extra.a=3': 'extra.a' is 3 (integer), expected true or false or text"),
        (
            "run.signal=exat",
            "override 'run.signal=exat': 'run.signal' is exat (text), expected 'chunk' or 'exact', "
            "did you mean 'exact'?",
        ),
        (
            "teacher.kind=sever",
            "override 'teacher.kind=sever': 'teacher.kind' is sever (text), "
            "expected one of 'replay', 'server', did you mean 'server'?",
        ),
        ("run.seed=4000", "c.yaml: run.seed is more than 1000 run.steps, expected less"),
        ("run.steps", "override 'run.steps' is not of the form a.b=c (for example run.steps=100)"),
        ("=3", "override '=3' is not of the form a.b=c (for example run.steps=100)"),
        ("run..steps=3", "override 'run..steps=3' is not of the form a.b=c (for example run.steps=100)"),
        ("--run.steps=3", "override '--run.steps=3' is not of the form a.b=c (for example run.steps=100)"),
        (
            "run.dir.x=3",
            "override 'run.dir.x=3': 'run.dir' is runs/x in c.yaml, not a mapping, so it has no 'x'",
        ),
        ("run.dir=${run.nope}", "c.yaml: 'run.dir': Interpolation key 'run.nope' not found (${a.b} takes"),
        ("run.dir=???", "c.yaml: 'run.dir' is ???, which stands for a value that must be given"),
        ("run.dir=${", "c.yaml: 'run.dir': "),
        ("sizes=[1", "override 'sizes=[1':1:3: not valid YAML: "),
        (
            "teacher={path: a}",
            "override 'teacher={path: a}': the value is a mapping; override its keys one by one",
        ),
    ],
)
def test_bad_override(written: Callable[[str], Path], override: str, message: str) -> None:
    said = refusal(written(BASE), override)
    assert said == message or (len(said) > len(message) and said.startswith(message)), said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("run=null", "run.dir=x", "run.steps=0"), "override 'run.steps=0': 'run.steps' is 0"),
        (("run.steps=0", "run.steps=4", "run.steps=-1"), "override 'run.steps=-1': 'run.steps' is -1"),
        (("run.steps=0", "run=null", "run.dir=x", "run.steps=-1"), "override 'run.steps=-1': 'run.steps' is"),
        (("run.steps=0", "run=null", "run.dir=x"), "override 'run=null': key 'run.steps' is required"),
        (("spare.kind=a", "spare=[1]"), "override 'spare=[1]': 'spare' is [1] (list), expected a mapping"),
        (("teacher=null", "teacher.path=a"), "override 'teacher.path=a': key 'teacher.kind' is required"),
    ],
)
def test_of_several_overrides_the_one_that_set_the_value_is_named(
    written: Callable[[str], Path], overrides: tuple[str, ...], message: str
) -> None:
    assert refusal(written(BASE), *overrides).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "run:\n  stpes: 3\n  steps: 3\n  dir: x\n",
            "c.yaml:2: unknown key 'run.stpes', did you mean 'run.steps'?",
        ),
        (
            "run:\n  steps: 3\n",
            "c.yaml: key 'run.dir' is required but not given; write it in the file or as an",
        ),
        ("", "c.yaml: key 'run' is required but not given; write it in the file or as an override"),
        ("run:\n  steps: 3\n  dir: {a: b}\n", "c.yaml:3: 'run.dir' is {a: b} (mapping), expected text"),
        ("- 1\n", "c.yaml: holds [1], expected a mapping of keys to values"),
        ("just words\n", "c.yaml: holds just words, expected a mapping of keys to values"),
        (
            BASE + "  steps: 4\n",
            "c.yaml:4: key 'run.steps' is given twice (first in line 2); keep one of them",
        ),
        (
            BASE + "spare: {kind: server, endpont: x}\n",
            "c.yaml:4: unknown key 'spare.endpont', did you mean 'spare.endpoint'?; c.yaml: ",
        ),
        (
            BASE + "teacher: {path: x}\n",
            "c.yaml:4: key 'teacher.kind' is required: it tells which settings",
        ),
        (
            BASE + "teacher: {kind: server, endpiont: x, endpoint: x}\n",
            "c.yaml:4: unknown key 'teacher.endpiont', did you mean 'teacher.endpoint'?",
        ),
        (
            BASE + "teacher: {kind: server, endpoint: 3}\n",
            "c.yaml:4: 'teacher.endpoint' is 3 (integer), expected text or a list",
        ),
        (
            BASE + "".join(f"wrong{i}: 1\n" for i in range(9)),
            "c.yaml:4: unknown key 'wrong0'; c.yaml:5: unknown",
        ),
    ],
)
def test_bad_file(written: Callable[[str], Path], text: str, message: str) -> None:
    said = refusal(written(text))
    assert said == message or (len(said) > len(message) and said.startswith(message)), said


def test_many_findings_are_counted(written: Callable[[str], Path]) -> None:
    assert refusal(written(BASE + "".join(f"wrong{i}: 1\n" for i in range(9)))).endswith("; and 4 more")


def test_override_into_a_list_stays_inside(written: Callable[[str], Path]) -> None:
    said = refusal(written(BASE + "sizes: [1, 2]\n"), "sizes.2=3")
    assert said == (
        "override 'sizes.2=3': 'sizes' is a list of 2 in c.yaml; "
        "give an index below 2 in place of '2', or the whole list"
    )


def test_missing_and_unreadable_files(written: Callable[[str], Path], tmp_path: Path) -> None:
    written(BASE)
    assert refusal(tmp_path / "d.yaml") == "d.yaml: no such configuration file (did you mean c.yaml?)"
    assert refusal(tmp_path / "qqq") == "qqq: no such configuration file (" + str(tmp_path) + " holds c.yaml)"
    assert "there is no folder" in refusal(tmp_path / "no" / "c.yaml")
    assert "is a folder, expected a YAML file" in refusal(tmp_path)
    (tmp_path / "c.yaml").write_bytes(b"a: \xff")
    assert refusal(tmp_path / "c.yaml") == "c.yaml: is not UTF-8 text (byte 3), expected a YAML file"


@given(st.text(alphabet="a:{}[]\"'$\\&*!|>-=#@% \n\t.01e", max_size=30), st.text(max_size=20))
def test_any_input_loads_or_is_refused(tmp_path_factory: Any, text: str, value: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(BASE + text, encoding="utf-8")
    try:
        load(path, [f"run.dir={value}"], Whole)
    except ConfigError as error:
        assert "\n" not in str(error)


CONFIGS = st.builds(
    Whole,
    run=st.builds(
        Run,
        steps=st.integers(min_value=1),
        dir=st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)
        .filter(lambda text: text not in ("???", "/", "//"))
        .map(Path),
        rate=st.floats(allow_nan=False, allow_infinity=False),
    ),
    extra=st.dictionaries(
        st.text(alphabet=st.characters(codec="utf-8")),
        st.booleans() | st.text(alphabet=st.characters(codec="utf-8") | st.sampled_from("\\${}")),
        max_size=3,
    ).filter(lambda extra: "???" not in extra.values()),
    sizes=st.lists(st.integers(), max_size=3).map(tuple),
)


@given(CONFIGS)
def test_dump_loads_back(tmp_path_factory: Any, config: Whole) -> None:
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load(path, [], Whole) == config


def test_dump_is_readable() -> None:
    text = dump(Run(steps=3, dir=Path("ü"), rate=1e-5))
    assert text == "steps: 3\ndir: ü\nseed: 0\nrate: 1.0e-05\nsignal: chunk\n"


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_a_number_is_finite(tmp_path: Path, value: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(BASE, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"'run\.rate' is .*expected a finite number"):
        load(path, [f"run.rate={value}"], Whole)


def test_models_are_strict_and_frozen() -> None:
    with pytest.raises(ValidationError, match="extra_forbidden"):
        Replay.model_validate({"paths": "x"})
    with pytest.raises(ValidationError, match="frozen"):
        Replay().path = Path("y")


def test_config_does_not_load_jax() -> None:
    code = "import sys, jaxdistill.config; print([m for m in ('jax', 'numpy', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.sub(r"\s", "", done.stdout) == "[]"
