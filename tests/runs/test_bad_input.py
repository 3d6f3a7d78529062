"""What goes wrong on the first day: one clear message, the right exit code, nothing half-written."""

import json
import socket

import pytest
import yaml

from .conftest import ROOT, apart, call, words


def one_message(result, code: int, *parts: str) -> None:
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 2, result.stderr
    for part in parts:
        assert part in result.stderr


def no_messages(tmp_path) -> str:
    path = tmp_path / "bad.jsonl"
    good = json.dumps({"messages": [{"role": "user", "content": "hi"}]})
    path.write_text(f'{good}\n{{"prompt": "hi"}}\n')
    return str(path)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["rollout.samples_per_promt=2"], ["samples_per_promt", "rollout.samples_per_prompt"]),
        (["run.steps=many"], ["run.steps", "many"]),
        (["student.path=no/such/model"], ["no/such/model", "config.json"]),
        (["teacher.model=no/such/model"], ["no/such/model"]),
        (["data.path=no/such.jsonl"], ["no/such.jsonl"]),
        (["data.path={bad}"], ["bad.jsonl line 2", "messages"]),
        (["rollout.temperature=0.7"], ["rollout.temperature=0.7", "temperature_mismatch"]),
        (["rollout.top_k=5"], ["rollout.top_k=5", "temperature_mismatch"]),
        (["rollout.stop=['']"], ["empty stop string"]),
        (["rollout.max_prompt_tokens=500"], ["548", "512"]),
        (["mesh.tensor=3"], ["mesh.tensor=3", "1 cpu device"]),
        (["data.prompts_per_step=5000"], ["5000", "1024 rows"]),
    ],
    ids=lambda value: value[0].split("=")[0] if isinstance(value, list) else "",
)
def test_bad_config_is_one_message_and_exit_2_with_nothing_written(train, tmp_path, overrides, parts):
    folder = tmp_path / "run"
    overrides = [o.replace("{bad}", no_messages(tmp_path)) for o in overrides]
    one_message(train(folder, *overrides), 2, *parts)
    assert not folder.exists()


def test_a_prompt_that_is_too_long_is_named(train, tmp_path):
    one_message(
        train(tmp_path / "run", "rollout.max_prompt_tokens=8"), 2, "row", "rollout.max_prompt_tokens=8"
    )


def test_an_unreachable_teacher_is_exit_75(train, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "run"
    config = tmp_path / "sglang.yaml"
    config.write_text(
        (ROOT / "configs/quickstart.yaml")
        .read_text()
        .replace(
            "{kind: embedded, model: assets/toy/teacher}",
            f"{{kind: sglang, endpoint: 'http://127.0.0.1:{port}', tokenizer: assets/toy/teacher, "
            "start_timeout_s: 2}",
        )
    )
    one_message(apart("train", "--config", str(config), f"run.dir={folder}"), 75, str(port))
    assert not folder.exists()


def test_a_port_in_use_is_exit_2():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = call("serve", "--model", "assets/toy/teacher", "--port", port)
    one_message(result, 2, port)


def test_a_folder_that_cannot_be_written(train, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    one_message(train(blocker / "run"), 2, "cannot be written")


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
    one_message(result, 2, "the 2 teachers have 2 different ones")


def test_export_of_what_is_no_run(tmp_path):
    export = ("export", "--run", str(tmp_path), "--out", str(tmp_path / "out"))
    one_message(apart(*export), 2, "no run folder")
    config = (ROOT / "configs/quickstart.yaml").read_text()
    student = "student: {path: assets/toy/student"
    (tmp_path / "config.yaml").write_text(config.replace(student, student + ", chat_template: gone.jinja"))
    one_message(call(*export), 2, "student.chat_template=gone.jinja: cannot be read")
