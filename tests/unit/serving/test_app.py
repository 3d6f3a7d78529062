"""The genuine application on loopback: replies shaped as recorded ones, refusals, the API key."""

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as RawTokenizer

from jaxdistill.serving.app import MAX_BODY_BYTES, make_app
from jaxdistill.serving.model import load_engine

RECORDED = Path(__file__).parents[2] / "golden" / "sglang"
VOCABULARY = 272
Post = Callable[..., Any]
Call = Callable[..., tuple[int, dict[str, str], bytes]]
KEY = "a-secret-of-the-tests"
# Facts of the moment, not of the request.
VOLATILE = {"cached_tokens_details", "id"}


@pytest.fixture(scope="module")
def app_parts(tiny_model: Path) -> Any:
    return load_engine(tiny_model, max_batch_tokens=512, context_length=None)


@pytest.fixture(scope="module")
def url(app_parts: Any, serving: Callable[..., Any]) -> Iterator[str]:
    with serving(make_app(*app_parts)) as address:
        yield address


@pytest.fixture(scope="module")
def generate(url: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Posts its arguments to /generate; the decoded reply."""

    def post(**body: Any) -> Any:
        status, _, content = call(f"{url}/generate", body)
        assert status == 200, content
        return json.loads(content)

    return post


def shape(value: Any, key: str = "") -> Any:
    """Keys, nesting, lengths and kinds of a reply, without its numbers and words."""
    if key in VOLATILE:
        return key
    if isinstance(value, dict):
        return {name: shape(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [shape(inner) for inner in value]
    return "number" if type(value) in (int, float) else type(value).__name__


def within_vocabulary(value: Any) -> Any:
    """A recorded request with its token ids folded into the tiny vocabulary."""
    if isinstance(value, list):
        return [within_vocabulary(inner) for inner in value]
    return value % VOCABULARY if isinstance(value, int) else value


SCORED = [
    "score_single_mnt0",
    "score_batch_mnt0",
    "score_batch_mnt1_perreq",
    "score_no_top",
    "score_start_3",
    "score_start_len",
    "score_start_len_minus1pos",
    "score_start_minus1",
    "score_default_start",
    "score_temp2",
    "one_token",
    "score_text_in_logprobs",
    "err_bad_field",
    "err_both",
]
FLAT = [("0.5.23", "score_flat"), ("0.5.23", "score_flat_b64")]  # the older server does not have it


@pytest.mark.parametrize(
    ("version", "name"), [*((v, n) for v in ("0.5.15", "0.5.23") for n in SCORED), *FLAT]
)
def test_replies_have_the_shape_of_recorded_ones(generate: Post, version: str, name: str) -> None:
    recorded = json.loads((RECORDED / version / f"{name}.json").read_text())
    request = recorded["request"]
    for field in ("input_ids", "token_ids_logprob"):
        if field in request:
            request[field] = within_vocabulary(request[field])
    got, wanted = shape(generate(**request)), shape(recorded["response"])
    if version == "0.5.15":  # the newer server adds a list of the weights that made the output
        for reply in got if isinstance(got, list) else [got]:
            del reply["meta_info"]["weight_versions"]
    assert got == wanted


@pytest.mark.parametrize(
    "name",
    [
        "err_bad_sampling",
        "err_bad_type",
        "err_empty_ids",
        "err_float_token",
        "err_no_input",
        "err_bad_token_ids_logprob",
        "score_start_too_big",
    ],
)
def test_refusals_have_the_shape_of_recorded_ones(url: str, call: Call, name: str) -> None:
    recorded = json.loads((RECORDED / "0.5.15" / f"{name}.json").read_text())
    request = recorded["request"]
    if isinstance(request.get("input_ids"), list) and name != "err_float_token":
        request["input_ids"] = within_vocabulary(request["input_ids"])
    status, headers, content = call(f"{url}/generate", request)
    assert (status, headers["Content-Type"].split(";")[0]) == (recorded["status"], recorded["content_type"])
    assert shape(json.loads(content)) == shape(recorded["response"])


def test_routes_answer_as_recorded(url: str, call: Call) -> None:
    for name in ("model_info", "get_model_info", "v1_models"):
        recorded = json.loads((RECORDED / "0.5.15" / f"{name}.json").read_text())
        status, _, content = call(url + recorded["path"])
        assert status == 200
        got, wanted = json.loads(content), recorded["response"]
        assert wanted.keys() <= got.keys()
        assert {k: shape(got[k]) for k in wanted} == shape(wanted)
    server_info = json.loads((RECORDED / "0.5.15" / "server_info.json").read_text())["response"]
    got = json.loads(call(f"{url}/server_info")[2])
    assert got == json.loads(call(f"{url}/get_server_info")[2])
    assert got.keys() <= server_info.keys()
    assert (got["context_length"], got["max_req_input_len"], got["status"]) == (128, 128, "ready")
    assert json.loads(call(f"{url}/v1/models")[2])["data"][0]["max_model_len"] == 128
    assert call(f"{url}/health")[::2] == (200, b"")
    assert call(f"{url}/health_generate")[::2] == (200, b"")
    assert call(f"{url}/nope")[::2] == (404, b'{"detail":"Not Found"}')
    assert call(f"{url}/generate")[::2] == (405, b'{"detail":"Method Not Allowed"}')


def test_bad_json_is_a_400(url: str, call: Call) -> None:
    for body in (b"{bad json", b"", b"[1, 2", b'{"input_ids": [NaN]}', b"\xff\xfe", b"[" * 10**5):
        status, _, content = call(f"{url}/generate", body)
        assert status == 400
        assert json.loads(content)["object"] == "error"


def test_numbers_agree_across_forms_of_asking(generate: Post) -> None:
    ids = [[5, 9, 70, 71, 72], [5, 9, 100, 3]]
    common = {
        "sampling_params": {"max_new_tokens": 0, "temperature": 0},
        "return_logprob": True,
        "top_logprobs_num": 2,
        "token_ids_logprob": [260],
    }
    whole = generate(input_ids=ids, logprob_start_len=0, **common)
    tail = generate(input_ids=ids, logprob_start_len=[1, 2], **common)
    for full, part, start in zip(whole, tail, [1, 2], strict=True):
        full, part = full["meta_info"], part["meta_info"]
        for field in ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs"):
            assert part[field][1:] == full[field][start + 1 :]
        assert part["input_top_logprobs"][0] is None and part["input_token_ids_logprobs"][0] is None
        assert part["output_top_logprobs"] == full["output_top_logprobs"]
        # A token's own log-probability, its place in the top and its place among the chosen agree.
        for triple, best in zip(
            full["input_token_logprobs"][1:], full["input_top_logprobs"][1:], strict=True
        ):
            assert triple[0] <= best[0][0]
            assert best[0][0] >= best[1][0]
            assert all(entry[0] == triple[0] for entry in best if entry[1] == triple[1])
    assert whole[0]["meta_info"]["input_token_logprobs"][0] == [None, 5, None]


def test_flat_top_lists_hold_the_numbers_of_the_nested_ones(generate: Post) -> None:
    ids, rows = [[5, 9, 70, 71, 72], [7], [5, 9, 100]], 3
    asked = {
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": 0, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": [1, 0, 3],  # some positions, only the null one, none
        "top_logprobs_num": 4,
        "return_flat_raw_top_logprobs": True,
    }
    nested = generate(**asked | {"return_flat_raw_top_logprobs": False})
    flat = generate(**asked)
    packed = generate(**asked, return_flat_raw_top_logprobs_b64=True)
    for row in range(rows):
        lists, numbers, coded = (reply[row]["meta_info"] for reply in (nested, flat, packed))
        wanted = lists.pop("input_top_logprobs")
        nulls = numbers["input_top_logprobs_null_prefix"]
        assert wanted[:nulls] == [None] * nulls and None not in wanted[nulls:]
        assert nulls == (0 if row == 2 else 1)
        assert numbers["input_top_logprobs_shape"] == [len(wanted) - nulls, 4]
        triples = [triple for distribution in wanted[nulls:] for triple in distribution]
        assert numbers["input_top_logprobs_val_flat"] == [triple[0] for triple in triples]
        assert numbers["input_top_logprobs_idx_flat"] == [triple[1] for triple in triples]
        for field, kind in (("val", "<f4"), ("idx", "<i4")):
            name = f"input_top_logprobs_{field}_flat"
            decoded = np.frombuffer(base64.b64decode(coded.pop(f"{name}_b64")), kind)
            np.testing.assert_array_equal(decoded, np.array(numbers.pop(name), kind))
            coded.pop(f"{name}_b64_dtype")
        assert shape(coded) == shape(numbers)
        assert numbers["output_top_logprobs"] == lists["output_top_logprobs"]


def test_texts_in_the_triples_are_those_of_each_token_alone(
    generate: Post, url: str, call: Call, app_parts: Any, serving: Callable[..., Any]
) -> None:
    engine, served = app_parts
    tokenizer = RawTokenizer.from_file(f"{served.path}/tokenizer.json")
    body = {
        "input_ids": [
            [5, 257, 268, 128, 271],
            [1, 2],
        ],  # a special token, half a character, padding among them
        "sampling_params": {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
        "token_ids_logprob": [260, 3],
    }
    with_text = generate(**body, return_text_in_logprobs=True)
    seen = []
    for reply, plain in zip(with_text, generate(**body), strict=True):
        for field, values in reply["meta_info"].items():
            if field.endswith("_logprobs"):
                seen += [triple for triple in triples_in(values)]
                assert [t[:2] for t in triples_in(values)] == [
                    t[:2] for t in triples_in(plain["meta_info"][field])
                ]
    assert len(seen) > 30
    for _, token, text in seen:
        assert text == tokenizer.decode([token], skip_special_tokens=False)
    with serving(make_app(engine, replace(served, token_texts=None))) as without:
        status, _, content = call(f"{without}/generate", body | {"return_text_in_logprobs": True})
    assert status == 400 and b"tokenizer.json" in content


def triples_in(value: Any) -> list[Any]:
    """Every [logprob, id, text] in a reply's list, whatever its nesting."""
    if not isinstance(value, list):
        return []
    if len(value) == 3 and type(value[1]) is int:
        return [value]
    return [triple for inner in value for triple in triples_in(inner)]


def test_generated_text_leaves_the_end_token_out(generate: Post, app_parts: Any) -> None:
    engine, served = app_parts
    (end,) = engine.stop_ids
    free = generate(input_ids=[65, 66], sampling_params={"max_new_tokens": 6, "temperature": 0})
    assert free["meta_info"]["finish_reason"] == {"type": "length", "length": 6}
    assert free["meta_info"]["completion_tokens"] == 6
    stop = free["output_ids"][1]
    params = {"max_new_tokens": 6, "temperature": 0, "stop_token_ids": [stop]}
    stopped = generate(input_ids=[65, 66], sampling_params=params)
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert stopped["output_ids"][-1] == stop
    assert served.text(np.asarray([65, end], np.int32)) == served.text(np.asarray([65], np.int32)) != ""


def test_the_api_key_opens_everything_but_health(
    app_parts: Any, serving: Callable[..., Any], call: Call
) -> None:
    with serving(make_app(*app_parts, api_key=KEY)) as url:
        for path in ("/generate", "/model_info", "/v1/models", "/nope"):
            for key in (None, "wrong", KEY + "x", KEY[:-1], "\xe4\xfc"):
                status, _, content = call(url + path, key=key)
                assert (status, content) == (401, b'{"error":"Unauthorized"}')
        assert call(f"{url}/health")[0] == 200
        assert call(f"{url}/health_generate")[0] == 200
        assert call(f"{url}/model_info", key=KEY)[0] == 200


def test_a_body_beyond_the_limit_is_refused(url: str, call: Call) -> None:
    status, _, _ = call(f"{url}/generate", b" " * (MAX_BODY_BYTES + 1))
    assert status == 413
