"""Each step stands once in metrics.jsonl, whatever happened to the process that wrote it."""

import io
import json
import math
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import numpy as jnp
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from jaxdistill.compiles import CompileCounter
from jaxdistill.errors import DataError
from jaxdistill.metrics import MetricsLog, RowFile, Sample, SampleLog, TensorBoard, read_rows
from jaxdistill.metrics.progress import display, duration, headline, stages, teacher_health


def quiet(folder: Path, *, tensorboard: bool = False) -> MetricsLog:
    trackers = [TensorBoard(folder)] if tensorboard else []
    return MetricsLog(folder, trackers=trackers, total_steps=10, progress=False)


def values(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without the wall time, which differs from run to run."""
    return [{key: value for key, value in row.items() if key != "elapsed_seconds"} for row in rows]


# --- rows


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(rows=st.lists(st.dictionaries(st.text(max_size=5), json_values, max_size=3), max_size=6))
@settings(max_examples=60)
def test_any_row_is_one_line_that_strict_json_reads(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    RowFile(path).append([{**row, "step": step} for step, row in enumerate(rows)])
    lines = path.read_bytes().splitlines() if path.exists() and b"\r" not in path.read_bytes() else []

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for line in lines:
        json.loads(line, parse_constant=refuse)
    assert [row["step"] for row in read_rows(path)] == list(range(len(rows)))


@given(cut=st.integers(min_value=0, max_value=400), again=st.integers(min_value=0, max_value=7))
@settings(max_examples=120)
def test_a_file_cut_anywhere_keeps_its_whole_rows_and_goes_on(
    tmp_path_factory: pytest.TempPathFactory, cut: int, again: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    rows = [{"step": step, "text": "é\n\u2028" * step, "x": None} for step in range(6)]
    RowFile(path).append(rows)
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    kept = read_rows(path)
    assert kept == rows[: len(kept)]
    assert len(kept) >= whole[:cut].count(b"\n")
    file = RowFile(path)
    file.replace_from(again)
    file.append([{"step": step} for step in range(min(again, len(kept)), 9)])
    assert [row["step"] for row in read_rows(path)] == list(range(9))


def test_a_broken_line_before_the_last_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 0}\n{"step": \n{"step": 2}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2.*expected one JSON object"):
        read_rows(path)


@pytest.mark.parametrize("line", ["[1]", '{"loss": 1}', '{"step": 1.5}', '{"step": true}', "3"])
def test_a_row_without_a_whole_step_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(DataError, match=r"whole number `step`"):
        read_rows(path)


def test_rewriting_leaves_no_other_file_and_keeps_the_bytes_of_the_rows_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"step":0,  "spaced" : 1}\n{"step": 1}\n')
    RowFile(path).replace_from(1)
    assert path.read_text() == '{"step":0,  "spaced" : 1}\n'
    assert [one.name for one in tmp_path.iterdir()] == ["a.jsonl"]


def test_rows_go_forward_only(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "a.jsonl")
    file.append([{"step": 2}, {"step": 2}])
    with pytest.raises(ValueError, match="never fall"):
        file.append([{"step": 1}])


# --- metrics


def test_all_values_of_a_step_are_one_row(tmp_path: Path) -> None:
    with quiet(tmp_path) as log:
        log.log(0, {"eval/accuracy": 0.1})
        log.log(0, {"loss": 2.0, "recompiles": 3})
        assert not (tmp_path / "metrics.jsonl").exists()
        log.log(1, {"loss": 1.0})
        assert values(read_rows(tmp_path / "metrics.jsonl")) == [
            {"step": 0, "eval/accuracy": 0.1, "loss": 2.0, "recompiles": 3}
        ]
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1]
    assert '"recompiles": 3}' in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), jnp.float32(jnp.inf)])
def test_what_is_not_finite_is_null(tmp_path: Path, value: Any) -> None:
    with quiet(tmp_path, tensorboard=True) as log:
        log.log(0, {"loss": value})
    assert read_rows(tmp_path / "metrics.jsonl")[0]["loss"] is None


@pytest.mark.parametrize("value", [np.float32(0.5), np.array(0.5), jnp.array(0.5), 0.5])
def test_scalars_of_any_library(tmp_path: Path, value: Any) -> None:
    with quiet(tmp_path) as log:
        log.log(0, {"loss": value})
    assert read_rows(tmp_path / "metrics.jsonl")[0]["loss"] == 0.5


def test_values_after_a_flush_join_their_row(tmp_path: Path) -> None:
    with quiet(tmp_path) as log:
        log.log(0, {"a": 1})
        log.log(1, {"a": 2})
        log.flush()
        assert len(read_rows(tmp_path / "metrics.jsonl")) == 2
        log.log(1, {"b": 3})
        log.flush()
        log.flush()
    rows = values(read_rows(tmp_path / "metrics.jsonl"))
    assert rows == [{"step": 0, "a": 1}, {"step": 1, "a": 2, "b": 3}]


def test_a_row_that_is_not_whole_can_wait(tmp_path: Path) -> None:
    """Once on disk, values that join it cost the whole file anew: in a long run more each time."""
    path = tmp_path / "metrics.jsonl"
    with quiet(tmp_path) as log:
        log.log(0, {"a": 1})
        log.log(1, {"eval/a": 2})
        file = path.stat().st_ino
        log.flush(before=1)
        assert [row["step"] for row in read_rows(path)] == [0]
        log.log(1, {"a": 3})
        log.flush(before=2)
        assert values(read_rows(path)) == [{"step": 0, "a": 1}, {"step": 1, "eval/a": 2, "a": 3}]
        assert path.stat().st_ino == file  # a file that is written anew is another


@given(data=st.data())
@settings(max_examples=40)
def test_each_step_stands_once_after_any_crashes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Processes that log some steps from a checkpoint, then die, flushed or not, even inside a write."""
    folder = tmp_path_factory.mktemp("crash")
    path = folder / "metrics.jsonl"
    checkpoint = 0
    for life in range(data.draw(st.integers(1, 4), label="lives")):
        log = quiet(folder)
        log.resume_at(checkpoint)
        for step in range(checkpoint, data.draw(st.integers(checkpoint, 10), label="until")):
            if step % 3 == 0:
                log.log(step, {"eval/accuracy": life})
            if data.draw(st.booleans(), label="checkpoint"):
                log.flush(before=step)
                checkpoint = step
            log.log(step, {"loss": life})
        if path.exists() and data.draw(st.booleans(), label="torn"):
            with path.open("ab") as file:
                file.write(b'{"step": 7, "lo')
    log = quiet(folder)
    log.resume_at(checkpoint)
    for step in range(checkpoint, 10):
        log.log(step, {"loss": 99})
    log.close()
    rows = read_rows(path)
    assert [row["step"] for row in rows] == list(range(10))
    assert all(row["loss"] == 99 for row in rows[checkpoint:])
    assert all(row["loss"] is not None for row in rows[:checkpoint])
    elapsed = [row["elapsed_seconds"] for row in rows]
    assert elapsed == sorted(elapsed)


def test_going_back_without_saying_so_is_refused(tmp_path: Path) -> None:
    with quiet(tmp_path) as log:
        log.log(3, {"loss": 1})
        with pytest.raises(ValueError, match=r"got values of step 2 .* call resume_at"):
            log.log(2, {"loss": 1})
    with quiet(tmp_path) as log, pytest.raises(ValueError, match="call resume_at"):
        log.log(3, {"loss": 1})


def test_a_metric_named_step_is_refused(tmp_path: Path) -> None:
    with quiet(tmp_path) as log, pytest.raises(ValueError, match="'step'"):
        log.log(0, {"step": 1})


def test_elapsed_time_is_carried_over_a_resume(tmp_path: Path) -> None:
    RowFile(tmp_path / "metrics.jsonl").append([{"step": 0, "elapsed_seconds": 500.0}, {"step": 1}])
    with quiet(tmp_path) as log:
        log.resume_at(1)
        log.log(1, {"loss": 1})
    assert 500 <= read_rows(tmp_path / "metrics.jsonl")[1]["elapsed_seconds"] < 510


def events(path: Path) -> Iterator[Event]:
    """The events of a TensorBoard file: length, checksum, payload, checksum."""
    data = path.read_bytes()
    while data:
        size = int.from_bytes(data[:8], "little")
        yield Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]


def test_tensorboard_gets_the_values_and_the_purge(tmp_path: Path) -> None:
    with quiet(tmp_path, tensorboard=True) as log:
        log.log(0, {"loss": 0.5, "bad": math.nan})
        log.log(1, {"loss": 0.25})
    with quiet(tmp_path, tensorboard=True) as log:
        log.resume_at(1)
        log.log(1, {"loss": 0.125})
    files = sorted((tmp_path / "tb").iterdir())
    assert len(files) == 2, "a resume within the same second must not overwrite the first file"
    found = [(one.step, v.tag, v.simple_value) for f in files for one in events(f) for v in one.summary.value]
    assert sorted(found) == [(0, "loss", 0.5), (1, "loss", 0.125), (1, "loss", 0.25)]
    starts = [one.step for f in files for one in events(f) if one.HasField("session_log")]
    assert starts == [1]


# --- samples


def test_samples_of_a_step_stand_once_after_a_resume(tmp_path: Path) -> None:
    one = Sample(
        [{"role": "user", "content": "2 + 2 \ud800 ü?"}], "4\n", "4", True, 0.25, {"pieces": [["4", "exact"]]}
    )
    log = SampleLog(tmp_path)
    log.log(0, [one, one])
    log.log(5, [one])
    log = SampleLog(tmp_path)
    log.resume_at(5)
    log.log(5, [one, one])
    rows = read_rows(tmp_path / "samples.jsonl")
    assert [row["step"] for row in rows] == [0, 0, 5, 5]
    assert rows[0]["messages"][0]["content"] == "2 + 2 \ud800 ü?"
    assert rows[0]["response"] == "4\n"
    assert '"score": 1.0' in (tmp_path / "samples.jsonl").read_text("utf-8")


# --- progress


def test_plain_lines_say_the_step_the_headline_and_each_evaluation(tmp_path: Path) -> None:
    text = io.StringIO()
    console = Console(file=text, width=40)
    log = MetricsLog(tmp_path, total_steps=100, progress=True, every=50, console=console)
    with log:
        for step in range(101):
            if step in (0, 30, 100):
                log.log(step, {"eval/accuracy": 0.5, "eval/reverse_kl_per_byte": math.nan})
            if step < 100:
                log.log(step, {"loss": 1.0, "reverse_kl_per_byte": 0.3, "coverage": 0.99, "odd[/key]": 1})
    lines = text.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"step {n}/100" for n in (0, 30, 50, 99, 100)]
    assert "reverse KL/byte 0.3000" in lines[0] and "coverage 99.0%" in lines[0]
    assert "eval accuracy 50.0%  eval reverse KL/byte ?" in lines[1]
    assert "ETA" in lines[1]


def test_a_run_goes_on_where_nobody_reads_how_it_goes(
    tmp_path: Path, unread: TextIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", unread)
    with MetricsLog(tmp_path, total_steps=3, progress=True, every=1) as log:
        for step in range(3):
            log.log(step, {"loss": 1.0})
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 3


def test_a_terminal_gets_a_bar_with_the_headline(tmp_path: Path) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100)
    with MetricsLog(tmp_path, total_steps=8, progress=True, console=console) as log:
        log.resume_at(5)
        log.log(5, {"eval/accuracy": 0.75})
        log.log(5, {"loss": 0.125, "tokens_per_second": 12345.0})
        log.log(6, {"loss": 0.25})
    shown = text.getvalue()
    for piece in ("7/8", "ETA", "loss 0.2500", "12.3k", "eval accuracy 75.0%", "step 5"):
        assert piece in shown


def test_a_terminal_says_where_the_time_goes_and_how_the_teachers_are(tmp_path: Path) -> None:
    """The seconds are those of the last step, the counts those of all steps and teachers."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100)
    with MetricsLog(tmp_path, total_steps=8, progress=True, console=console) as log:
        calm = {"a/requests": 3, "b/requests": 2, "a/retries": 0, "seconds/train": 9.0}
        log.log(0, calm | {"b/reverse_kl_per_byte": 0.1})
        log.log(1, {"eval/accuracy": 0.5})
        log.flush()
        log.log(
            2,
            {
                "a/requests": 4,
                "sampler/requests": 40,
                "a/retries": 2,
                "b/bad_reply": 1,
                "seconds/train": 0.25,
                "seconds/pack": 0,
            },
        )
    frames = text.getvalue()
    last = frames[frames.rindex("seconds: ") :]
    assert last.startswith("seconds: train 0.25") and "pack" not in last
    assert "teacher: requests 9  retries 2  bad reply 1\x1b" in last and "9.00" not in last
    assert teacher_health({"requests": 5.0, "hedges": 0.0}) == "teacher: requests 5  no trouble"
    assert teacher_health({}) == stages({"loss": 1.0}) == ""


def test_nothing_is_shown_where_nothing_is_wanted(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with quiet(tmp_path) as log:
        log.log(0, {"loss": 1})
    assert capfd.readouterr() == ("", "")
    assert display(3, progress=False, every=None, console=None) is not None


def test_words_for_people() -> None:
    assert [duration(s) for s in (0.0, 59.4, 187.0, 7500.0)] == ["0s", "59s", "3m07s", "2h05m"]
    assert headline({"loss": None, "unknown": 1}) == "loss ?"


# --- compilations


def fresh_program(scale: float) -> Any:
    return jax.jit(lambda x: x * scale + 1)


def test_each_program_is_counted_once_until_closed() -> None:
    program = fresh_program(2.5)
    with CompileCounter() as counter:
        program(np.ones(3, np.float32))
        assert counter.count == 1
        program(np.zeros(3, np.float32))
        assert counter.count == 1
        program(np.ones(4, np.float32))
        assert counter.count == 2
        assert counter.seconds > 0
    program(np.ones(5, np.float32))
    assert counter.count == 2
    counter.close()


def test_threads_are_counted_together() -> None:
    with CompileCounter() as counter:
        threads = [
            threading.Thread(target=lambda n=n: fresh_program(n + 0.125)(np.ones(2, np.float32)))
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert counter.count == 4


@pytest.fixture
def persistent_cache(tmp_path: Path) -> Iterator[None]:
    from jax.experimental.compilation_cache import compilation_cache

    wanted = {
        "jax_compilation_cache_dir": str(tmp_path / "cache"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.usefixtures("persistent_cache")
def test_a_program_from_the_persistent_cache_is_new_but_not_compiled() -> None:
    with CompileCounter() as counter:
        fresh_program(3.25)(np.ones(3, np.float32))
        assert (counter.count, counter.loaded, counter.programs) == (1, 0, 1)
        fresh_program(3.25)(np.ones(3, np.float32))
        assert (counter.count, counter.loaded, counter.programs) == (1, 1, 2)
        fresh_program(4.25)(np.ones(3, np.float32))
        assert (counter.count, counter.loaded, counter.programs) == (2, 1, 3)
