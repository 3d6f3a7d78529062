"""The folder of a run that goes on."""

import logging
from pathlib import Path

import pytest

from jaxdistill.config import dump, load
from jaxdistill.run_config import RunConfig
from jaxdistill.run_folder import check_run_folder, open_run_folder

ROOT = Path(__file__).parents[2]


def test_another_last_step_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A start checks the folder twice: before anything is loaded, and when it takes it."""

    def config(steps: int) -> RunConfig:
        given = [f"run.dir={tmp_path}", f"run.steps={steps}", "optimizer.schedule=cosine"]
        return load(ROOT / "configs/quickstart.yaml", given, RunConfig)

    (tmp_path / "config.yaml").write_text(dump(config(6)))
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    longer = dump(config(9))
    with caplog.at_level(logging.WARNING, logger="jaxdistill"):
        check_run_folder(tmp_path, longer, 9)
        with open_run_folder(tmp_path, longer, 9):
            pass
        assert [record.getMessage() for record in caplog.records] == [
            "run.steps was 6 and is 9: the cosine schedule now ends at the new last step"
        ]
        with open_run_folder(tmp_path, longer, 9):  # the next start
            pass
    assert len(caplog.records) == 1
