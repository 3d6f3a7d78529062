"""Stop strings in rows that grow by segments."""

from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from jaxdistill.parallel import MeshConfig, make_mesh
from jaxdistill.records import Prompt
from jaxdistill.samplers import LocalSampler, RolloutConfig, StopStrings
from jaxdistill.students import load_decoder
from jaxdistill.text import Tokenizer

TOY = Path(__file__).parents[3] / "assets" / "toy" / "student"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(str(TOY))


def first_end(tokenizer, ids, strings):
    """How many tokens until the bytes so far hold a string, by looking at every beginning."""
    for count in range(1, len(ids) + 1):
        data = b"".join(tokenizer.token_bytes(ids[:count]))
        if any(string.encode() in data for string in strings):
            return count
    return None


@given(data=st.data())
def test_a_response_ends_with_the_token_that_completes_a_string(tokenizer, data):
    ids = np.array(data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=40)))
    ids = ids.astype(np.int32)
    text = b"".join(tokenizer.token_bytes(ids)).decode("utf-8", "ignore")
    strings = data.draw(st.lists(st.text(min_size=1, max_size=3), max_size=2))
    if text:
        at = data.draw(st.integers(0, len(text) - 1))
        strings = [*strings, text[at : at + data.draw(st.integers(1, 6))]]
    stops, segment = StopStrings(strings, tokenizer), data.draw(st.integers(1, 9))
    found = None
    for start in range(0, len(ids), segment):
        cut = stops(7, ids[start : start + segment])
        assert stops(8, ids[:0]) is None  # another row, which has nothing
        if cut is not None:
            found = start + cut
            break
    assert found == first_end(tokenizer, ids, strings)


def test_the_samplers_responses_end_there_and_are_the_same_until_then(tokenizer):
    mesh = make_mesh(MeshConfig())
    graphdef, params = nnx.split(load_decoder(TOY, mesh=mesh), nnx.Param)
    prompt = Prompt([{"role": "user", "content": "12 + 30?"}], 0, "test")

    def sample(stop):
        config = RolloutConfig(max_prompt_tokens=32, max_new_tokens=24, stop=stop)
        sampler = LocalSampler(graphdef, tokenizer, config, mesh, seed=0)
        sampler.push(nnx.to_pure_dict(params), 3)
        return sampler.sample([prompt], 3, samples=8)

    strings = ("1", "2 ")
    cut = 0
    for free, ended in zip(sample(()), sample(strings), strict=True):
        end = first_end(tokenizer, free.response.ids, strings)
        cut += end is not None and end < len(free.response)
        assert ended.finished == (free.finished or end is not None)
        np.testing.assert_array_equal(ended.response.ids, free.response.ids[:end])
        for name in ("logprobs", "model_logprobs"):
            np.testing.assert_array_equal(getattr(ended, name), getattr(free, name)[:end])
    assert cut > 2


def test_a_prompt_that_comes_twice_goes_on_with_later_samples(tokenizer):
    mesh = make_mesh(MeshConfig())
    graphdef, params = nnx.split(load_decoder(TOY, mesh=mesh), nnx.Param)
    one, other = (Prompt([{"role": "user", "content": text}], i, "test") for i, text in enumerate("12"))
    config = RolloutConfig(max_prompt_tokens=32, max_new_tokens=8)
    sampler = LocalSampler(graphdef, tokenizer, config, mesh, seed=2**32 - 1)  # the largest seed there is
    sampler.push(nnx.to_pure_dict(params), 0)
    four = sampler.sample([one], 5, samples=4)
    twice = sampler.sample([one, other, one], 5, samples=2)
    for expected, found in zip(four, [*twice[:2], *twice[4:]], strict=True):
        np.testing.assert_array_equal(found.response.ids, expected.response.ids)


def test_an_empty_string_is_refused(tokenizer):
    with pytest.raises(ValueError, match="empty stop string"):
        StopStrings(["a", ""], tokenizer)
    with pytest.raises(ValidationError, match="empty stop string"):
        RolloutConfig(stop=("",))
