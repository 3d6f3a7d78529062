"""scripts/ablation.py: its cases are configs, and it reads no run that another config made."""

import json
from pathlib import Path

import pytest

from jaxdistill.config import dump, load
from jaxdistill.errors import DataError
from jaxdistill.run_config import RunConfig
from scripts import ablation

CASE = "gkd, beta 0.5"


def finished(out: Path, seed: int, accuracy: float, *overrides: str) -> None:
    """A run as `train` leaves it, of the case's config with some settings changed."""
    folder = ablation.folder_of(out, CASE, seed)
    folder.mkdir(parents=True)
    config = load(ablation.CONFIG, [*ablation.overrides_of(out, CASE, seed), *overrides], RunConfig)
    (folder / "config.yaml").write_text(dump(config))
    rows = [
        {"step": 0, ablation.ACCURACY: 0.1, ablation.REVERSE_KL: 0.6},
        {"step": 40, ablation.ACCURACY: 0.9, ablation.REVERSE_KL: 0.2},
        {"step": ablation.STEPS, ablation.ACCURACY: accuracy, ablation.REVERSE_KL: 0.1},
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.mark.parametrize("case", ablation.CASES)
def test_every_case_is_a_config(case):
    config = load(ablation.CONFIG, ablation.CASES[case], RunConfig)
    assert case.startswith(config.objective.kind)


def test_the_table_has_means_and_ranges_of_finished_runs(tmp_path):
    for seed, accuracy in enumerate((0.5, 0.7)):
        finished(tmp_path, seed, accuracy)
    assert ablation.is_done(tmp_path, CASE, 1) and not ablation.is_done(tmp_path, CASE, 2)
    runs = ablation.read_cases(tmp_path)
    assert list(runs) == [CASE]
    row = ablation.table(runs).splitlines()[-1]
    assert row == f"| {CASE} | 2 | 60.0 % (50.0 to 70.0) | 90.0 % | 0.100 (0.100 to 0.100) |"
    assert CASE in ablation.draw(runs)


def test_what_a_step_takes_is_the_median_after_the_warm_up(tmp_path, monkeypatch):
    """`train` is replaced: what is tested is which rows and stages count."""

    def start(overrides):
        (folder,) = (Path(one.removeprefix("run.dir=")) for one in overrides[-3:] if "run.dir=" in one)
        folder.mkdir(parents=True)
        times = [9.0] * ablation.WARM_UP + [0.2, 0.3, 7.0]
        stages = [{"rollout": t, "teacher": 0.1, "train": 2 * t, "evaluate": 50.0} for t in times]
        rows = [{f"seconds/{k}": v for k, v in row.items()} | {"step": i} for i, row in enumerate(stages)]
        (folder / "config.yaml").write_text("{}")
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    monkeypatch.setattr(ablation, "start", start)
    for _ in range(2):  # an earlier timing is made anew
        assert (
            ablation.time_all(tmp_path, [CASE]).splitlines()[-1] == f"| {CASE} | 1.00 | 0.30 | 0.10 | 0.60 |"
        )


def test_a_run_of_another_config_is_neither_kept_nor_reported(tmp_path):
    finished(tmp_path, 0, 0.5, "objective.least_support=0")
    for read in (lambda: ablation.is_done(tmp_path, CASE, 0), lambda: ablation.read_cases(tmp_path)):
        with pytest.raises(DataError, match=r"least_support: 0\.0 there, 0\.001 now.*another --out"):
            read()


def test_without_a_run_there_is_no_table(tmp_path, capsys):
    assert ablation.main(["report", "--out", str(tmp_path)]) == 2
    assert "holds no finished run" in capsys.readouterr().err
    assert ablation.main(["run", "--out", str(tmp_path), "no such case"]) == 2
    assert "'no such case'" in capsys.readouterr().err
