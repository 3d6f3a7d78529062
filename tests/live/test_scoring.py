"""What the genuine server answers is what transformers computes and what `jaxdistill.serve` answers.

Letters: B rows, T positions, K top-k or chosen ids.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .conftest import ATOL, GOLDEN, Server

pytestmark = pytest.mark.live

SCORING = {"sampling_params": {"max_new_tokens": 0, "temperature": 0}, "return_logprob": True}
TOP = 8


def values(entries: list[Any]) -> np.ndarray:
    """First members of a list of triples [T] or of distributions [T, K]."""
    if entries and isinstance(entries[0][0], list):
        return np.array([[triple[0] for triple in entry] for entry in entries])
    return np.array([triple[0] for triple in entries])


def ids(distributions: list[Any]) -> np.ndarray:
    return np.array([[triple[1] for triple in entry] for entry in distributions])


def check_row(meta: dict[str, Any], expected: dict[str, np.ndarray], b: int, start: int) -> None:
    """One row's lists against transformers; entry 0 is null, entry i of position start + i."""
    length = int(expected["lengths"][b])
    row = expected["tokens"][b, :length].tolist()
    before = slice(start, length - 1)  # the positions whose next token is reported
    own = meta["input_token_logprobs"]
    assert own[0][0] is None and [triple[1] for triple in own] == row[start:]
    np.testing.assert_allclose(values(own[1:]), expected["next_logprob"][b, before], rtol=0, atol=ATOL)
    for name, wanted in (("top", "top_logprobs"), ("token_ids", "chosen_logprobs")):
        lists = meta[f"input_{name}_logprobs"]
        assert lists[0] is None and len(lists) == len(own)
        every = lists[1:] + meta[f"output_{name}_logprobs"]  # the last is of what follows the row
        wide = slice(start, length)
        np.testing.assert_allclose(values(every), expected[wanted][b, wide], rtol=0, atol=ATOL)
        if name == "top":
            # Where two are as likely as rounding can tell, either may come first.
            clear = np.diff(expected["top_logprobs"][b, wide], axis=-1) < -1e-3
            apart = clear[:, 1:] & clear[:, :-1]
            np.testing.assert_array_equal(
                ids(every)[:, 1:-1][apart], expected["top_ids"][b, wide][:, 1:-1][apart]
            )
        else:
            assert (ids(every) == expected["chosen_ids"]).all()


def test_whole_rows_agree_with_transformers(
    genuine: Server, expected: dict[str, np.ndarray], rows: list[list[int]]
) -> None:
    replies = genuine.generate(
        input_ids=rows,
        logprob_start_len=0,
        top_logprobs_num=TOP,
        token_ids_logprob=expected["chosen_ids"].tolist(),
        **SCORING,
    )
    for b, reply in enumerate(replies):
        check_row(reply["meta_info"], expected, b, 0)


def test_responses_after_prompts_agree_with_transformers(
    genuine: Server, expected: dict[str, np.ndarray], rows: list[list[int]]
) -> None:
    """As the client asks: every row from its own last prompt token on, twice, so that the second comes out of
    the server's cache of prefixes."""
    starts = [len(row) * 2 // 3 for row in rows]
    for _ in range(2):
        replies = genuine.generate(
            input_ids=rows,
            logprob_start_len=starts,
            top_logprobs_num=TOP,
            token_ids_logprob=expected["chosen_ids"].tolist(),
            **SCORING,
        )
        for b, reply in enumerate(replies):
            check_row(reply["meta_info"], expected, b, starts[b])


FORMS: dict[str, dict[str, Any]] = {
    "nothing beside": {"logprob_start_len": 0},
    "top": {"logprob_start_len": 0, "top_logprobs_num": 4},
    "chosen": {"logprob_start_len": 0, "token_ids_logprob": [7, 3]},
    "text": {"logprob_start_len": 0, "top_logprobs_num": 2, "return_text_in_logprobs": True},
    "no prompt positions": {},
    "temperature": {"logprob_start_len": 0, "sampling_params": {"max_new_tokens": 0, "temperature": 2.0}},
    "one new token": {
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
        "token_ids_logprob": [7],
        "sampling_params": {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True},
    },
    "unknown field": {"logprob_start_len": 0, "no_such_field": 1},
}
PER_ROW: dict[str, dict[str, Any]] = {
    "starts": {"logprob_start_len": [1, 4, 0]},
    "all settings": {
        "logprob_start_len": [0, 2, 3],
        "top_logprobs_num": [2, 0, 3],
        "token_ids_logprob": [[1], [2, 3], [4]],
        "rid": ["a", "b", "c"],
        "return_text_in_logprobs": True,
    },
}


def close(ours: Any, theirs: Any, where: str) -> None:
    """Same keys, nesting, lengths, ids, texts and nulls; log-probabilities within the tolerance."""
    if isinstance(theirs, list):
        assert isinstance(ours, list) and len(ours) == len(theirs), where
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            close(one, other, f"{where}[{number}]")
    elif isinstance(theirs, float):
        assert abs(ours - theirs) <= ATOL, (where, ours, theirs)
    else:
        assert ours == theirs, where


def same_reply(ours: Any, theirs: Any) -> None:
    assert (ours["output_ids"], ours["text"]) == (theirs["output_ids"], theirs["text"])
    newer = {"weight_versions"}  # a list that later releases add
    assert ours["meta_info"].keys() - newer == theirs["meta_info"].keys() - newer
    for name, value in theirs["meta_info"].items():
        if name.endswith("_logprobs") or name in ("prompt_tokens", "completion_tokens", "finish_reason"):
            close(ours["meta_info"][name], value, name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batched", [False, True])
def test_the_embedded_server_answers_the_same(
    genuine: Server, ours: Server, rows: list[list[int]], form: str, batched: bool
) -> None:
    body = SCORING | FORMS[form] | {"input_ids": rows[:3] if batched else rows[1]}
    got, wanted = ours.generate(**body), genuine.generate(**body)
    for one, other in zip(*((got, wanted) if batched else ([got], [wanted])), strict=True):
        same_reply(one, other)


@pytest.mark.parametrize("form", PER_ROW)
def test_settings_a_row_mean_the_same(
    genuine: Server, ours: Server, rows: list[list[int]], form: str
) -> None:
    body = SCORING | PER_ROW[form] | {"input_ids": rows[:3]}
    for one, other in zip(ours.generate(**body), genuine.generate(**body), strict=True):
        same_reply(one, other)
        if "rid" in body:
            assert one["meta_info"]["id"] == other["meta_info"]["id"]


def test_every_text_of_the_vocabulary_is_the_same(genuine: Server, ours: Server) -> None:
    """The probe of the configured tokenizer rests on these."""
    status, info = ours.ask("/model_info")
    assert status == 200 and info["model_path"] == str(genuine.folder)
    vocabulary = json.loads((Path(genuine.folder) / "config.json").read_text())["vocab_size"]
    step = max(1, vocabulary // 400)
    body = SCORING | {
        "input_ids": list(range(0, vocabulary, step))[:400],
        "logprob_start_len": 0,
        "return_text_in_logprobs": True,
    }
    got, wanted = (s.generate(**body)["meta_info"]["input_token_logprobs"] for s in (ours, genuine))
    assert [triple[1:] for triple in got] == [triple[1:] for triple in wanted]


REFUSED = [
    "err_empty_ids", "err_float_token", "err_bad_type", "err_no_input", "err_bad_sampling",
    "err_bad_token_ids_logprob", "score_start_too_big",
]  # fmt: skip


def shape(value: Any) -> Any:
    """Keys and kinds, without the words."""
    return {k: shape(v) for k, v in value.items()} if isinstance(value, dict) else type(value).__name__


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_have_the_same_status_and_shape(genuine: Server, ours: Server, name: str) -> None:
    request = json.loads((GOLDEN / "sglang" / "0.5.15" / f"{name}.json").read_text())["request"]
    if name == "score_start_too_big":
        request["input_ids"] = [5, 6, 7]
    theirs, own = genuine.ask("/generate", request), ours.ask("/generate", request)
    assert theirs[0] == own[0] == 400
    assert shape(own[1]) == shape(theirs[1])


def test_bad_json_and_unknown_paths_are_refused_alike(genuine: Server, ours: Server) -> None:
    for path, body in (("/generate", b"{bad json"), ("/no_such_path", None), ("/generate", None)):
        theirs, own = genuine.ask(path, body), ours.ask(path, body)
        assert theirs[0] == own[0] and 400 <= own[0] < 500
        assert shape(own[1]) == shape(theirs[1])


def test_rows_are_taken_up_to_the_length_the_server_names(genuine: Server, ours: Server) -> None:
    for server in (genuine, ours):
        info = server.ask("/server_info")[1]
        assert server.ask("/v1/models")[1]["data"][0]["max_model_len"] == server.context
        most = info["max_req_input_len"]
        assert 0 < most <= server.context
        for length in (most, server.context - 1, server.context, server.context + 5):
            if length >= most:
                status, reply = server.ask("/generate", SCORING | {"input_ids": [5] * length})
                assert status == 400 and "tokens" in reply["error"]["message"], (server.url, length)
        if server.context <= 1024:  # a longer one takes minutes on a CPU
            reply = server.generate(input_ids=[5] * (most - 1), logprob_start_len=most - 10, **SCORING)
            assert len(reply["meta_info"]["input_token_logprobs"]) == 9


def test_the_weight_version_of_an_update_is_in_every_reply(
    genuine: Server, expected: dict[str, np.ndarray], rows: list[list[int]]
) -> None:
    """The same weights again: only the version changes, and a wrong folder changes nothing."""
    body = SCORING | {"input_ids": rows[:2], "logprob_start_len": 0}
    before = genuine.generate(**body)
    path = genuine.ask("/model_info")[1]["model_path"]
    try:
        update = {"model_path": path, "weight_version": "step-7", "flush_cache": True}
        status, reply = genuine.ask("/update_weights_from_disk", update)
        assert status == 200 and reply["success"] is True, reply
        status, reply = genuine.ask(
            "/update_weights_from_disk", {"model_path": "/no/such/folder", "weight_version": "step-8"}
        )
        assert status == 400 and reply["success"] is False
        after = genuine.generate(**body)
        assert {reply["meta_info"]["weight_version"] for reply in after} == {"step-7"}
        assert genuine.ask("/model_info")[1]["weight_version"] == "step-7"
        for one, other in zip(after, before, strict=True):
            close(
                one["meta_info"]["input_token_logprobs"], other["meta_info"]["input_token_logprobs"], "after"
            )
    finally:
        genuine.ask("/update_weights_from_disk", {"model_path": path, "weight_version": "default"})
    assert genuine.generate(**body)[0]["meta_info"]["weight_version"] == "default"


def test_the_last_id_of_the_vocabulary_is_scored_as_itself_whatever_the_echo_says(
    genuine: Server, ours: Server, rows: list[list[int]]
) -> None:
    """SGLang shows 0 in the place of the last id (its guard against placeholders of images is one too low);
    the value beside it is the last id's. A client that compares echoes has to know."""
    last = json.loads((genuine.folder / "config.json").read_text())["vocab_size"] - 1
    row = [*rows[0][:4], last, *rows[0][4:6], last - 1]
    body = SCORING | {"input_ids": row, "logprob_start_len": 0, "token_ids_logprob": [last]}
    theirs, own = (server.generate(**body)["meta_info"] for server in (genuine, ours))
    echoes = [triple[1] for triple in theirs["input_token_logprobs"]]
    assert echoes in (row, [0 if token == last else token for token in row])
    assert [triple[1] for triple in own["input_token_logprobs"]] == row
    np.testing.assert_allclose(
        values(theirs["input_token_logprobs"][1:]),
        values(own["input_token_logprobs"][1:]),
        rtol=0,
        atol=ATOL,
    )
    assert theirs["input_token_logprobs"][4][0] == theirs["input_token_ids_logprobs"][4][0][0]
