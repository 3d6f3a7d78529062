"""Task rewards in a whole run: they reach the step, and a config that gives them for nothing is refused."""

import json

import numpy as np
import pytest

from .conftest import ROOT, rows

REWARD = ("reward.scorer=final_line", "objective.reward_coefficient=0.5", "objective.baseline=batch")


@pytest.mark.slow
def test_a_reward_changes_what_is_learned_and_is_measured(train, served, tmp_path):
    settings = ("run.steps=2", "eval.prompts=2", "rollout.samples_per_prompt=4", "reward.normalize=none")
    for name, more in (("with", REWARD), ("without", REWARD[2:])):
        used = settings if more is REWARD else settings[:3]
        result = train(tmp_path / name, *served, *used, *more)
        assert result.returncode == 0, result.stderr
    rewarded, plain = rows(tmp_path / "with"), rows(tmp_path / "without")
    assert all(0.0 <= row["reward"] <= 1.0 and 0.0 <= row["reward_spread"] <= 1.0 for row in rewarded[:2])
    assert rewarded[0]["reward"] > 0.0  # else nothing below is shown
    assert "reward" not in plain[0]
    # The first batch is the same, what is learned from it is not.
    assert rewarded[0]["reverse_kl_per_byte"] == plain[0]["reverse_kl_per_byte"]
    assert np.isfinite(rewarded[0]["loss"]) and rewarded[0]["grad_norm"] != plain[0]["grad_norm"]
    assert rewarded[1]["recompiles"] == 0


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (REWARD[:1], "does not read it; set objective.reward_coefficient"),
        (REWARD[1:2], "objective.reward_coefficient needs a reward: section"),
        ((*REWARD, "rollout.samples_per_prompt=1"), "every reward would be 0"),
        ((*REWARD[1:], "reward.scorer=reasoning_gym"), "reward.scorer=reasoning_gym: no row of"),
    ],
)
def test_a_reward_that_would_do_nothing_is_refused(train, tmp_path, overrides, says):
    result = train(tmp_path / "run", *overrides)
    assert result.returncode == 2 and says in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_an_answer_without_a_number_is_found_before_the_run(train, tmp_path):
    lines = (ROOT / "assets/toy/train.jsonl").read_text().splitlines()[:8]
    data = tmp_path / "data.jsonl"
    changed = [*lines, json.dumps(json.loads(lines[0]) | {"answer": "many"})]
    data.write_text("".join(line + "\n" for line in changed))
    settings = (f"data.path={data}", "reward.scorer=numeric", *REWARD[1:])
    result = train(tmp_path / "run", *settings)
    assert result.returncode == 2 and "data.jsonl line 9: the answer 'many' holds no number" in result.stderr
