"""Every shipped config is a whole run that the schema accepts."""

from pathlib import Path

import pytest

from jaxdistill.config import dump, load
from jaxdistill.run_config import RunConfig

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_is_valid_and_survives_its_own_dump(path, tmp_path):
    config = load(path, [], RunConfig)
    again = tmp_path / "config.yaml"
    again.write_text(dump(config))
    assert load(again, [], RunConfig) == config


def test_there_are_configs():
    assert {"quickstart", "toy_from_smollm2_cpu"} <= {path.stem for path in CONFIGS}
