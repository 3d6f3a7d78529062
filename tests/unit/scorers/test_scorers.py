"""How right a response is: the built-in rules, anybody's function, and what is said of a bad one."""

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdistill.config import StrictConfig
from jaxdistill.data import read_prompts
from jaxdistill.data.prompts import fingerprint
from jaxdistill.errors import ConfigError, DataError
from jaxdistill.records import Prompt, Rollout, TokenSpans
from jaxdistill.scorers import Scorer, ScorerName, load_scorer
from jaxdistill.scorers.text import last_number


def prompt(answer: str | None = None, **more) -> Prompt:
    return Prompt([{"role": "user", "content": "hi"}], 7, "sums", answer=answer, **more)


def rollout(text: str, row: Prompt, *, finished: bool = True) -> Rollout:
    data = text.encode()
    spans = TokenSpans(np.zeros(1, np.int32), data, np.array([len(data)]), np.zeros(1, np.int8))
    return Rollout(row, np.ones(1, np.int32), spans, np.zeros(1, np.float32), finished, 0, vocabulary="v")


@pytest.mark.parametrize(
    ("name", "response", "answer", "score"),
    [
        ("exact", " 12 \n", "12", 1.0),
        ("exact", "it is 12", "12", 0.0),
        ("final_line", "3 + 4 = 7\nIt is 7.\n", "It is 7.", 1.0),
        ("final_line", "It is 7.\nOr 8.", "It is 7.", 0.0),
        ("numeric", "So there are 3 and 4, that is $1,234.50 in all.", "1234.5", 1.0),
        ("numeric", "12", "so 3 + 9 = 12", 1.0),
        ("numeric", "12 or 13", "12", 0.0),
        ("numeric", "no number", "12", 0.0),
        ("numeric", "", "0", 0.0),
    ],
)
def test_the_rules(name, response, answer, score):
    assert load_scorer(name)(rollout(response, prompt(answer))) == score


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("-7", -7),
        ("\N{MINUS SIGN}7", -7),
        ("+7", 7),
        ("x = -7", -7),
        ("-$7", -7),
        ("10-7", 7),
        ("10 - 7", 7),
        ("(3)-7", 7),
        ("- 7", 7),  # a bullet
        ("1,234,567", 1_234_567),
        ("1\N{NARROW NO-BREAK SPACE}234", 1234),
        ("1,23", 23),
        ("1,2345", 2345),
        ("1234,567", 567),
        ("3.50", Fraction(7, 2)),
        (".5", Fraction(1, 2)),
        ("0.125 kg.", Fraction(1, 8)),
        ("3.", 3),
        ("-3/4", Fraction(-3, 4)),
        (r"\boxed{-\frac{3}{4}}", Fraction(-3, 4)),
        ("3/0", None),
        ("3/4.5", Fraction(9, 2)),
        ("1.5e3", 1500),
        ("2E-2", Fraction(1, 50)),
        ("5em", 5),
        ("50%", 50),
        ("5 m2", 5),
        ("5 m^2", 5),
        ("10^3", 10),
        ("5 x23", 5),
        ("007", 7),
        ("**42**", 42),
        ("答案是42。", 42),
        ("in 3/4/2024", 2024),
        ("none", None),
        ("9" * 5000, None),
        ("1e999999999", 1),
    ],
)
def test_the_last_number_of_a_text(text, value):
    assert last_number(text) == value


@given(
    st.integers(-(10**12), 10**12), st.integers(0, 6), st.sampled_from(["", ".", " kg", " %", "!", " m^2"])
)
def test_every_way_to_write_a_number_is_that_number(value, decimals, after):
    number = Fraction(value, 10**decimals)
    text = f"{'-' if value < 0 else ''}{abs(value) // 10**decimals:,}"
    text += f".{abs(value) % 10**decimals:0{decimals}d}" if decimals else ""
    assert last_number(f"first 12, then {text}{after}") == number
    assert last_number(text.replace(",", "")) == number
    assert last_number(f"it is {number.numerator}/{number.denominator}{after}") == number


@given(st.text(alphabet="0123456789,./-eE$ xm^", max_size=200))
def test_any_text_has_a_last_number_or_none(text):
    assert last_number(text) is None or isinstance(last_number(text), Fraction)


@pytest.mark.parametrize("unit", ["1,", "1,234,", "1/", "1.", "-", "1e", "9", "1,2345"])
def test_a_long_response_takes_linear_time(unit):
    """A rule that tries twice at each place would need hours here."""
    last_number(unit * 300_000)


def test_a_cut_response_is_wrong_and_a_row_without_an_answer_is_not_judged():
    for name in ("exact", "final_line", "numeric"):
        scorer = load_scorer(name)
        assert scorer(rollout("12", prompt("12"), finished=False)) == 0.0
        assert scorer(rollout("12", prompt())) is None


def test_an_answer_without_a_number_is_named():
    with pytest.raises(
        DataError, match=r"sums row 7: the answer 'twelve' holds no number for scorer 'numeric'"
    ):
        load_scorer("numeric").judges(prompt("twelve"))


class Settings(StrictConfig):
    scorer: ScorerName = "exact"


def first_word(response: str, row: Prompt) -> float:
    return float(response.split()[0] == (row.metadata or {})["word"])


def test_any_function_by_its_place(tmp_path, monkeypatch):
    code = "class Sums:\n  @staticmethod\n  def half(response, prompt): return 0.5\nx = 3\n"
    (tmp_path / "mine_scorers.py").write_text(code)
    (tmp_path / "broken_scorers.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert Settings(scorer="mine_scorers:Sums.half").scorer == "mine_scorers:Sums.half"
    scorer = load_scorer("mine_scorers:Sums.half")
    assert scorer(rollout("x", prompt())) == 0.5  # it judges every row, with an answer or without
    for name, says in (
        ("mine_scorers:Sums.third", "cannot be imported.*third.*PYTHONPATH"),
        ("no_such_module_here:f", "cannot be imported.*no_such_module_here"),
        ("mine_scorers:x", "is 3, which cannot be called"),
        ("numerik", "'numerik' is unknown; expected one of exact, final_line, numeric, reasoning_gym, or"),
        ("mine_scorers:", "is unknown"),
        (".mine_scorers:x", "is unknown"),
        ("broken_scorers:f", "cannot be imported.*ZeroDivisionError"),
    ):
        with pytest.raises(ValueError, match=says):
            Settings(scorer=name)


def test_a_function_sees_the_rows_metadata():
    scorer = Scorer("first_word", first_word, lambda row: True)
    assert scorer(rollout("yes it is", prompt(metadata={"word": "yes"}))) == 1.0
    with pytest.raises(DataError, match=r"'first_word' on sums row 7 raised KeyError: 'word'.*'yes it is'"):
        scorer(rollout("yes it is", prompt()))


@pytest.mark.parametrize("value", [None, "1", 1.5, -0.1, float("nan"), np.float32("inf"), [1], 1 + 0j])
def test_nonsense_names_the_row_and_the_scorer(value):
    scorer = Scorer("odd", lambda response, row: value, lambda row: True)
    with pytest.raises(
        DataError, match=r"scorer 'odd' on sums row 7 returned .*expected a number in \[0, 1\]"
    ):
        scorer(rollout("x", prompt()))


@pytest.mark.parametrize("value", [True, 1, 0.25, np.bool_(True), np.float32(0.5), np.int64(0)])
def test_numbers_of_any_kind_become_floats(value):
    score = Scorer("fine", lambda response, row: value, lambda row: True)(rollout("x", prompt()))
    assert score == float(value) and type(score) is float


def test_reasoning_gym_rows_through_a_file_and_its_own_verifier(tmp_path):
    gym = pytest.importorskip("reasoning_gym")
    rows = []
    for dataset in ("leg_counting", "countdown"):
        entry = gym.create_dataset(dataset, size=1, seed=3)[0]
        assert isinstance(entry["answer"], str)
        metadata = {"dataset": dataset, "entry": entry}
        messages = [{"role": "user", "content": entry["question"]}]
        rows.append({"messages": messages, "answer": entry["answer"], "metadata": metadata})
        rows.append(rows[-1] | {"metadata": json.dumps(metadata)})  # as a Parquet file holds it
    path = tmp_path / "gym.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = read_prompts(path)
    assert prompts[0].metadata == prompts[1].metadata
    scorer = load_scorer("reasoning_gym")
    for row in prompts:
        assert scorer(rollout(f"Let me see.\n<answer>{row.answer}</answer>", row)) == 1.0
        assert scorer(rollout(f"{row.answer}\n", row)) == 1.0
        assert scorer(rollout("<answer>no idea</answer>", row)) < 0.5
    assert scorer(rollout("4", prompt("4"))) is None
    with pytest.raises(DataError, match=r"sums row 7: reasoning-gym has no such task .*'legs'"):
        scorer.judges(prompt(metadata={"dataset": "legs", "entry": {"answer": "1", "metadata": {}}}))
    with pytest.raises(DataError, match=r"sums row 7: the entry of its metadata is None"):
        scorer.judges(prompt(metadata={"dataset": "leg_counting"}))


def test_reasoning_gym_that_is_not_installed_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr("jaxdistill.scorers.gym.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed; pip install 'jaxdistill\[reasoning-gym\]'"):
        load_scorer("reasoning_gym")


def test_metadata_is_part_of_the_data_and_its_absence_changes_no_fingerprint():
    assert fingerprint([prompt(metadata={"a": 1})]) != fingerprint([prompt(metadata={"a": 2})])
    assert fingerprint([prompt(metadata={"a": 1})]) != fingerprint([prompt()])
