"""The canary, the tokenizer's comparison with the served one, and the longest row."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jaxdistill.errors import ConfigError, TeacherContractError
from jaxdistill.servers import TEACHER
from jaxdistill.teachers import identity
from jaxdistill.teachers.identity import (
    CANARY,
    CANARY_TOKENS,
    TeacherIdentity,
    canary_distance,
    canary_row,
    check_tokenizer,
    longest_row,
)
from jaxdistill.text import Tokenizer

RECORDED = Path(__file__).parents[2] / "golden" / "sglang"
WHERE = "http://there"
FOUND = TeacherIdentity(
    name="teacher",
    model="models/one",
    model_type="llama",
    weight_version="default",
    tokenizer="a" * 64,
    tokenizer_checked=True,
    longest=127,
    canary_ids=(1, 2, 3),
    canary=(-1.0, -2.5),
)


def test_an_identity_survives_json() -> None:
    assert TeacherIdentity.from_json(json.loads(json.dumps(FOUND.to_json()))) == FOUND


def test_an_identity_of_another_version_is_no_identity() -> None:
    for field in FOUND.to_json():
        lacking = {key: value for key, value in FOUND.to_json().items() if key != field}
        with pytest.raises(KeyError, match=field):
            TeacherIdentity.from_json(lacking)
    with pytest.raises(TypeError, match="colour"):
        TeacherIdentity.from_json({**FOUND.to_json(), "colour": "grey"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "moved/one", "longest": 99, "name": "other"}, None),
        ({"canary": (-1.05, -2.55)}, None),
        ({"canary": (-1.0, -2.8)}, "0.15 nats a token apart, expected at most 0.1"),
        ({"tokenizer": "b" * 64}, "tokenizer bbbbbbbbbbbb, expected aaaaaaaaaaaa"),
        ({"weight_version": "step-7"}, "weight_version 'step-7', expected 'default'"),
        ({"canary_ids": (1, 2, 4)}, "canary ids"),
    ],
)
def test_what_makes_another_teacher(change: dict[str, Any], words: str | None) -> None:
    difference = FOUND.difference(replace(FOUND, **change), 0.1)
    assert (difference is None) if words is None else (difference is not None and words in difference)


def test_the_distance_is_a_mean_over_tokens() -> None:
    assert canary_distance((-1.0, -2.0), (-1.0, -2.5)) == 0.25
    assert canary_distance((-1.0, -2.0), (-1.5, -1.5)) == 0.5


def test_the_canary_is_plain_content_and_fits(tokenizer: Tokenizer) -> None:
    row = canary_row(tokenizer, 1000)
    assert row.number is None and row.label == "canary"
    assert len(row.prompt) == 1 and len(row) == CANARY_TOKENS
    ids = [*row.prompt.tolist(), *row.response.tolist()]
    assert CANARY.encode().startswith(b"".join(tokenizer.token_bytes(ids)))
    assert len(canary_row(tokenizer, 10)) == 10
    with pytest.raises(ConfigError, match="the canary has 1 tokens"):
        canary_row(tokenizer, 1)


def served(tokenizer: Tokenizer, texts: Callable[[int], str | None]) -> Callable[[Mapping[str, Any]], Any]:
    """A server with its own opinion of what ids stand for; it refuses ids that the vocabulary lacks."""

    def post(body: Mapping[str, Any]) -> Any:
        ((ids,), (chosen,)) = body["input_ids"], body["token_ids_logprob"]
        assert body["return_text_in_logprobs"] and body["logprob_start_len"] == [0]
        assert chosen == max(ids) and min(ids) >= 0
        entries = [[None if i == 0 else -1.0, index, texts(index)] for i, index in enumerate(ids)]
        # Where the token is the chosen one, both values are its.
        others = [None, *([[-1.0, chosen, None]] for _ in ids[1:])]
        meta = {
            "prompt_tokens": len(ids),
            "input_token_logprobs": entries,
            "input_token_ids_logprobs": others,
            "output_token_ids_logprobs": [[[-1.0, chosen, None]]],
        }
        return [{"meta_info": meta}]

    return post


def decoded(tokenizer: Tokenizer) -> Callable[[int], str]:
    """What the tokenizers library says an id stands for."""
    return lambda index: tokenizer._raw.decode([index], skip_special_tokens=False)


def test_the_served_models_own_tokenizer_is_recognised(tokenizer: Tokenizer) -> None:
    assert check_tokenizer(served(tokenizer, decoded(tokenizer)), tokenizer, 127, WHERE)


def test_a_decoder_may_leave_out_the_space_before_a_word(tokenizer: Tokenizer) -> None:
    assert any(data == b" the" for data in tokenizer.token_bytes(range(260)))
    decode = decoded(tokenizer)
    assert check_tokenizer(
        served(tokenizer, lambda index: decode(index).removeprefix(" ")), tokenizer, 127, WHERE
    )


def test_special_tokens_are_compared_too(tokenizer: Tokenizer) -> None:
    asked: list[int] = []
    decode = decoded(tokenizer)
    check_tokenizer(served(tokenizer, lambda i: asked.append(i) or decode(i)), tokenizer, 127, WHERE)
    assert tokenizer.control <= set(asked) and max(asked) < tokenizer.vocab_size - 1
    end = tokenizer.roles["end_of_turn"]
    wrong = served(tokenizer, lambda i: "<eos>" if i == end else decode(i))
    with pytest.raises(ConfigError, match=rf"1 stand .*id {end} is '<eos>' there and '<\|end\|>' here"):
        check_tokenizer(wrong, tokenizer, 127, WHERE)


def test_another_tokenizer_is_named_with_its_ids(tokenizer: Tokenizer) -> None:
    decode = decoded(tokenizer)
    moved = served(tokenizer, lambda index: decode((index + 1) % 260))
    with pytest.raises(ConfigError, match=r"teacher.tokenizer .*http://there: .*ids \d+ stand .*id \d+ is"):
        check_tokenizer(moved, tokenizer, 127, WHERE)


def test_a_server_without_texts_cannot_be_compared(tokenizer: Tokenizer) -> None:
    assert not check_tokenizer(served(tokenizer, lambda _: None), tokenizer, 127, WHERE)
    decode = decoded(tokenizer)
    with pytest.raises(ConfigError, match="is None there"):  # some without texts is another matter
        some = served(tokenizer, lambda index: decode(index) if index % 2 else None)
        check_tokenizer(some, tokenizer, 127, WHERE)


def test_a_tokenizer_that_nothing_was_asked_of_is_not_proved(tiny_model: Path, tmp_path: Path) -> None:
    """A row that holds one id has none to score, and a vocabulary of two has one id to ask for."""
    folder = tmp_path / "two"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 2}))
    asked: list[Mapping[str, Any]] = []
    for path, longest in ((tiny_model, 1), (folder, 127)):
        tokenizer = Tokenizer.load(str(path))
        assert not check_tokenizer(asked.append, tokenizer, longest, WHERE)
    assert not asked


def test_a_smaller_vocabulary_is_refused_where_there_are_no_texts(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sent in a row, an id that the model lacks would end the server."""
    monkeypatch.setattr(identity, "COMMON_IDS", 100)
    silent = served(tokenizer, lambda _: None)

    def small(body: Mapping[str, Any]) -> Any:
        if body["token_ids_logprob"][0] >= 200:
            raise TeacherContractError("status 400: valid range is [0, 200)")
        return silent(body)

    assert not check_tokenizer(silent, tokenizer, 127, WHERE)
    with pytest.raises(TeacherContractError, match=r"\[0, 200\).*where it is left out, the student's"):
        check_tokenizer(small, tokenizer, 127, WHERE)


@pytest.mark.parametrize("version", ["0.5.15", "0.5.23"])
def test_nothing_that_a_genuine_server_says_of_itself_proves_a_tokenizer(version: str) -> None:
    said: set[str] = set()
    for name in ("model_info", "get_model_info", "server_info", "v1_models"):
        file = RECORDED / version / f"{name}.json"
        said |= set(json.loads(file.read_text())["response"]) if file.is_file() else set()
    assert "tokenizer_path" in said and not [key for key in said if "vocab" in key]


def test_the_question_fits_a_short_context(tokenizer: Tokenizer) -> None:
    lengths: list[int] = []
    post = served(tokenizer, decoded(tokenizer))
    check_tokenizer(
        lambda body: lengths.append(len(body["input_ids"][0])) or post(body), tokenizer, 20, WHERE
    )
    assert lengths == [20]


def test_a_refusal_names_the_ids_and_the_tokenizer(tokenizer: Tokenizer) -> None:
    def refuse(body: Mapping[str, Any]) -> Any:
        raise TeacherContractError("status 400: token_ids_logprob contains out-of-vocabulary token id 263")

    with pytest.raises(TeacherContractError, match=r"400: .*up to 263, check that teacher.tokenizer"):
        check_tokenizer(refuse, tokenizer, 127, WHERE)


def test_a_reply_that_is_not_believed_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(TeacherContractError, match="asked for the texts of ids: canary: reply: got"):
        check_tokenizer(lambda _: {"text": ""}, tokenizer, 127, WHERE)


def test_ids_the_model_lacks_are_asked_for_last_and_never(tiny_model: Path, tmp_path: Path) -> None:
    """An added token beyond the model's own vocabulary would end a genuine server."""
    folder = tmp_path / "smaller"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 262}))
    tokenizer = Tokenizer.load(str(folder))
    assert tokenizer.vocab_size > 262
    asked: list[int] = []
    decode = decoded(tokenizer)
    check_tokenizer(served(tokenizer, lambda i: asked.append(i) or decode(i)), tokenizer, 127, WHERE)
    assert max(asked) == 260  # of the last one, 261, servers say what id 0 stands for


@pytest.mark.parametrize("version", ["0.5.15", "0.5.23"])
def test_recorded_texts_are_those_of_the_words(version: str, smollm2: Path) -> None:
    tokenizer = Tokenizer.load(str(smollm2))
    stored = json.loads((RECORDED / version / "score_text_in_logprobs.json").read_text())
    decode = decoded(tokenizer)
    for _, index, text in stored["response"]["meta_info"]["input_token_logprobs"]:
        assert decode(index) == text
    assert check_tokenizer(served(tokenizer, decode), tokenizer, 8000, WHERE)


@pytest.mark.parametrize(
    ("most", "info", "longest"),
    [
        (8192, {"max_req_input_len": 8186}, 8185),  # a genuine server's own figures
        (8192, {}, 8191),
        (8192, None, 8191),
        (8192, {"max_req_input_len": None}, 8191),
        (128, {"max_req_input_len": 10_000}, 127),
    ],
)
def test_the_longest_row_is_below_every_limit(most: int, info: Any, longest: int) -> None:
    assert longest_row(TEACHER, {"data": [{"max_model_len": most}]}, info, WHERE) == longest


@pytest.mark.parametrize("version", ["0.5.15", "0.5.23"])
def test_a_recorded_context_is_read(version: str) -> None:
    stored = json.loads((RECORDED / version / "v1_models.json").read_text())
    assert longest_row(TEACHER, stored["response"], {}, WHERE) == 8191


@pytest.mark.parametrize(
    "models", [None, [], {}, {"data": []}, {"data": [{}]}, {"data": [{"max_model_len": "8192"}]}]
)
def test_a_server_that_does_not_say_its_context_is_refused(models: Any) -> None:
    with pytest.raises(TeacherContractError, match=r"http://there: /v1/models .*max_model_len"):
        longest_row(TEACHER, models, {}, WHERE)
