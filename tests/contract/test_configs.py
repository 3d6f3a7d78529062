"""Every shipped config is a whole run that the schema accepts, and every setting says what it is."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from jaxdistill.config import dump, load
from jaxdistill.config.describe import meaning
from jaxdistill.config.model_keys import alternatives, is_model
from jaxdistill.errors import ConfigError
from jaxdistill.run_config import RunConfig
from jaxdistill.schema import schema_text

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
SCHEMA = FOLDER / "schema.json"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_is_valid_and_survives_its_own_dump(path, tmp_path):
    config = load(path, [], RunConfig)
    again = tmp_path / "config.yaml"
    again.write_text(dump(config))
    assert load(again, [], RunConfig) == config


def test_there_are_configs():
    assert {"quickstart", "toy_from_smollm2_cpu"} <= {path.stem for path in CONFIGS}


# --- the schema for editors


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(yaml.safe_load(schema_text()))
    return jsonschema.Draft202012Validator(yaml.safe_load(schema_text()))


def test_the_shipped_schema_is_what_the_command_prints():
    assert SCHEMA.read_text() == schema_text(), "python -m jaxdistill.schema > configs/schema.json"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_names_the_schema_and_is_valid_in_it(path, validator):
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    validator.validate(yaml.safe_load(text))
    validator.validate(yaml.safe_load(dump(load(path, [], RunConfig))))


@pytest.mark.parametrize(
    "override",
    [
        "run.steps=many",
        "run.stepz=3",
        "objective.kind=revers_kl",
        "objective={credit: lookahead}",
        "rollout.top_p=0",
        "mesh={data: 1.5}",
        "student=null",
    ],
)
def test_what_load_refuses_the_schema_refuses(override, validator):
    data = yaml.safe_load((FOLDER / "quickstart.yaml").read_text())
    key, value = override.split("=", 1)
    *above, last = key.split(".")
    section: dict[str, Any] = data
    for part in above:
        section = section[part]
    section[last] = yaml.safe_load(value)
    assert not validator.is_valid(data)


# --- meanings


def settings(model: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[tuple[type[BaseModel], str]]:
    """Every setting with the model it belongs to; a section, and a list of them, counts by what is in it."""
    if model in seen:
        return
    seen.add(model)
    for name, field in model.model_fields.items():
        members = [part for kind in alternatives(field.annotation) for part in (kind, *get_args(kind))]
        inner = [one for part in members for one in alternatives(part) if is_model(one)]
        if not inner:
            yield model, name
        for one in inner:
            yield from settings(one, seen)


def test_every_setting_says_what_it_is():
    found = list(settings(RunConfig, set()))
    assert len(found) > 100
    assert [f"{model.__name__}.{name}" for model, name in found if not meaning(model, name)] == []


def test_explain_reads_any_setting(tmp_path):
    """Each of a whole resolved config, lists and sections included."""
    from jaxdistill.config import describe

    path = tmp_path / "config.yaml"
    path.write_text(dump(load(FOLDER / "quickstart.yaml", [], RunConfig)))
    for section, values in yaml.safe_load(path.read_text()).items():
        assert describe(path, [], RunConfig, section)
        for name in values or ():
            said = describe(path, [], RunConfig, f"{section}.{name}")
            assert "set by" in said or "nobody" in said
    with pytest.raises(ConfigError):
        describe(path, [], RunConfig, "run.stepz")
