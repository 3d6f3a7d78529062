"""What objectives ask of a run, what they refuse, and whose rows they learn from."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from jaxdistill.errors import ConfigError
from jaxdistill.losses import Vocabularies, build_objective
from jaxdistill.losses.end_of_turn import EndOfTurnConfig
from jaxdistill.losses.gkd import GKD, GKDConfig
from jaxdistill.losses.minillm import MiniLLM, MiniLLMConfig
from jaxdistill.losses.reverse_kl import ReverseKL, ReverseKLConfig
from jaxdistill.losses.sft import SFT, SFTConfig
from jaxdistill.losses.sum import Sum, SumConfig, TermConfig
from jaxdistill.losses.xtoken import XTokenConfig, first_teacher_tokens
from jaxdistill.text import Tokenizer
from tests.unit.losses.batches import loss_and_gradient, make_batch, on_device, weights

TOY = Path(__file__).parents[3] / "assets" / "toy"


@pytest.fixture(scope="module")
def student() -> Tokenizer:
    return Tokenizer.load(str(TOY / "student"))


@pytest.fixture(scope="module")
def teacher() -> Tokenizer:
    return Tokenizer.load(str(TOY / "teacher"))


def moved_rows(objective, batch):
    hidden, embedding = weights()
    _, (d_hidden, _) = loss_and_gradient(objective, on_device(batch), hidden, embedding)
    return (np.abs(np.asarray(d_hidden)).sum((1, 2)) > 0).tolist()


@pytest.mark.parametrize(
    "objective",
    [
        ReverseKL(ReverseKLConfig(credit="projected", baseline="none", reward_coefficient=1.0)),
        MiniLLM(MiniLLMConfig(credit="projected", baseline="none")),
    ],
    ids=["reverse_kl", "minillm"],
)
def test_a_policy_gradient_learns_from_the_students_rows_alone(objective):
    batch = replace(make_batch(), origin=np.array([0, 1, 2, 0], np.int32))
    assert moved_rows(objective, batch) == [True, False, False, True]


def test_a_term_keeps_to_its_rows():
    batch = replace(make_batch(), origin=np.array([0, 1, 2, 0], np.int32))
    term = TermConfig(objective=SFTConfig(), rows=("reference", "teacher"))
    objective = Sum(SumConfig(terms=(term,)), (SFT(SFTConfig()),))
    assert moved_rows(objective, batch) == [False, True, True, False]
    kept = replace(batch, weight=np.where(np.isin(batch.origin, (1, 2)), batch.weight, 0).astype(np.float32))
    alone = loss_and_gradient(SFT(SFTConfig()), on_device(kept), *weights())[0]
    np.testing.assert_allclose(
        loss_and_gradient(objective, on_device(batch), *weights())[0], alone, rtol=1e-6
    )


def test_auto_becomes_projected_with_top_k_and_a_chunk_rule_without():
    for config, without in ((ReverseKLConfig(), "lookahead"), (MiniLLMConfig(), "chunk")):
        assert config.resolved(top_k=True).credit == "projected"
        assert config.resolved(top_k=True).needs == {"projection"}
        assert config.resolved(top_k=False).credit == without
        assert config.resolved(top_k=False).needs == frozenset()
    chosen = ReverseKLConfig(credit="broadcast", importance="clip")
    assert chosen.resolved(top_k=True) == chosen
    with pytest.raises(ValueError, match="still auto"):
        ReverseKL(ReverseKLConfig()).prepare(on_device(make_batch()))


def test_exact_chunks_are_never_silently_given_up_for_the_projection():
    for cls, on_chunks in ((ReverseKLConfig, "lookahead"), (MiniLLMConfig, "chunk")):
        resolved = cls(signal="exact").resolved(top_k=True)
        assert resolved.credit == on_chunks and resolved.needs == frozenset()


def test_a_sum_asks_for_what_its_terms_ask_for():
    terms = (
        TermConfig(objective=ReverseKLConfig()),
        TermConfig(objective=EndOfTurnConfig()),
        TermConfig(objective=SFTConfig()),
    )
    config = SumConfig(terms=terms).resolved(top_k=True)
    assert config.needs == {"projection", "end"}
    assert config.needs_teacher
    assert config.reads_chunks is False
    for name in ("temperature", "top_k"):
        with pytest.raises(ValueError, match=f"rollout.{name}=0.7.*temperature_mismatch"):
            config.check_sampling({name: 0.7})
    config.check_sampling({})
    off = SumConfig(terms=(TermConfig(objective=SFTConfig()),))
    assert not off.needs_teacher


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GKDConfig(seq_kd=True), "lmbda"),
        (lambda: MiniLLMConfig(credit="chunk", single_step=True), "single_step"),
        (lambda: MiniLLMConfig(single_step=True).resolved(top_k=False), "single_step"),
        (lambda: SumConfig(terms=(TermConfig(objective=SFTConfig()),) * 2), "name"),
        (lambda: TermConfig(objective=ReverseKLConfig(), rows=("reference",)), "student"),
        (lambda: SumConfig(terms=(TermConfig(objective=ReverseKLConfig(signal="exact")),)), "signal"),
        (lambda: SumConfig(terms=()), "terms"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(build, message):
    with pytest.raises(ValidationError, match=message):
        build()


def test_an_objective_says_which_part_of_the_batch_it_misses():
    batch = on_device(replace(make_batch(), projection=None))
    with pytest.raises(ValueError, match="projection"):
        GKD(GKDConfig()).prepare(batch)


def test_each_student_token_goes_to_the_beginning_of_its_bytes(student, teacher):
    first = first_teacher_tokens(student, teacher)
    pieces, theirs = (
        student.token_bytes(range(student.vocab_size)),
        teacher.token_bytes(range(teacher.vocab_size)),
    )
    for index, piece in enumerate(pieces):
        if piece:
            assert first[index] == teacher.encode(piece).ids[0]
            assert theirs[first[index]] and piece.startswith(theirs[first[index]])
    assert first[student.roles["end_of_turn"]] == teacher.roles["end_of_turn"]


def test_a_vocabulary_onto_itself_is_the_identity(student):
    """Special tokens, and tokens that are not the encoding of their own bytes, among them."""
    pieces = student.token_bytes(range(student.vocab_size))
    assert any(student.encode(piece).ids[0] != i for i, piece in enumerate(pieces) if piece)
    np.testing.assert_array_equal(first_teacher_tokens(student, student), np.arange(student.vocab_size))


def test_xtoken_refuses_two_vocabularies_and_end_of_turn_finds_its_token(student, teacher):
    with pytest.raises(ConfigError, match="2 different"):
        build_objective(XTokenConfig(), Vocabularies(student, (teacher, student)))
    built = build_objective(XTokenConfig(), Vocabularies(student, (teacher, teacher)))
    assert built.teacher_size == teacher.vocab_size
    assert build_objective(EndOfTurnConfig(), Vocabularies(student, ())).end == student.roles["end_of_turn"]
