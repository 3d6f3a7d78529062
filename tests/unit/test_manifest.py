"""What a run that goes on in its folder says of a manifest it cannot be compared with."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jaxdistill import manifest as module
from jaxdistill.config import load
from jaxdistill.errors import ConfigError
from jaxdistill.inputs import read_inputs
from jaxdistill.manifest import check_base, write_manifest
from jaxdistill.run_config import RunConfig
from jaxdistill.teachers import EmbeddedConfig, Routes, TeacherIdentity, Teachers
from jaxdistill.teachers.sglang import SGLangTeacher

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"
IDENTITY = TeacherIdentity(
    name="teacher",
    model="models/one",
    model_type="llama",
    weight_version="default",
    tokenizer="a" * 64,
    tokenizer_checked=True,
    longest=127,
    canary_ids=(1, 2, 3),
    canary=(-1.0, -2.5),
)


@pytest.fixture(scope="module")
def write() -> Iterator[Callable[[Path], None]]:
    """Writes the manifest of one and the same run into a folder; no teacher is asked for that."""
    config = load(QUICKSTART, ["data.path=assets/toy/heldout.jsonl", "eval.path=null"], RunConfig)
    inputs = read_inputs(config)
    assert isinstance(config.teacher, EmbeddedConfig)
    teacher = SGLangTeacher(config.teacher, inputs.vocabularies.teachers[0], endpoints=["http://nowhere"])
    teacher.identity = IDENTITY
    teachers = Teachers([teacher], Routes(config.all_teachers, seed=0))
    yield lambda folder: write_manifest(folder, config, inputs, teachers)
    teachers.close()


@pytest.fixture
def manifest(write: Callable[[Path], None], tmp_path: Path) -> Path:
    """The manifest of a run that has begun."""
    write(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    return tmp_path / "manifest.json"


@pytest.mark.parametrize(
    ("place", "field", "words"),
    [
        (("student",), "chat_template", r"it lacks the field 'student\.chat_template'"),
        (("teachers", "teacher"), "chat_template", r"it lacks the field 'teachers\.teacher\.chat_template'"),
        (("teachers", "teacher", "identity"), "longest", "it lacks the field 'longest'"),
        (("teachers", "teacher", "identity"), "colour", "unexpected keyword argument 'colour'"),
    ],
)
def test_a_manifest_of_another_version_is_no_broken_file(
    write: Callable[[Path], None], manifest: Path, place: tuple[str, ...], field: str, words: str
) -> None:
    text = manifest.read_text()
    write(manifest.parent)
    assert manifest.read_text() == text  # as it was written, it is agreed with
    facts = here = json.loads(text)
    for key in place:
        here = here[key]
    if here.pop(field, None) is None:
        here[field] = "grey"
    manifest.write_text(changed := json.dumps(facts))
    message = (
        rf"another version of jaxdistill \(.*{words}\); finish the run with that version, or start a new"
    )
    with pytest.raises(ConfigError, match=message):
        write(manifest.parent)
    assert manifest.read_text() == changed


def test_a_broken_manifest_is_to_be_restored(write: Callable[[Path], None], manifest: Path) -> None:
    manifest.write_text('{"student": ')
    with pytest.raises(ConfigError, match=r"manifest\.json cannot be read \(.*\); restore it"):
        write(manifest.parent)
    manifest.unlink()
    with pytest.raises(ConfigError, match=r"cannot be read \(.*No such file.*\); restore it"):
        write(manifest.parent)


def test_a_model_of_the_hub_that_has_moved_on_is_another_base(
    write: Callable[[Path], None], manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A branch may point elsewhere when a run is resumed, evaluated or exported."""
    facts = json.loads(manifest.read_text())
    facts["student"]["hub_commit"] = "a" * 40
    manifest.write_text(json.dumps(facts))
    config = load(QUICKSTART, [], RunConfig)
    monkeypatch.setattr(module, "hub_commit", lambda name: "a" * 40)
    check_base(manifest.parent, config)
    write(manifest.parent)
    monkeypatch.setattr(module, "hub_commit", lambda name: "b" * 40)
    for check in (lambda: check_base(manifest.parent, config), lambda: write(manifest.parent)):
        with pytest.raises(ConfigError, match=r"another student\.hub_commit \(a{12} there, b{12} now\)"):
            check()
