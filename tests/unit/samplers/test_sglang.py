"""Students that sample on servers: which weights answered, what is believed, and servers that fall behind."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxdistill.errors import ConfigError, SamplerContractError, SamplerUnavailable
from jaxdistill.records import Prompt
from jaxdistill.samplers import RolloutConfig, SGLangSampler, SGLangSamplerConfig
from jaxdistill.samplers.sglang import ROUNDS
from jaxdistill.text import Tokenizer
from tests.faults.server import FaultServer, always, lies, prefix_states, script, status

PROMPTS = [Prompt([{"role": "user", "content": f"Why {i}?"}], i, "t") for i in range(3)]
QUICK = {"backoff_s": 0.01, "backoff_max_s": 0.02, "attempts": 2}
VOCABULARY = 2**17  # of the model: more than the tokenizer has


@pytest.fixture(scope="module")
def student() -> Tokenizer:
    return Tokenizer.load("assets/toy/student")


@contextmanager
def sampling(
    student: Tokenizer,
    folder: Path,
    *servers: FaultServer,
    seed: int = 3,
    patience: float = 1.0,
    **rollout: Any,
) -> Iterator[SGLangSampler]:
    def write(params: Any, path: Path) -> None:
        path.mkdir(parents=True)
        assert len(list(path.parent.iterdir())) <= 2  # what there is room for
        (path / "weights").write_text(str(params))

    settings: dict[str, Any] = {"max_new_tokens": 20, "samples_per_prompt": 2, "max_prompt_tokens": 64}
    sampler = SGLangSampler(
        SGLangSamplerConfig(
            endpoint=[server.url for server in servers], weights=folder, start_timeout_s=patience, **QUICK
        ),
        RolloutConfig(**(settings | rollout)),
        student,
        write,
        folder / "run",
        vocabulary=VOCABULARY,
        seed=seed,
    )
    try:
        sampler.check()
        yield sampler
    finally:
        sampler.close()


def test_responses_are_those_of_the_weights_pushed_last(student: Tokenizer, tmp_path: Path) -> None:
    with FaultServer() as one, FaultServer() as two, sampling(student, tmp_path, one, two) as sampler:
        for version in (4, 5):
            sampler.push("weights", version)
            rows = sampler.sample(PROMPTS, version)
            assert [row.prompt.index for row in rows] == [0, 0, 1, 1, 2, 2]
            assert {row.policy_version for row in rows} == {version}
        bodies = one.bodies + two.bodies
        assert one.bodies and two.bodies and len(bodies) == 6
        for body in bodies:  # one prompt's samples together, each with a seed of its own
            assert len(body["input_ids"]) == 2 and body["input_ids"][0] == body["input_ids"][1]
        seeds = [params["sampling_seed"] for body in bodies for params in body["sampling_params"]]
        assert len(set(seeds)) == 12 and all(0 <= seed < 2**31 for seed in seeds)
        for row in rows:
            states = prefix_states([*row.prompt_ids, *row.response.ids])[len(row.prompt_ids) :]
            pairs = zip(states, row.response.ids.tolist(), strict=False)
            expected = [one.logprob(state, token) for state, token in pairs]
            np.testing.assert_allclose(row.logprobs, expected, rtol=1e-6)
            assert row.finished == (row.response.ids[-1] in student.stop_ids)
        labels = [order["weight_version"] for order in one.updates]
        assert [label.partition(".")[2] for label in labels] == ["4", "5"]
        assert all(order["flush_cache"] for order in one.updates)
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["version-4", "version-5"]
        sampler.push("weights", 6)
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["version-5", "version-6"]
    assert not (tmp_path / "run").exists()


def test_what_a_killed_run_left_is_removed(student: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "run/version-90").mkdir(parents=True)
    with FaultServer() as server, sampling(student, tmp_path, server) as sampler:
        sampler.push("weights", 0)
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["version-0"]


@pytest.mark.parametrize("label", ["default", "another-run.7", "older"])
def test_a_server_with_other_weights_is_given_them_again(
    student: Tokenizer, tmp_path: Path, caplog: Any, label: str
) -> None:
    """It was restarted, another run took it, or it missed the last push."""
    with FaultServer() as one, FaultServer() as two, sampling(student, tmp_path, one, two) as sampler:
        sampler.push("weights", 6)
        older = two.version
        sampler.push("weights", 7)
        two.version = older if label == "older" else label
        rows = sampler.sample(PROMPTS, 7)
        assert {row.policy_version for row in rows} == {7} and len(rows) == 6
        assert two.version == one.version and f"sampler at {two.url} has other weights" in caplog.text


def test_newer_weights_than_those_at_the_call_are_those_of_a_push_beside_it(
    student: Tokenizer, tmp_path: Path
) -> None:
    with FaultServer() as server, sampling(student, tmp_path, server) as sampler:
        sampler.push("weights", 1)
        server.version = server.version.replace(".1", ".2")
        assert {row.policy_version for row in sampler.sample(PROMPTS, 1)} == {2}


def test_a_server_that_never_has_the_weights_ends_it(student: Tokenizer, tmp_path: Path) -> None:
    def another(reply: list[Any]) -> None:
        for row in reply:
            row["meta_info"]["weight_version"] = "another-run.7"

    with FaultServer(always(lies(another))) as server, sampling(student, tmp_path, server) as sampler:
        sampler.push("weights", 0)
        with pytest.raises(SamplerContractError, match=r"another-run\.7.*servers of its own"):
            sampler.sample(PROMPTS, 0)
        assert len(server.updates) == 5  # once, and again after each round


def test_the_last_round_counts(student: Tokenizer, tmp_path: Path) -> None:
    def another(reply: list[Any]) -> None:
        for row in reply:
            row["meta_info"]["weight_version"] = "another-run.7"

    rounds = [lies(another)] * (ROUNDS - 1) * len(PROMPTS)
    with FaultServer(script(*rounds)) as server, sampling(student, tmp_path, server) as sampler:
        sampler.push("weights", 0)
        assert len(sampler.sample(PROMPTS, 0)) == 6 and len(server.bodies) == ROUNDS * len(PROMPTS)


def test_weights_that_are_refused_end_it_with_the_folder_and_the_words(
    student: Tokenizer, tmp_path: Path
) -> None:
    with FaultServer() as server, sampling(student, tmp_path, server) as sampler:
        server.keeps_weights = True
        with pytest.raises(SamplerContractError, match=r"version-0 were not loaded.*Failed to get weights"):
            sampler.push("weights", 0)


def test_one_server_may_be_away_all_may_not(student: Tokenizer, tmp_path: Path, caplog: Any) -> None:
    with FaultServer() as one, FaultServer() as two, sampling(student, tmp_path, one, two) as sampler:
        sampler.push("weights", 0)
        two.down()
        sampler.push("weights", 1)
        assert "left behind at version 1" in caplog.text
        assert {row.policy_version for row in sampler.sample(PROMPTS, 1)} == {1}
        two.up()
        while not two.updates or two.version != one.version:
            assert {row.policy_version for row in sampler.sample(PROMPTS, 1)} == {1}
        one.down()
        two.down()
        with pytest.raises(SamplerUnavailable):
            sampler.push("weights", 2)


def test_one_that_is_away_does_not_cost_its_whole_time_at_every_push(
    student: Tokenizer, tmp_path: Path
) -> None:
    with (
        FaultServer() as one,
        FaultServer() as two,
        sampling(student, tmp_path, one, two, patience=60.0) as sampler,
    ):
        sampler.push("weights", 0)
        two.down()
        began = time.monotonic()
        sampler.push("weights", 1)
        sampler.push("weights", 2)
        assert time.monotonic() - began < 20
        assert {row.policy_version for row in sampler.sample(PROMPTS, 2)} == {2}


def test_one_that_goes_before_it_is_given_the_weights_again_is_left_behind(
    student: Tokenizer, tmp_path: Path, caplog: Any
) -> None:
    with FaultServer() as one, FaultServer() as two, sampling(student, tmp_path, one, two) as sampler:
        sampler.push("weights", 0)
        two.down()
        sampler._weights.push_again(two.url)
        assert "it is left behind" in caplog.text
    with FaultServer() as only, sampling(student, tmp_path, only) as sampler:
        sampler.push("weights", 0)
        only.down()
        with pytest.raises(SamplerUnavailable):
            sampler._weights.push_again(only.url)


@pytest.mark.parametrize("began", ["older", "another-run.7"])
def test_a_response_counts_as_its_oldest_weights(student: Tokenizer, tmp_path: Path, began: str) -> None:
    """Servers can take new weights in the middle of one, and list which wrote what."""

    def mixed(reply: list[Any]) -> None:
        meta = reply[0]["meta_info"]
        label = meta["weight_version"]
        older = label.replace(".8", ".7") if began == "older" else began
        meta["weight_versions"] = [
            {"version": older, "start": 0, "end": 1},
            {"version": label, "start": 1, "end": 2},
        ]

    with FaultServer(script(lies(mixed))) as server, sampling(student, tmp_path, server) as sampler:
        sampler.push("weights", 8)
        sampler._weights.version = 7 if began == "older" else 8  # pushed while it was sampling
        versions = [row.policy_version for row in sampler.sample(PROMPTS, 8)]
        assert sorted(versions) == ([7] + [8] * 5 if began == "older" else [8] * 6)
        assert len(server.bodies) == (3 if began == "older" else 4)


def test_rows_that_a_server_gives_up_are_asked_for_again(student: Tokenizer, tmp_path: Path) -> None:
    def aborted(reply: list[Any]) -> None:
        reply[0]["meta_info"]["finish_reason"] = {"type": "abort", "message": "shutting down"}

    with FaultServer(script(lies(aborted))) as server, sampling(student, tmp_path, server) as sampler:
        sampler.push("weights", 0)
        assert len(sampler.sample(PROMPTS, 0)) == 6
    with FaultServer(always(lies(aborted))) as server, sampling(student, tmp_path, server) as sampler:
        sampler.push("weights", 0)
        with pytest.raises(SamplerUnavailable, match="gave up"):
            sampler.sample(PROMPTS, 0)


def test_ids_that_no_tokenizer_writes_are_drawn_anew(student: Tokenizer, tmp_path: Path) -> None:
    def padded(reply: list[Any]) -> None:
        first = reply[0]
        first["output_ids"][0] = first["meta_info"]["output_token_logprobs"][0][1] = student.vocab_size

    with (
        FaultServer(script(None, lies(padded))) as server,
        sampling(student, tmp_path, server) as sampler,
    ):
        sampler.push("weights", 0)
        rows = sampler.sample(PROMPTS, 0)
        assert len(rows) == 6 and max(row.response.ids.max() for row in rows) < student.vocab_size
        # Only the row that had it is asked for again.
        assert sorted(len(body["input_ids"]) for body in server.bodies) == [1, 2, 2, 2]


BAD: dict[str, Callable[[list[Any]], Any]] = {
    "one row short": lambda reply: reply[:-1],
    "NaN": lambda reply: _entries(reply)[0].__setitem__(0, float("nan")),
    "positive": lambda reply: _entries(reply)[0].__setitem__(0, 0.5),
    "null": lambda reply: _entries(reply)[0].__setitem__(0, None),
    "other id": lambda reply: _entries(reply)[0].__setitem__(1, 1),
    "too few": lambda reply: _entries(reply).clear(),
    "none": lambda reply: reply[0]["meta_info"].pop("output_token_logprobs") and None,
    "an id beyond the model": lambda reply: reply[0]["output_ids"].__setitem__(0, VOCABULARY),
    "too many": lambda reply: reply[0]["output_ids"].extend([5] * 20),
}


def _entries(reply: list[Any]) -> Any:
    return reply[0]["meta_info"]["output_token_logprobs"]


@pytest.mark.parametrize("what", BAD)
def test_replies_that_cannot_be_are_refused(student: Tokenizer, tmp_path: Path, what: str) -> None:
    with (
        FaultServer(always(lies(BAD[what]))) as server,
        sampling(student, tmp_path, server) as sampler,
    ):
        sampler.push("weights", 0)
        with pytest.raises(SamplerContractError, match=f"sampler at {server.url}"):
            sampler.sample(PROMPTS, 0)


def test_failures_that_pass_cost_nothing(student: Tokenizer, tmp_path: Path) -> None:
    with FaultServer() as server, sampling(student, tmp_path, server) as sampler:
        sampler.push("weights", 0)
        honest = sampler.sample(PROMPTS, 0)
    with (
        FaultServer(script(status(503), None, status(429))) as server,
        sampling(student, tmp_path, server) as sampler,
    ):
        sampler.push("weights", 0)
        again = sampler.sample(PROMPTS, 0)
        assert sampler.take_counts()["retries"] == 2
    assert [row.response.ids.tolist() for row in again] == [row.response.ids.tolist() for row in honest]


def test_a_stop_string_is_found_in_the_bytes(student: Tokenizer, tmp_path: Path) -> None:
    with FaultServer() as server, sampling(student, tmp_path, server) as sampler:
        sampler.push("weights", 0)
        free = sampler.sample(PROMPTS, 0)
    longest = max(free, key=lambda row: len(row.response))
    string = longest.response.data[:2].decode()
    with FaultServer() as server, sampling(student, tmp_path, server, stop=(string,)) as sampler:
        sampler.push("weights", 0)
        rows = sampler.sample(PROMPTS, 0)
        params = server.bodies[0]["sampling_params"][0]
    assert params["stop"] == [string] and params["no_stop_trim"]
    (cut,) = [row for row, before in zip(rows, free, strict=True) if before is longest]
    assert cut.finished and cut.response.data.endswith(string.encode())
    assert len(cut.response) == len(cut.logprobs) < len(longest.response)


def test_with_a_temperature_the_models_own_logprobs_are_asked_for(student: Tokenizer, tmp_path: Path) -> None:
    with FaultServer() as server, sampling(student, tmp_path, server, temperature=0.7) as sampler:
        sampler.push("weights", 0)
        rows = sampler.sample(PROMPTS, 0)
        assert len(server.bodies) == 6 and server.bodies[0]["sampling_params"][0]["temperature"] == 0.7
    for row in rows:  # this server says the same at any temperature
        assert row.model_logprobs is not None and row.own_logprobs is row.model_logprobs
        np.testing.assert_allclose(row.model_logprobs, row.logprobs, rtol=1e-6)


def test_a_server_that_reads_too_little_is_refused_at_the_start(student: Tokenizer, tmp_path: Path) -> None:
    with (
        FaultServer(context=80) as server,
        pytest.raises(ConfigError, match=r"reads 79 tokens.*up to 84"),
        sampling(student, tmp_path, server),
    ):
        pytest.fail("it was taken")
