"""A genuine server that answers prompts, beside `jaxdistill.serve` of the same model."""

import pytest

from jaxdistill.data import read_prompts
from jaxdistill.teachers import SGLangConfig, SGLangTeacher
from jaxdistill.teachers.generation import Written

from .conftest import ROOT, Server

pytestmark = pytest.mark.live


def answers(server: Server, *, temperature: float, max_new_tokens: int = 40) -> list[Written]:
    """What the served model writes to twelve prompts, several rows a request."""
    prompts = read_prompts(ROOT / "assets/toy/heldout.jsonl")[:12]
    config = SGLangConfig(endpoint=server.url, tokenizer=str(server.folder), max_tokens_per_request=400)
    teacher = SGLangTeacher(config, config.load_tokenizer())
    try:
        teacher.check()
        found = teacher.generate(prompts, range(12), max_new_tokens=max_new_tokens, temperature=temperature)
        written = [one for one in found if isinstance(one, Written)]
        assert len(written) == len(found)
        return written
    finally:
        teacher.close()


def test_the_most_likely_answers_are_those_of_our_own_server(genuine: Server, ours: Server) -> None:
    """The canary goes with every request there too; the ids hold the end of turn."""
    theirs, own = answers(genuine, temperature=0.0), answers(ours, temperature=0.0)
    # float32 on both sides differs in the last digits: a near tie may fall the other way, in one of twelve.
    same = [a.response.ids.tolist() == b.response.ids.tolist() for a, b in zip(theirs, own, strict=True)]
    assert sum(same) >= 11
    assert [one.finished for one in theirs] == [one.finished for one in own]
    for one in theirs:
        assert len(one.response) <= 40
        assert one.finished == bool(one.response.roles[-1] == 1)
    cut = answers(genuine, temperature=0.0, max_new_tokens=3)
    for short, whole in zip(cut, theirs, strict=True):
        assert short.response.ids.tolist() == whole.response.ids.tolist()[:3]
        assert short.finished == (len(whole.response) <= 3)


def test_a_temperature_makes_other_answers(genuine: Server) -> None:
    # The toy teacher is so sure that at 1.5 it may well write what it finds likeliest, twelve times.
    warm, greedy = answers(genuine, temperature=20.0), answers(genuine, temperature=0.0)
    assert [a.response.ids.tolist() for a in warm] != [b.response.ids.tolist() for b in greedy]
