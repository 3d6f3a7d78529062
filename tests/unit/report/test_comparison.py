"""Runs side by side, as a person would ask for them."""

import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from matplotlib.image import imread

from jaxdistill.compare import main
from jaxdistill.metrics import RowFile
from jaxdistill.report.comparison import figures, read_runs
from jaxdistill.report.plots import MOST_CURVES

MakeRun = Callable[..., Path]
Browse = Callable[..., tuple[str, list[str]]]
ARROW = "\N{RIGHTWARDS ARROW}"


def change(run: Path, **values: object) -> None:
    """Other settings in a run's config.yaml, `a__b=c` for `a.b: c`."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    for name, value in values.items():
        section, key = name.split("__")
        config[section][key] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture
def three(make_run: MakeRun, tmp_path: Path) -> list[str]:
    """Two whole runs and one that has little to say, as arguments."""
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other", seed=4, steps=70)
    change(one, run__dir="here")
    change(other, objective__credit="uniform", run__dir="there")
    poor = tmp_path / "poor"
    RowFile(poor / "metrics.jsonl").append(
        [{"step": n, "eval/reverse_kl_per_byte": kl} for n, kl in enumerate([0.4, 0.01, 0.8])]
    )
    return [str(one), str(other), f"no|body={poor}"]


def cells(out: str) -> dict[str, list[str]]:
    """The printed tables by the first cell of a row."""
    rows = [re.split(r" {3,}", line) for line in out.splitlines() if line]
    return {row[0]: row[1:] for row in rows}


def test_the_tables_say_figures_and_differences(three: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(three) == 0
    out, err = capsys.readouterr()
    table = cells(out)
    assert err == "" and all(line == line.rstrip() for line in out.splitlines())
    assert table["figures, first to last"] == ["one", "other", "no|body"]
    assert table["Reverse KL per byte"][2] == f"0.4000 {ARROW} 0.8000 (best 0.0100 at 1)"
    assert table["Task accuracy"][2] == "-"
    assert table["objective.credit"] == ["lookahead", "uniform", "-"]
    assert table["run.steps"] == ["90", "70", "-"]
    assert "objective.kind" in table, "set in two of three"
    assert "run.dir" not in table, "every run has its own"
    assert table["versions.jax"] == ["0.12.0", "0.12.0", "-"]
    assert f"1.2 {ARROW} " in table["eval/references/student_bits_per_byte"][0]


def test_only_what_differs_is_a_difference(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = [str(make_run(tmp_path / name)) for name in ("a", "b")]
    assert main(same) == 0
    out = capsys.readouterr().out
    assert "settings that differ" not in out and "what else differs" not in out


def test_the_best_last_value_is_marked(three: list[str]) -> None:
    rows = {row.name: [cell.best for cell in row.cells] for row in figures(read_runs(three))}
    assert sum(rows["Task accuracy"]) == 1 and not rows["Task accuracy"][2]
    # The third was lowest of all at its best, but not at its end.
    assert rows["Reverse KL per byte"] == [True, True, False]
    assert not any(rows["Exact fraction"]), "neither way is better"


def test_the_page_has_each_metric_with_a_curve_for_each_run(three: list[str], tmp_path: Path) -> None:
    page = tmp_path / "pages/compared.html"
    assert main([*three, "--html", str(page)]) == 0
    text = page.read_text()
    figures_of_page = text.split("<figure")[1:]
    held_out = next(one for one in figures_of_page if "Reverse KL per byte: held-out prompts" in one)
    assert [label in held_out for label in ("one", "other", "no|body")] == [True] * 3
    assert "nats per byte" in held_out and ">step<" in held_out
    accuracy = next(one for one in figures_of_page if "<h3>Task accuracy" in one)
    assert "no|body" not in accuracy, "it has none"
    assert "Running means of" in next(one for one in figures_of_page if "<h3>Throughput" in one)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert "<script" not in text and not re.search(r'(?:src|href)="(?!#)', text)
    assert "one, step 90" in text and "other, step 70" in text, "the columns of the samples"


def test_the_picture_is_a_file_of_its_own(three: list[str], tmp_path: Path) -> None:
    picture = tmp_path / "curves.svg"
    assert main([*three, "--svg", str(picture)]) == 0
    texts = {element.text for element in ElementTree.parse(picture).iter() if element.tag.endswith("text")}
    assert {"one", "other", "no|body", "correct", "nats per byte", "step"} <= texts
    first = picture.read_text()
    assert "prefers-color-scheme: dark" in first
    assert main([*three, "--svg", str(picture)]) == 0
    assert picture.read_text() == first


def test_a_dozen_runs_can_be_told_apart(make_run: MakeRun, tmp_path: Path) -> None:
    run, picture = make_run(tmp_path / "run", steps=5), tmp_path / "curves.svg"
    names = [f"run-{number:02d}={run}" for number in range(MOST_CURVES)]
    assert main([*names, "--svg", str(picture)]) == 0
    assert "stroke-dasharray" in picture.read_text()
    assert main([*names, f"more={run}"]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{run}"], "one run is nothing to compare"),
        (["{run}", "missing"], "missing: no such folder"),
        (["{run}", "{run}"], "two runs are called 'run'"),
        (["{run}", "="], "expected DIR or LABEL=DIR"),
        (["{run}", "empty={empty}", "--svg", "{out}"], "empty has no eval/reverse_kl_per_byte"),
        (["{run}", "again={run}", "--svg", "{run}/metrics.jsonl/x.svg"], "cannot be written"),
    ],
)
def test_what_cannot_be_compared_is_one_line_and_exit_2(
    make_run: MakeRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    RowFile(tmp_path / "empty/metrics.jsonl").append([{"step": 0, "loss": 1.0}])
    places = {"run": make_run(tmp_path / "run", steps=5), "empty": tmp_path / "empty", "out": tmp_path / "x"}
    try:
        code = main([one.format(**places) for one in arguments])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and words in err
    assert not (tmp_path / "x").exists()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_a_browser_opens_the_page(three: list[str], tmp_path: Path, browse: Browse, scheme: str) -> None:
    page, shot = tmp_path / "page.html", tmp_path / "shot.png"
    assert main([*three, "--html", str(page)]) == 0
    preferred = f"--blink-settings=preferredColorScheme={('dark', 'light').index(scheme)}"
    log, asked = browse(page, preferred, f"--screenshot={shot}")
    assert "CONSOLE" not in log and asked == []
    pixels = imread(shot)[..., :3]
    assert (pixels.mean() > 0.5) == (scheme == "light")
    assert pixels.std() > 0.05, "the page is empty"
