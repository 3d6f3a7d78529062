"""What people get wrong, and what they are told: one screen that names the place and the remedy, the exit
code that is documented, nothing half-written, and no traceback.

`docs/troubleshooting.md` explains each of these messages under the words that stand first in `said` here.
"""

import fcntl
import json
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from jaxdistill.config import dump, load
from jaxdistill.run_config import RunConfig

from .conftest import ROOT, SMALL, Finished, apart, call

MOST_LINES, MOST_CHARACTERS = 24, 2000
QUICKSTART = "configs/quickstart.yaml"
STUDENT = ROOT / "assets/toy/student"
SGLANG = ("teacher=null", "teacher.kind=sglang", "teacher.tokenizer=assets/toy/teacher")


class Mistake(NamedTuple):
    """A command line (`{name}` stands for what the fixtures below make), what it must say (first the words
    of its entry in the docs, then the place and the remedy), and how it ends."""

    name: str
    line: str
    said: tuple[str, ...]
    code: int = 2


def train(name: str, overrides: str, *said: str, code: int = 2, config: str = QUICKSTART) -> Mistake:
    return Mistake(name, f"train --config {config} run.dir={{folder}}/run {overrides}", said, code)


def student(name: str, *said: str) -> Mistake:
    """A run whose student's folder is what the case `name` of `broken_student` made of it."""
    return train(f"student: {name}", f"student.path={{student:{name}}}", *said)


MISTAKES = [
    # --- the command line
    Mistake("an unknown word", "trian", ("unknown command", "'trian'", "did you mean 'train'?")),
    Mistake("an unknown option", "train --confg x", ("there is no --confg", "did you mean --config?")),
    Mistake("no config", "train", ("arguments are required: --config", "train --help")),
    Mistake(
        "a plan's option for a run",
        f"train --config {QUICKSTART} --device-memory 8",
        ("--device-memory goes with --dry-run",),
    ),
    train(
        "a plan for too small a device",
        "--dry-run --device-memory 0.001 data.prompts_per_step=2 rollout.max_new_tokens=4 eval.path=null",
        "does NOT FIT into the memory of a device",
        "this would not run",
    ),
    Mistake(
        "half a place among processes",
        f"train --config {QUICKSTART} --coordinator host0:1",
        ("each process of a run is given all three", "--processes and --process"),
    ),
    Mistake(
        "a setting that is none, explained",
        f"train --config {QUICKSTART} --explain run.stepz",
        ("there is no such setting", "did you mean run.steps?"),
    ),
    # --- the config
    Mistake(
        "a config that is not there",
        "train --config configs/quickstrat.yaml",
        ("no such configuration file", "configs/quickstrat.yaml", "did you mean configs/quickstart.yaml?"),
    ),
    train("an override without a value", "run.steps", "is not of the form a.b=c", "run.steps=100"),
    train(
        "a tab",
        "",
        "indent with spaces, not tabs",
        "config.yaml:5:1",
        config="{config:tab}",
    ),
    train(
        "a key given twice",
        "",
        "is given twice",
        "config.yaml:12: key 'run' is given twice (first in line 4)",
        "keep one of them",
        config="{config:twice}",
    ),
    train(
        "a key that is missing",
        "",
        "is required but not given",
        "config.yaml: key 'run.steps' is required",
        "write it in the file or as an override",
        config="{config:missing}",
    ),
    train(
        "a wrong key",
        "rollout.samples_per_promt=2",
        "unknown key",
        "override 'rollout.samples_per_promt=2'",
        "did you mean 'rollout.samples_per_prompt'?",
    ),
    train("a wrong type", "run.steps=many", "expected an integer", "'run.steps' is many (text)"),
    train("a value out of range", "run.max_hours=0", "expected a value greater than 0", "'run.max_hours'"),
    train(
        "an unknown objective",
        "objective.kind=revers_kl",
        "expected one of 'alm', 'end_of_turn', 'gkd'",
        "'objective.kind' is revers_kl",
        "did you mean 'reverse_kl'?",
    ),
    train(
        "an unknown kind of teacher",
        "teacher.kind=vllm",
        "expected one of 'sglang', 'embedded', 'replay'",
        "'teacher.kind' is vllm",
    ),
    train("no teacher", "teacher=null", "needs a teacher: section", "objective.kind=sft does not"),
    train(
        "an objective without what it reads",
        "objective.credit=projected",
        "reads the teacher's most likely tokens",
        "set its top_k=16",
    ),
    train(
        "samples of another distribution",
        "rollout.temperature=0.7",
        "always scored at temperature 1",
        "rollout.temperature=0.7",
        "leave it out, or say objective.temperature_mismatch=allow",
    ),
    train("an unknown scorer", "eval.scorer=finalline", "scorer 'finalline' is unknown", "final_line"),
    train(
        "a reward nobody reads",
        "reward.scorer=exact",
        "does not read it; set objective.reward_coefficient",
    ),
    train(
        "a bucket too small",
        "shapes.buckets=[64]",
        "cannot hold a prompt of rollout.max_prompt_tokens=32",
        "shapes.buckets=[64]",
        "the last bucket must be at least their sum",
    ),
    train(
        "rows longer than the student reads",
        "rollout.max_prompt_tokens=500",
        "but the student reads at most",
        "rows of 548 tokens",
        "lower rollout.max_prompt_tokens",
    ),
    train("a stop string of nothing", "rollout.stop=['']", "got an empty stop string", "leave it out"),
    train(
        "a mesh that does not divide the devices",
        "mesh.tensor=3",
        "the sizes must multiply to their number",
        "mesh.tensor=3 does not fit 1 cpu device(s)",
        "-1 takes what the others leave",
    ),
    # --- the data
    train(
        "data that is not there", "data.path=no/such.jsonl", "no data file at", "no/such.jsonl", "data.path"
    ),
    train(
        "a bad row",
        "data.path={data:broken}",
        "is not JSON",
        "prompts.jsonl line 1234 is not JSON",
        'a row is an object like {"messages"',
    ),
    train(
        "a row without messages",
        "data.path={data:no_messages}",
        "has no 'messages' list",
        "prompts.jsonl line 1234",
        'a row is an object like {"messages"',
    ),
    train("no rows", "data.path={data:empty}", "has no rows", "prompts.jsonl", "a row is an object like"),
    train("another kind of file", "data.path={data:csv}", "unknown kind of data file '.csv'", ".parquet"),
    train(
        "more prompts than rows", "data.prompts_per_step=5000", "has only 1024 rows", "lower it, or give more"
    ),
    train(
        "a prompt that is too long",
        "rollout.max_prompt_tokens=8",
        "more than rollout.max_prompt_tokens=8",
        "assets/toy/heldout.jsonl line 16",
        "rollout.too_long=drop",
    ),
    # --- models and tokenizers
    train(
        "a model that is not there",
        "student.path=no/such/model",
        "expected a folder with config.json, model*.safetensors and tokenizer.json",
        "no model at no/such/model (no such folder)",
        "or a hub id such as Qwen/Qwen3-1.7B",
    ),
    train(
        "a model that the hub cannot give",
        "student.path=models/Qwen3-8B",
        "no such folder here, and not fetched from the hub",
        "models/Qwen3-8B: no such folder",
        "HF_HUB_OFFLINE is set",
        "unset it, or name a folder",
    ),
    train(
        "a folder without a model",
        "student.path={folder}/other",
        "expected a folder with config.json, model*.safetensors and tokenizer.json",
        "no model at {folder}/other",
    ),
    student(
        "another family", "this decoder does not implement that family", "config.json: model_type is 'rwkv'"
    ),
    student("cut short", "model.safetensors cannot be read", "download or export it again"),
    student("without weights", "no *.safetensors file"),
    student(
        "of two models", "they are of two models", "model.embed_tokens.weight", "download or export both"
    ),
    student("without a tokenizer", "no tokenizer.json", "save_pretrained() writes it"),
    student(
        "of word pieces", "a WordPiece tokenizer does not keep the bytes", "use a model with byte-level BPE"
    ),
    student("without a template", "no chat template", "give a chat model, or add its template to the folder"),
    train(
        "a template that does not parse",
        "student.chat_template={folder}/bad.jinja",
        "the chat template is not valid Jinja",
        "{folder}/bad.jinja: the chat template",
        "(line 2)",
        "mend that line",
    ),
    train(
        "a role that no token plays",
        "student.roles.end_of_turn=nobody",
        "which is no token of this vocabulary",
        "roles.end_of_turn names 'nobody'",
        "give a token's exact string",
    ),
    # --- the teacher
    train(
        "a teacher that is not there",
        f"{' '.join(SGLANG)} teacher.start_timeout_s=1 teacher.endpoint=http://127.0.0.1:{{closed_port}}",
        "is unavailable",
        "teacher at http://127.0.0.1:{closed_port}",
        "check that the server runs",
        code=75,
    ),
    train(
        "an endpoint that is no URL",
        f"{' '.join(SGLANG)} teacher.endpoint=localhost:30000",
        "a URL such as http://host:30000 is expected",
        "'teacher.endpoint'",
    ),
    train(
        "a key whose variable is not set",
        f"{' '.join(SGLANG)} teacher.endpoint=http://127.0.0.1:1 teacher.api_key_env=NOBODY_SET_THIS_KEY",
        "which is not set; export the teacher's API key in it",
        "teacher.api_key_env names the environment variable NOBODY_SET_THIS_KEY",
    ),
    train(
        "a key in the place of its variable",
        f"{' '.join(SGLANG)} teacher.endpoint=http://127.0.0.1:1 teacher.api_key_env=sk-123",
        "the NAME of an environment variable is expected here, not the key",
        "'teacher.api_key_env'",
    ),
    train(
        "a folder that has no recording",
        "teacher=null teacher.kind=replay teacher.tokenizer=assets/toy/teacher teacher.path={folder}/none",
        "holds no recorded scores",
        "teacher.path={folder}/none",
        "record some with teacher.record",
    ),
    train(
        "the tokenizer of another model",
        "{served} teacher.tokenizer=assets/toy/student",
        "is not that of the model served at",
        "teacher.tokenizer (assets/toy/student)",
        "set teacher.tokenizer to the served model's own",
    ),
    train(
        "a teacher's model that is not there",
        "teacher.model=no/such/model",
        "expected a folder with config.json, model*.safetensors and tokenizer.json",
        "no model at no/such/model",
    ),
    # --- the run folder
    Mistake(
        "a folder of something else",
        f"train --config {QUICKSTART} run.dir={{folder}}/other",
        ("is not empty and holds no run", "run.dir={folder}/other", "choose another folder"),
    ),
    Mistake(
        "a run of another config",
        f"train --config {QUICKSTART} {' '.join(SMALL)} run.dir={{begun}} optimizer.learning_rate=1e-3",
        (
            "holds a run with another config",
            "optimizer.learning_rate: 0.0005 there, 0.001 now",
            "another run.dir",
        ),
    ),
    Mistake(
        "fewer steps than are done",
        f"train --config {QUICKSTART} {' '.join(SMALL)} run.dir={{begun}} run.steps=3",
        ("beyond run.steps=3", "{begun} is at step 6", "raise run.steps, or use another run.dir"),
    ),
    Mistake(
        "a place that cannot be written",
        f"train --config {QUICKSTART} run.dir={{folder}}/file/run",
        ("cannot be written", "run.dir={folder}/file/run", "choose another folder"),
    ),
    Mistake(
        "a run that another process writes",
        f"train --config {QUICKSTART} {' '.join(SMALL)} run.dir={{locked}}",
        ("is being written by another process", "run.dir={locked}", "wait for it"),
    ),
    Mistake(
        "a run whose config is damaged",
        f"train --config {QUICKSTART} run.dir={{damaged}}",
        ("restore it, or use another run.dir", "{damaged}/config.yaml cannot be read"),
    ),
    Mistake(
        "metrics that were edited",
        "report --run {garbled}",
        ("expected one JSON object a line", "metrics.jsonl, line 2", "repair or delete the line"),
    ),
    # --- the other words
    Mistake(
        "a checkpoint that is not there yet",
        "evaluate --run {bare}",
        ("has not saved one yet", "{bare}/checkpoints", "wait for step checkpoint.every"),
    ),
    Mistake(
        "a step without a checkpoint",
        "export --run {begun} --step 5 --out {folder}/out",
        ("no checkpoint of step 5", "{begun}/checkpoints", "there are: [6]"),
    ),
    Mistake(
        "no run",
        "export --run {folder}/other --out {folder}/out",
        ("is no run folder", "{folder}/other", "name the run.dir of a run"),
    ),
    Mistake(
        "an export over something else",
        "export --run {begun} --out {folder}/other",
        ("exists and is no export", "{folder}/other", "choose another --out"),
    ),
    Mistake(
        "a template that went away",
        "export --run {begun_with_template} --out {folder}/out",
        ("the run was made with it, put it back", "student.chat_template=gone.jinja"),
    ),
    Mistake(
        "nothing held out",
        f"evaluate --config {QUICKSTART} eval.path=null",
        ("no held-out prompts", QUICKSTART, "name a file with eval.path="),
    ),
    Mistake(
        "a model to serve that is not there",
        "serve --model no/such/model --port 0",
        (
            "expected a folder with config.json, model*.safetensors and tokenizer.json",
            "no model at no/such/model",
        ),
    ),
    Mistake(
        "a port in use",
        "serve --model assets/toy/teacher --port {taken_port}",
        ("Address already in use", "port {taken_port}", "choose another --port"),
    ),
    Mistake(
        "a tokenizer that is not there",
        "align --student assets/toy/student --teacher no/such",
        ("no such folder here, and not fetched from the hub", "no/such", "unset it, or name a folder"),
    ),
    Mistake(
        "one run to compare",
        "compare {begun}",
        ("one run is nothing to compare", "name two or more"),
    ),
]


# --- what the command lines stand for


def broken_student(name: str, folder: Path) -> None:
    """Make of a sound model in `folder` one that the case `name` needs."""
    weights, config = folder / "model.safetensors", folder / "config.json"

    def edit(file: str, **values: Any) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **values}))

    match name:
        case "another family":
            edit("config.json", model_type="rwkv")
        case "cut short":
            weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        case "without weights":
            weights.unlink()
        case "of two models":
            edit("config.json", hidden_size=2 * json.loads(config.read_text())["hidden_size"])
        case "without a tokenizer":
            (folder / "tokenizer.json").unlink()
        case "of word pieces":
            model = json.loads((folder / "tokenizer.json").read_text())["model"]
            edit("tokenizer.json", model={**model, "type": "WordPiece"})
        case "without a template":
            edit("tokenizer_config.json", chat_template=None)
        case _:
            raise AssertionError(name)


def bad_config(name: str, folder: Path) -> Path:
    old, new = {
        "tab": ("run: {", "run:\n\tsteps: 80\nx: {"),
        "twice": ("eval: {", "run: {steps: 2}\neval: {"),
        "missing": ("steps: 80, ", ""),
    }[name]
    text = (ROOT / QUICKSTART).read_text()
    assert text.count(old) == 1
    path = folder / "config.yaml"
    path.write_text(text.replace(old, new))
    return path


def bad_data(name: str, folder: Path) -> Path:
    path = folder / ("prompts.csv" if name == "csv" else "prompts.jsonl")
    rows = [json.dumps({"messages": [{"role": "user", "content": "hi"}], "answer": "1"})] * 1300
    rows[1233] = {"broken": rows[0][:-1], "no_messages": '{"prompt": "hi"}'}.get(name, rows[0])
    path.write_text("" if name == "empty" else "".join(f"{row}\n" for row in rows))
    return path


def begun_run(folder: Path, *overrides: str, step: int | None) -> Path:
    """A folder as a small run leaves it at `step`, as far as the refusals look; None: before it has saved."""
    folder.mkdir()
    config = load(ROOT / QUICKSTART, [f"run.dir={folder}", *SMALL, *overrides], RunConfig)
    (folder / "config.yaml").write_text(dump(config))
    (folder / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    if step is not None:
        (folder / f"checkpoints/{step}").mkdir(parents=True)
    return folder


@pytest.fixture
def made(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[[str], str]]:
    """Fills in a command line: makes what its `{name}`s stand for, and lets go of it at the end."""
    values: dict[str, str] = {"folder": str(tmp_path)}
    with ExitStack() as held:

        def listener(listening: bool) -> str:
            taken = held.enter_context(socket.socket())
            taken.bind(("127.0.0.1", 0))
            if listening:
                taken.listen()
            return str(taken.getsockname()[1])

        def locked() -> str:
            run = begun_run(tmp_path / "locked", step=None)
            (run / "metrics.jsonl").unlink()
            fcntl.flock(held.enter_context((run / ".lock").open("a")), fcntl.LOCK_EX)
            return str(run)

        def garbled() -> str:
            run = begun_run(tmp_path / "garbled", step=None)
            (run / "metrics.jsonl").write_text('{"step": 0}\nsee below\n{"step": 1}\n')
            return str(run)

        def damaged() -> str:
            run = begun_run(tmp_path / "damaged", step=6)
            (run / "config.yaml").write_text("run: {steps: [\n")
            return str(run)

        makers: dict[str, Callable[[], str]] = {
            "begun": lambda: str(begun_run(tmp_path / "begun", step=6)),
            "begun_with_template": lambda: str(
                begun_run(tmp_path / "begun", "student.chat_template=gone.jinja", step=6)
            ),
            "bare": lambda: str(begun_run(tmp_path / "bare", step=None)),
            "locked": locked,
            "garbled": garbled,
            "damaged": damaged,
            "taken_port": lambda: listener(True),
            "closed_port": lambda: listener(False),
            "served": lambda: " ".join(request.getfixturevalue("served")),
        }

        def make(name: str) -> str:
            kind, _, what = name.partition(":")
            if kind == "student":
                shutil.copytree(STUDENT, tmp_path / "student")
                broken_student(what, tmp_path / "student")
                return str(tmp_path / "student")
            if kind in ("config", "data"):
                return str({"config": bad_config, "data": bad_data}[kind](what, tmp_path))
            return makers[kind]()

        def fill(text: str) -> str:
            for name in re.findall(r"\{([a-z_ :]+)\}", text):
                if name not in values:
                    values[name] = make(name)
                text = text.replace(f"{{{name}}}", values[name])
            return text

        (tmp_path / "other").mkdir()
        (tmp_path / "other/notes.txt").write_text("mine")
        (tmp_path / "file").write_text("no folder")
        (tmp_path / "bad.jinja").write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}")
        yield fill


def check(result: Finished, code: int, said: tuple[str, ...]) -> None:
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= MOST_LINES and len(result.stderr) <= MOST_CHARACTERS
    for words in said:
        assert words in result.stderr


def each() -> list[Any]:
    """The mistakes as parameters; a teacher has to be started for one that is about its answers, and programs
    compiled for a plan."""
    slow = ("{served}", "--dry-run")
    return [
        pytest.param(
            one, id=one.name, marks=[pytest.mark.slow] if any(word in one.line for word in slow) else []
        )
        for one in MISTAKES
    ]


@pytest.mark.parametrize("mistake", each())
def test_a_mistake_is_one_screen_that_names_place_and_remedy(
    mistake: Mistake, made: Callable[[str], str], tmp_path: Path
) -> None:
    # What is compiled must be what users compile: apart from the checks of types that go on here.
    result = (apart if "--dry-run" in mistake.line else call)(*made(mistake.line).split())
    check(result, mistake.code, tuple(map(made, mistake.said)))
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists(), "nothing was written"


@pytest.mark.slow
def test_a_platform_that_is_not_installed(tmp_path: Path) -> None:
    """In a process of its own: this one has its devices already."""
    result = apart("train", "--config", QUICKSTART, f"run.dir={tmp_path}/run", JAX_PLATFORMS="cuda")
    check(
        result,
        2,
        (NO_PLUGIN, "JAX_PLATFORMS=cuda", "pip install 'jaxdistill[cuda13]'", "unset JAX_PLATFORMS"),
    )


NO_PLUGIN = "JAX finds no device for"


def test_every_message_is_explained_and_none_that_is_not_said() -> None:
    """The headings of the page are the words of the messages."""
    page = (ROOT / "docs/troubleshooting.md").read_text()
    headings = re.findall(r"^### `(.+)`$", page, flags=re.MULTILINE)
    assert len(headings) == len(set(headings))
    assert set(headings) == {mistake.said[0] for mistake in MISTAKES} | {NO_PLUGIN}


def test_there_are_enough_of_them() -> None:
    assert len(MISTAKES) >= 25 and len({mistake.name for mistake in MISTAKES}) == len(MISTAKES)
