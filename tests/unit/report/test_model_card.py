"""A model card says what the run folder says, and nothing that it does not."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxdistill.config import dump, load
from jaxdistill.metrics import RowFile
from jaxdistill.report import model_card
from jaxdistill.report.model_card import code, held_out, plain
from jaxdistill.run_config import RunConfig

QUICKSTART = Path(__file__).parents[3] / "configs/quickstart.yaml"


def card(run: Path, *overrides: str, adapters: bool = False, taught: bool = True) -> str:
    config: Any = yaml.safe_load(dump(load(QUICKSTART, overrides, RunConfig)))
    return model_card(
        run, config, step=4, name="mine", place=Path("models/mine"), dtype="bfloat16", adapters=adapters,
        taught=taught,
    )  # fmt: skip


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    text = card(tmp_path)
    assert "Held-out" not in text and "fingerprint" not in text and "teacher" not in text.lower()
    assert "student`, distilled with jaxdistill." in text and "| weights | bfloat16 |" in text
    assert "base_model" not in text  # a folder of this machine
    assert "trained on reference responses" in card(tmp_path, taught=False)


def test_a_student_of_the_hub_is_named_as_the_hub_knows_it(tmp_path: Path) -> None:
    text = card(tmp_path, "student.path=Qwen/Qwen3-1.7B@v2", adapters=True)
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "Qwen/Qwen3-1.7B"
    assert 'from_pretrained("Qwen/Qwen3-1.7B", revision="v2")' in text


def test_the_figures_are_of_the_first_evaluation_and_of_the_exported_step(tmp_path: Path) -> None:
    rows = [{"step": n, "loss": 1.0} | ({"eval/accuracy": n / 10} if n % 2 == 0 else {}) for n in range(7)]
    RowFile(tmp_path / "metrics.jsonl").append(rows)
    assert "| `accuracy` | 0 | 0.4 |" in card(tmp_path) and "| step 0 | step 4 |" in card(tmp_path)
    assert held_out(rows, 5) == ([0, 4], [("accuracy", ["0", "0.4"])])
    assert held_out(rows[:1], 5) == ([0], [("accuracy", ["0"])])
    assert held_out([{"step": 0, "loss": 1.0}], 5) == ([], [])


@pytest.mark.parametrize(
    ("value", "span"),
    [
        ("models/a", "`models/a`"),
        ("a|b", r"`a\|b`"),
        ("a`b", "``a`b``"),
        ("`", "`` ` ``"),
        ("two\nlines | <b>", r"`two lines \| <b>`"),
    ],
)
def test_values_stand_in_code_spans_that_they_cannot_leave(value: str, span: str) -> None:
    assert code(value) == span


def test_plain_text_is_no_markup() -> None:
    assert plain("a_b*c [x](y)\n# <i>|") == r"a\_b\*c \[x\](y) \# \<i\>\|"
