"""The path end to end: what a run leaves behind, how it resumes, and what its result is good for."""

import json
import shutil

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from jaxdistill.config import load
from jaxdistill.export import generation_config
from jaxdistill.run_config import RunConfig

from .conftest import ROOT, apart, call, kill_at_row, rows, without_clocks, words


def test_a_run_leaves_everything_the_design_names(finished):
    assert {p.name for p in finished.iterdir()} >= {
        "config.yaml",
        "manifest.json",
        "metrics.jsonl",
        "samples.jsonl",
        "report.html",
        "checkpoints",
        "tb",
    }
    table = rows(finished)
    assert [row["step"] for row in table] == list(range(7))
    for row in table[:-1]:
        assert np.isfinite(
            [row["loss"], row["reverse_kl_per_byte"], row["coverage"], row["exact_fraction"]]
        ).all()
        assert 0.0 < row["exact_fraction"] < 1.0 and row["coverage"] == 1.0
    assert [row["step"] for row in table if "eval/accuracy" in row] == [0, 4, 6]
    manifest = json.loads((finished / "manifest.json").read_text())
    teacher = manifest["teachers"]["teacher"]
    identity = teacher["identity"]
    assert identity["tokenizer"] != manifest["student"]["tokenizer"] and identity["tokenizer_checked"]
    assert not teacher["same_vocabulary"] and len(identity["canary"]) == len(identity["canary_ids"]) - 1
    sample = json.loads((finished / "samples.jsonl").read_text().splitlines()[0])
    pieces = sample["alignment"]["pieces"]
    kinds = {kind for _, kind, _ in pieces}
    credit = sum(credit for *_, credit in pieces if credit is not None)
    per_byte = -credit / len(sample["response"].encode())  # all of which is aligned
    assert per_byte == pytest.approx(sample["reverse_kl_per_byte"], rel=1e-6)
    assert {"exact", "chunk"} <= kinds <= {"exact", "chunk", "role", "unaligned"}


def test_nothing_is_compiled_again_after_warm_up(finished):
    assert [row["recompiles"] for row in rows(finished)[:-1]] == [0] * 6


@pytest.mark.slow
def test_a_killed_run_resumes_and_its_losses_are_bitwise_those_of_an_uninterrupted_one(finished, tmp_path):
    """SIGKILL once step 4 is logged; the checkpoint before it is of step 2 or 4."""
    folder = tmp_path / "killed"
    kill_at_row(folder, 4)
    assert [int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit()]
    again = apart(*words(folder))
    assert again.returncode == 0, again.stderr
    resumed, expected = rows(folder), rows(finished)
    assert [without_clocks(row) for row in resumed] == [without_clocks(row) for row in expected]


def test_a_finished_run_run_again_trains_no_further(train, finished):
    before = rows(finished)
    result = train(finished)
    assert result.returncode == 0, result.stderr
    assert [without_clocks(r) for r in rows(finished)] == [without_clocks(r) for r in before]


def test_export_writes_a_folder_that_loads_with_the_trained_weights(finished, tmp_path):
    out = tmp_path / "model"
    export = ("export", "--run", str(finished), "--out", str(out))
    result = call(*export)
    assert result.returncode == 0, result.stderr
    assert "step 6" in result.stdout
    trained, start = (
        load_file(out / "model.safetensors"),
        load_file(ROOT / "assets/toy/student/model.safetensors"),
    )
    assert trained.keys() == start.keys()
    assert any((trained[name] != start[name]).any() for name in trained)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).is_file(), name
    first = call(*export, "--step", "4")
    assert first.returncode == 0  # an export may be replaced by another
    assert any((load_file(out / "model.safetensors")[name] != trained[name]).any() for name in trained)
    wrong = call(*export, "--step", "5")
    assert (
        wrong.returncode == 2
        and "no checkpoint of step 5" in wrong.stderr
        and "Traceback" not in wrong.stderr
    )


def test_an_export_loads_elsewhere_and_says_where_it_comes_from(finished, tmp_path):
    out = tmp_path / "my|model"
    assert call("export", "--run", str(finished), "--out", str(out), "--step", "4").returncode == 0
    ends = GenerationConfig.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (ends.eos_token_id, ends.pad_token_id) == ([4], 2)
    assert AutoConfig.from_pretrained(out).model_type == "llama"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert tokenizer.convert_ids_to_tokens(4) in tokenizer.apply_chat_template(turns, tokenize=False)
    _, front, card = (out / "README.md").read_text().split("---\n", 2)
    facts = yaml.safe_load(front)
    assert "base_model" not in facts and facts["library_name"] == "transformers"
    assert "`assets/toy/student`, distilled from `" in card
    manifest = json.loads((finished / "manifest.json").read_text())
    first, last = (next(row for row in rows(finished) if row["step"] == step) for step in (0, 4))
    accuracy = f"| `accuracy` | {first['eval/accuracy']:.4g} | {last['eval/accuracy']:.4g} |"
    said = (
        accuracy,
        "| step 0 | step 4 |",
        "4 of 6, seed 0",
        manifest["data"]["fingerprint"],
        "kind=reverse_kl",
    )
    for words_of_it in (*said, manifest["teachers"]["teacher"]["identity"]["model"], r"# my\|model"):
        assert words_of_it in card, words_of_it


def test_a_run_of_an_export_without_an_evaluation(train, served, tmp_path):
    student, out = tmp_path / "student", tmp_path / "model"
    shutil.copytree(ROOT / "assets/toy/student", student)
    (student / "jaxdistill.json").write_text("{}")  # an earlier export, then
    settings = (*served, "run.steps=1", "eval.path=null", f"student.path={student}")
    assert train(tmp_path / "run", *settings).returncode == 0
    onto_itself = call("export", "--run", str(tmp_path / "run"), "--out", str(student))
    assert onto_itself.returncode == 2 and "is the student that" in onto_itself.stderr
    assert (student / "model.safetensors").is_file()
    own = student / "generation_config.json"
    own.write_text(own.read_text()[:-5])
    broken = call("export", "--run", str(tmp_path / "run"), "--out", str(out))
    assert broken.returncode == 2 and f"{own}: not readable as JSON" in broken.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"run", "student"}
    own.unlink()
    assert call("export", "--run", str(tmp_path / "run"), "--out", str(out)).returncode == 0
    card = (out / "README.md").read_text()
    assert "Held-out" not in card and "## How it was made" in card and "step 0" not in card  # no figures


def test_a_student_without_a_generation_config_gets_the_runs(tmp_path):
    folder = tmp_path / "student"
    shutil.copytree(ROOT / "assets/toy/student", folder)
    (folder / "generation_config.json").unlink()
    file, allow = ROOT / "configs/quickstart.yaml", "objective.temperature_mismatch=allow"
    config = load(file, [f"student.path={folder}", "rollout.temperature=0.7", allow], RunConfig)
    found = generation_config(config, folder)
    assert found == {
        "bos_token_id": 1, "pad_token_id": 2, "eos_token_id": [4], "do_sample": True, "temperature": 0.7,
        "top_k": 411, "top_p": 1.0, "min_p": 0.0,
    }  # fmt: skip
    greedy = load(file, [f"student.path={folder}", "rollout.temperature=0", allow], RunConfig)
    assert generation_config(greedy, folder) == {
        "bos_token_id": 1, "pad_token_id": 2, "eos_token_id": [4], "do_sample": False,
    }  # fmt: skip


def test_a_students_own_generation_config_is_kept_but_ends_as_the_run_did(tmp_path):
    """A base model's says nothing of the end of turn that the run taught it."""
    folder = tmp_path / "student"
    shutil.copytree(ROOT / "assets/toy/student", folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.3}')
    config = load(ROOT / "configs/quickstart.yaml", [f"student.path={folder}"], RunConfig)
    assert generation_config(config, folder) == {"eos_token_id": [2, 4], "temperature": 0.3}


@pytest.mark.slow
def test_sft_and_the_other_credits_run(train, served, tmp_path):
    for name, override in (
        ("exact", "objective.signal=exact"),
        ("uniform", "objective.credit=uniform"),
        ("proportional", "objective.credit=proportional"),
        ("broadcast", "objective.credit=broadcast"),
    ):
        result = train(tmp_path / name, *served, "run.steps=1", "eval.prompts=2", override)
        assert result.returncode == 0, (name, result.stderr)
        assert np.isfinite(rows(tmp_path / name)[0]["loss"])


def test_a_longer_run_goes_on_from_a_shorter_one_but_another_config_does_not(train, served, tmp_path):
    folder, same = tmp_path / "run", (*served, "optimizer.schedule=constant")
    assert train(folder, *same, "run.steps=2").returncode == 0
    assert train(folder, *same, "run.steps=3").returncode == 0
    assert [row["step"] for row in rows(folder)] == [0, 1, 2, 3]
    other = train(folder, *same, "run.steps=3", "objective.credit=uniform")
    assert other.returncode == 2
    assert "another config" in other.stderr and "Traceback" not in other.stderr


def test_an_edited_chat_template_is_another_run_whichever_side_reads_it(train, served, tmp_path):
    """Its path is the same; what the prompts look like is not."""
    overrides = [*served, "run.steps=1", "eval.path=null"]
    files = {}
    for side in ("student", "teacher"):
        config = json.loads((ROOT / f"assets/toy/{side}/tokenizer_config.json").read_text())
        files[side] = tmp_path / f"{side}.jinja"
        files[side].write_text(config["chat_template"])
        overrides.append(f"{side}.chat_template={files[side]}")
    result = train(tmp_path / "run", *overrides)
    assert result.returncode == 0, result.stderr
    manifest = (tmp_path / "run/manifest.json").read_text()
    for side, field in (("student", "student.chat_template"), ("teacher", "teachers.teacher.chat_template")):
        text = files[side].read_text()
        files[side].write_text(text + "{# edited #}")
        other = train(tmp_path / "run", *overrides)
        assert other.returncode == 2 and f"another {field} (" in other.stderr, other.stderr
        assert "Traceback" not in other.stderr
        files[side].write_text(text)
    assert (tmp_path / "run/manifest.json").read_text() == manifest
    assert train(tmp_path / "run", *overrides).returncode == 0
