"""The genuine application on loopback: replies shaped as recorded ones, refusals, the API key."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest

from jaxdistill.serving.app import make_app
from jaxdistill.serving.model import load_engine

RECORDED = Path(__file__).parents[2] / "golden" / "sglang"
VOCABULARY = 272
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


def call(url: str, body: Any = None, *, key: str | None = None) -> tuple[int, str, bytes]:
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = Request(url, data=data, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urlopen(request, timeout=60) as response:
            return response.status, response.headers.get("Content-Type", ""), response.read()
    except HTTPError as error:
        with error:
            return error.code, error.headers.get("Content-Type", ""), error.read()


def generate(url: str, **body: Any) -> Any:
    status, _, content = call(f"{url}/generate", body)
    assert status == 200, content
    return json.loads(content)


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
    "err_bad_field",
    "err_both",
]


@pytest.mark.parametrize("version", ["0.5.15", "0.5.23"])
@pytest.mark.parametrize("name", SCORED)
def test_replies_have_the_shape_of_recorded_ones(url: str, version: str, name: str) -> None:
    recorded = json.loads((RECORDED / version / f"{name}.json").read_text())
    request = recorded["request"]
    for field in ("input_ids", "token_ids_logprob"):
        if field in request:
            request[field] = within_vocabulary(request[field])
    got, wanted = shape(generate(url, **request)), shape(recorded["response"])
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
def test_refusals_have_the_shape_of_recorded_ones(url: str, name: str) -> None:
    recorded = json.loads((RECORDED / "0.5.15" / f"{name}.json").read_text())
    request = recorded["request"]
    if isinstance(request.get("input_ids"), list) and name != "err_float_token":
        request["input_ids"] = within_vocabulary(request["input_ids"])
    status, kind, content = call(f"{url}/generate", request)
    assert (status, kind.split(";")[0]) == (recorded["status"], recorded["content_type"])
    assert shape(json.loads(content)) == shape(recorded["response"])


def test_routes_answer_as_recorded(url: str) -> None:
    for name in ("model_info", "get_model_info", "v1_models"):
        recorded = json.loads((RECORDED / "0.5.15" / f"{name}.json").read_text())
        status, _, content = call(url + recorded["path"])
        assert status == 200
        got, wanted = json.loads(content), recorded["response"]
        assert wanted.keys() <= got.keys()
        assert {k: shape(got[k]) for k in wanted} == shape(wanted)
    assert json.loads(call(f"{url}/v1/models")[2])["data"][0]["max_model_len"] == 128
    assert call(f"{url}/health")[::2] == (200, b"")
    assert call(f"{url}/health_generate")[::2] == (200, b"")
    assert call(f"{url}/nope")[::2] == (404, b'{"detail":"Not Found"}')
    assert call(f"{url}/generate")[::2] == (405, b'{"detail":"Method Not Allowed"}')


def test_bad_json_is_a_400(url: str) -> None:
    for body in (b"{bad json", b"", b"[1, 2", b'{"input_ids": [NaN]}', b"\xff\xfe"):
        status, _, content = call(f"{url}/generate", body)
        assert status == 400
        assert json.loads(content)["object"] == "error"


def test_numbers_agree_across_forms_of_asking(url: str) -> None:
    ids = [[5, 9, 70, 71, 72], [5, 9, 100, 3]]
    common = {
        "sampling_params": {"max_new_tokens": 0, "temperature": 0},
        "return_logprob": True,
        "top_logprobs_num": 2,
        "token_ids_logprob": [260],
    }
    whole = generate(url, input_ids=ids, logprob_start_len=0, **common)
    tail = generate(url, input_ids=ids, logprob_start_len=[1, 2], **common)
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


def test_generated_text_leaves_the_end_token_out(url: str, app_parts: Any) -> None:
    engine, served = app_parts
    (end,) = engine.stop_ids
    free = generate(url, input_ids=[65, 66], sampling_params={"max_new_tokens": 6, "temperature": 0})
    assert free["meta_info"]["finish_reason"] == {"type": "length", "length": 6}
    assert free["meta_info"]["completion_tokens"] == 6
    stop = free["output_ids"][1]
    params = {"max_new_tokens": 6, "temperature": 0, "stop_token_ids": [stop]}
    stopped = generate(url, input_ids=[65, 66], sampling_params=params)
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert stopped["output_ids"][-1] == stop
    assert served.text(np.asarray([65, end], np.int32)) == served.text(np.asarray([65], np.int32)) != ""


def test_the_api_key_opens_everything_but_health(app_parts: Any, serving: Callable[..., Any]) -> None:
    with serving(make_app(*app_parts, api_key=KEY)) as url:
        for path in ("/generate", "/model_info", "/v1/models", "/nope"):
            for key in (None, "wrong", KEY + "x", KEY[:-1], "\xe4\xfc"):
                status, _, content = call(url + path, key=key)
                assert (status, content) == (401, b'{"error":"Unauthorized"}')
        assert call(f"{url}/health")[0] == 200
        assert call(f"{url}/health_generate")[0] == 200
        assert call(f"{url}/model_info", key=KEY)[0] == 200


def test_a_body_beyond_the_limit_is_refused(url: str) -> None:
    status, _, _ = call(f"{url}/generate", b" " * (65 * 2**20))
    assert status == 413
