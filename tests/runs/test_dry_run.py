"""`--dry-run`: everything is checked, nothing is done."""

import yaml

from .conftest import ROOT, apart, words


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    """But for the programs it compiled, where the run is told to keep them."""
    folder, programs = tmp_path / "run", tmp_path / "programs"
    result = apart(*words(folder, [f"run.compilation_cache={programs}", "--dry-run"]))
    assert result.returncode == 0, result.stderr
    assert any("train_step" in file.name for file in programs.iterdir())
    assert "compute: float32, attention by xla" in result.stdout
    assert "credit: lookahead" in result.stdout and "8 rows, lengths [80]" in result.stdout
    assert "memory of each device, 8 rows of 80 tokens" in result.stdout and "a step takes" in result.stdout
    assert not folder.exists()


def test_a_dry_run_finds_an_objective_that_cannot_be_built(train, tmp_path):
    """xtoken needs one teacher vocabulary; the two toy models have different ones."""
    config = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    teacher = config.pop("teacher") | {"top_k": 4}
    other = {"name": "other", "model": "assets/toy/student"}
    path = tmp_path / "two.yaml"
    config |= {"objective": {"kind": "xtoken"}, "teachers": [teacher, teacher | other]}
    path.write_text(yaml.safe_dump(config))
    result = train(tmp_path / "run", "--dry-run", config=str(path))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "the 2 teachers have 2 different ones" in result.stderr


def test_a_dry_run_says_what_would_refuse_the_run(tmp_path):
    """Behind the plan, which is whole, and with the exit code of the refused run."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("not a run")
    result = apart(*words(folder, ["--dry-run", "--device-memory", "0.001"]))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "a step does NOT FIT into the 0.9 MiB" in result.stdout and "dry run: nothing" in result.stdout
    assert (
        "this would not run: it does NOT FIT into the memory of a device, as the plan says; "
        f"and run.dir={folder} is not empty" in result.stderr
    )
