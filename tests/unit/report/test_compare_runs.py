"""The comparison of runs, as a person would call it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from jaxdistill.metrics import RowFile

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "scripts" / "compare_runs.py"


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True, text=True, timeout=120, check=False, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_runs_side_by_side(make_run: Callable[..., Path], tmp_path: Path) -> None:
    good = make_run(tmp_path / "good", steps=20)
    poor = tmp_path / "poor"
    RowFile(poor / "metrics.jsonl").append(
        [{"step": n, "eval/reverse_kl_per_byte": kl} for n, kl in enumerate([0.4, 0.2, 0.8])]
    )
    out = tmp_path / "docs" / "credit.svg"
    done = call("--out", str(out), f"lookahead={good}", f"broad|cast={poor}")
    assert (done.returncode, done.stderr) == (0, "")
    table = done.stdout.splitlines()
    assert len(table) == 4
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert table[3] == "| broad\\|cast | - | - | - | 0.4000 | 0.2000 | 0.8000 | +100 % |"
    assert table[2].startswith("| lookahead | ")
    texts = {element.text for element in ElementTree.parse(out).iter() if element.tag.endswith("text")}
    assert {"lookahead", "broad|cast", "task accuracy", "step"} <= texts
    first = out.read_bytes()
    call("--out", str(out), f"lookahead={good}", f"broad|cast={poor}")
    assert out.read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "expected label=folder"),
        (["a=missing"], "no such folder"),
        (["a={empty}"], "has no eval/reverse_kl_per_byte"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1}\n')
    out = tmp_path / "x.svg"
    done = call("--out", str(out), *(one.format(empty=tmp_path) for one in arguments))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and words in done.stderr
    assert not out.exists()
