"""The report says what the run's files say, in one page that needs nothing else."""

import html
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread

from jaxdistill.errors import DataError
from jaxdistill.metrics import RowFile, Sample, SampleLog
from jaxdistill.report import write_report
from jaxdistill.report.__main__ import main
from jaxdistill.report.headline import tiles
from jaxdistill.report.plots import (
    MOST_POINTS,
    THEMES,
    Chart,
    Curve,
    curve_plot,
    running_mean,
    standalone,
    thin,
)
from jaxdistill.report.run_data import Series, read_run

MakeRun = Callable[..., Path]
Browse = Callable[..., tuple[str, list[str]]]
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """What a page holds: its elements must nest, its ids must be unique."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.links.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page(run: Path) -> Page:
    return Page(write_report(run).read_text("utf-8"))


def series(values: list[float]) -> Series:
    return Series(np.arange(len(values), dtype=np.float64), np.array(values, np.float64))


def test_the_headline_is_before_and_after(tmp_path: Path) -> None:
    RowFile(tmp_path / "metrics.jsonl").append(
        [
            {"step": 0, "eval/accuracy": 0.2, "eval/reverse_kl_per_byte": 0.4, "loss": 1.0, "coverage": 0.9},
            {"step": 1, "eval/accuracy": 0.9, "eval/reverse_kl_per_byte": None, "loss": 1.0, "coverage": 1.0},
            {"step": 2, "eval/accuracy": 0.75, "eval/reverse_kl_per_byte": 0.1, "elapsed_seconds": 61.2},
        ]
    )
    found = {tile.label: tile for tile in tiles(read_run(tmp_path))}
    accuracy, kl = found["Task accuracy"], found["Reverse KL per byte"]
    assert (accuracy.before, accuracy.after, accuracy.change) == ("20.0 %", "75.0 %", "+55.0 points")
    assert (accuracy.verdict, accuracy.source) == ("good", "held-out, step 0 → 2")
    assert (accuracy.best, accuracy.value, kl.best) == ("90.0 % at 1", 0.75, None)
    assert (kl.before, kl.after, kl.change, kl.verdict) == (
        "0.4000",
        "0.1000",
        "\N{MINUS SIGN}75.0 %",
        "good",
    )
    assert found["Coverage"].source.startswith("training")
    assert found["Training steps"].after == "2"
    assert found["Wall time"].after == "1m01s"
    assert "Exact fraction" not in found and "Recompilations" not in found


def test_getting_worse_is_said(tmp_path: Path) -> None:
    RowFile(tmp_path / "metrics.jsonl").append(
        [{"step": n, "eval/reverse_kl_per_byte": 0.1 + n, "recompiles": 2} for n in range(2)]
    )
    found = {tile.label: tile for tile in tiles(read_run(tmp_path))}
    assert found["Reverse KL per byte"].verdict == "bad"
    assert found["Reverse KL per byte"].change == "+1000.0 %"
    assert (found["Recompilations"].after, found["Recompilations"].verdict) == ("2", "bad")


def test_a_whole_run_has_every_section(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    found = page(run)
    for heading in (
        "Reverse KL per byte", "Task accuracy", "Alignment", "Throughput", "Time per step, by stage", "Loss",
        "Task reward", "Bits for the references", "Cross-entropy gap", "Teacher's log-probability",
        "Gradient norm", "Teacher requests", "Teacher trouble", "Samples", "Evaluations", "Configuration",
        "Versions, fingerprints, hardware",
    ):  # fmt: skip
        assert heading in found.text, heading
    for axis in ("nats per byte", "bits per byte", "response tokens per second", "seconds per step", "step"):
        assert axis in found.text, axis
    last = [row for row in read_run(run).rows if "eval/accuracy" in row][-1]
    assert f"{100 * last['eval/accuracy']:.1f} %" in found.text
    assert f"{last['eval/reverse_kl_per_byte']:.4f}" in found.text
    assert "toy-student learns from toy-teacher" in found.text
    assert "hardware.cores" in found.text


def test_the_page_needs_nothing_else(make_run: MakeRun, tmp_path: Path) -> None:
    found = page(make_run(tmp_path / "run"))
    assert not found.tags & {"script", "link", "img", "iframe", "object", "embed", "form", "audio", "video"}
    assert all(link.startswith("#") for link in found.links)
    targets = {link[1:] for link in found.links}
    assert targets <= set(found.ids)
    assert len(found.ids) == len(set(found.ids))


def test_the_same_folder_gives_the_same_bytes(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert {one.name for one in run.iterdir() if one.name.startswith(".")} == set()


def test_no_colour_stays_behind_from_drawing(make_run: MakeRun, tmp_path: Path) -> None:
    text = write_report(make_run(tmp_path / "run")).read_text("utf-8")
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert re.findall(r"#[0-9a-f]{6}\b", drawings) == []
    assert set(re.findall(r"var\(--([a-z0-9]+)\)", drawings)) <= set(THEMES["light"])
    assert THEMES["light"].keys() == THEMES["dark"].keys()


def luminance(color: str) -> float:
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(
    ("name", "least"),
    [("ink", 7.0), ("muted", 4.5), ("good", 4.5), ("bad", 4.5), *((f"c{n}", 3.0) for n in range(6))],
)
def test_contrast_on_cards_meets_the_accessibility_guidelines(theme: str, name: str, least: float) -> None:
    """WCAG 2.2: 7 and 4.5 for text, 3 for graphics."""
    pair = sorted(luminance(THEMES[theme][key]) for key in (name, "card"))
    assert (pair[1] + 0.05) / (pair[0] + 0.05) >= least


def test_ten_thousand_steps_stay_small(make_run: MakeRun, tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "run", steps=10_000, evaluate_every=25, copies=25))
    assert len((path.parent / "samples.jsonl").read_text().splitlines()) == 200
    assert path.stat().st_size < 2_000_000


def test_a_teacher_without_trouble_is_a_figure_and_no_curve(tmp_path: Path) -> None:
    row = {"loss": 1.0, "teacher/requests": 3, "teacher/retries": 0}
    RowFile(tmp_path / "metrics.jsonl").append([{"step": n} | row for n in range(3)])
    (tile,) = [tile for tile in tiles(read_run(tmp_path)) if tile.label == "Teacher requests"]
    assert (tile.after, tile.source) == ("9", "no retry, no hedge, no row without scores")
    assert "Teacher trouble" not in page(tmp_path).text


def test_every_request_and_trouble_is_counted_however_many_steps(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1_111)
    hedges = sum(row.get("teacher/hedges", 0) for row in read_run(run).rows)
    text = page(run).text
    assert text.count(f"hedges {hedges:,.0f}") == 2 and "3,333" in text


HOSTILE = "<script>alert(1)</script>&\"'</div>{{ 7 * 7 }}$x^2$"


def test_everything_is_escaped(tmp_path: Path) -> None:
    RowFile(tmp_path / "metrics.jsonl").append(
        [{"step": 0, "loss": 1, f"eval/{HOSTILE}": 1, f"seconds/{HOSTILE}": 1}]
    )
    SampleLog(tmp_path).log(
        0,
        [
            Sample(
                [{"role": HOSTILE, "content": HOSTILE}, {"role": "user", "content": [{"text": HOSTILE}]}],
                HOSTILE,
                HOSTILE,
            ),
            Sample([], HOSTILE, None, 0.5, None, {"pieces": [[HOSTILE, HOSTILE]]}),
        ],
    )
    (tmp_path / "config.yaml").write_text(
        json.dumps({"student": {"path": HOSTILE}, "objective": {"kind": HOSTILE}})
    )
    (tmp_path / "manifest.json").write_text(json.dumps({HOSTILE: [HOSTILE]}))
    found = page(tmp_path)
    assert "script" not in found.tags
    assert found.text.count("alert(1)") >= 8
    assert "{{ 7 * 7 }}" in found.text


@pytest.mark.parametrize(
    ("rows", "there", "absent"),
    [
        ([], ["No step has been recorded"], ["Curves", "Samples", "Details"]),
        ([{"step": 0, "loss": None}], ["Training steps"], ["Curves", "Task accuracy"]),
        ([{"step": 0, "loss": 1.0}], ["Loss"], ["Task accuracy", "Reverse KL", "Samples", "Details"]),
        ([{"step": 0, "loss": 1.0}], ["Loss"], ["Task reward", "references", "log-probability", "Cross"]),
        ([{"step": 0, "reward": 0.5}], ["Task reward"], ["references", "unequal scores"]),
        (
            [{"step": 0, "eval/references/student_bits_per_byte": 1.5}],  # without a teacher
            ["Bits for the references"],
            ["Cross-entropy gap", "log-probability", "Task reward"],
        ),
        ([{"step": 0, "eval/accuracy": 0.5}], ["Task accuracy", "Evaluations"], ["Loss", "Throughput"]),
        ([{"step": 3, "seconds/train": None, "odd": "text"}], ["Time per step"], ["Loss"]),
    ],
)
def test_missing_pieces_leave_out_their_section(
    tmp_path: Path, rows: list[dict[str, object]], there: list[str], absent: list[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = page(tmp_path).text
    assert all(words in text for words in there)
    assert not any(words in text for words in absent)


def test_samples_of_the_same_prompt_stand_side_by_side(make_run: MakeRun, tmp_path: Path) -> None:
    text = write_report(make_run(tmp_path / "run", steps=20)).read_text("utf-8")
    assert text.index("Response at step 0") < text.index("Response at step 20")
    row = next(row for row in text.split("<tr>") if "12 crêpes" in row)
    assert row.index("wrong") < row.index("correct")
    assert 'class="piece unaligned">' in row
    # What the teacher says to a piece: its colour, how deep, and the figure.
    assert '<span class="piece chunk unlikelier" style="--depth: 100%" title="-4.00 nats"> 19</span>' in row
    assert '<span class="piece chunk likelier" style="--depth: 13%" title="+0.40 nats"> 84</span>' in row
    assert '<span class="piece role" title="+0.00 nats">' in row
    assert "the teacher finds it likelier" in text


def test_long_samples_are_cut_and_say_so(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1}\n')
    long = "word " * 100_000
    SampleLog(tmp_path).log(
        0, [Sample([{"role": "user", "content": f"{n} {long}"}], long) for n in range(50)]
    )
    found = page(tmp_path)
    assert "498,000 more characters" in found.text
    assert "12 prompts of 50 samples" in found.text
    assert len(found.text) < 100_000


@given(values=st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), max_size=400), most=st.integers(2, 60))
@settings(max_examples=100)
def test_thinning_keeps_the_peaks_and_the_order(values: list[float], most: int) -> None:
    whole = series(values)
    drawn = thin(whole, most)
    assert len(drawn.steps) <= max(most, 2)
    assert (np.diff(drawn.steps) > 0).all()
    assert set(drawn.steps) <= set(whole.steps)
    if np.isfinite(whole.values).any():
        assert np.nanmax(drawn.values) == np.nanmax(whole.values)
        assert np.nanmin(drawn.values) == np.nanmin(whole.values)


@given(values=st.lists(st.floats(-1e3, 1e3) | st.just(float("nan")), max_size=40), window=st.integers(1, 12))
@settings(max_examples=100)
def test_running_mean_is_the_mean_of_the_window(values: list[float], window: int) -> None:
    got = running_mean(series(values), window).values
    for place, mean in enumerate(got):
        near = [v for v in values[max(place - window // 2, 0) : place + (window - 1) // 2 + 1] if v == v]
        np.testing.assert_allclose(mean, np.mean(near) if near else np.nan, atol=1e-8)


def test_a_drawing_of_its_own_brings_its_colours() -> None:
    curve = Curve("a & b <c> $d", series([float(n) for n in range(5 * MOST_POINTS)]))
    svg = standalone(curve_plot("x", 'title "&"', [Chart("y", [curve, curve])]))
    assert "prefers-color-scheme: dark" in svg and THEMES["dark"]["ink"] in svg
    assert html.escape("a & b <c> $d", quote=False) in svg
    assert "<?xml" not in svg and "date" not in svg.lower()


def test_the_command_prints_the_path(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", steps=5)
    assert main(["--run", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (None, "no such folder"),
        ({}, "has no metrics.jsonl"),
        ({"metrics.jsonl": "{}\n"}, "line 1"),
        ({"metrics.jsonl": "", "config.yaml": "a: [\n"}, "config.yaml: expected YAML"),
        ({"metrics.jsonl": "", "manifest.json": "{"}, "manifest.json: expected a JSON object"),
    ],
)
def test_a_folder_that_is_no_run_is_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: dict[str, str] | None, words: str
) -> None:
    run = tmp_path / "run"
    if files is not None:
        run.mkdir()
        for name, text in files.items():
            (run / name).write_text(text)
    assert main(["--run", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error
    assert not (run / "report.html").exists()
    if files is not None:
        with pytest.raises(DataError):
            write_report(run)


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_a_browser_opens_it_without_complaint_and_without_a_network(
    make_run: MakeRun, tmp_path: Path, browse: Browse, scheme: str
) -> None:
    report = write_report(make_run(tmp_path / "run"))
    shot = tmp_path / "shot.png"
    preferred = f"--blink-settings=preferredColorScheme={('dark', 'light').index(scheme)}"
    log, asked = browse(report, preferred, f"--screenshot={shot}")
    assert "CONSOLE" not in log
    assert asked == []
    pixels = imread(shot)[..., :3]
    corner = pixels[0, 0]
    wanted = [int(THEMES[scheme]["page"][place : place + 2], 16) / 255 for place in (1, 3, 5)]
    np.testing.assert_allclose(corner, wanted, atol=0.01)
    assert pixels.std() > 0.05, "the page is empty"


@pytest.mark.browser
def test_the_browser_test_would_see_a_console_error_and_a_request(tmp_path: Path, browse: Browse) -> None:
    path = tmp_path / "bad.html"
    path.write_text("<img src='http://127.0.0.1:9/x.png'><script>console.error('seen')</script>")
    log, asked = browse(path, "--dump-dom")
    assert "CONSOLE" in log and "seen" in log
    assert asked == ["http://127.0.0.1:9/x.png"]
