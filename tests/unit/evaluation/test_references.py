"""Reference responses: the student's pass against a plain forward, and the figures against sums by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdistill.align import align, project
from jaxdistill.evaluation.references import References, StudentLogprobs, reference_figures
from jaxdistill.metrics import Stopwatch
from jaxdistill.parallel import MeshConfig, make_mesh
from jaxdistill.records import END_OF_TURN, ROLES, Prompt, Rollout, TeacherScores, TokenSpans, Unscored
from jaxdistill.scoring import Scored, Scoring
from jaxdistill.students import Decoder, parse_config
from jaxdistill.teachers import EmbeddedConfig, Routes, Teachers
from jaxdistill.text import Tokenizer

CONFIG = parse_config(
    {
        "model_type": "qwen3",
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 64,
    },
    where="the test",
)
PROMPT = Prompt([{"role": "user", "content": "hi"}], 0, "test")


def spans(pieces: list[bytes | int], ids: list[int] | None = None) -> TokenSpans:
    """Bytes are content, a number is a role token of that role."""
    data = b"".join(p for p in pieces if isinstance(p, bytes))
    sizes = [len(p) if isinstance(p, bytes) else 0 for p in pieces]
    roles = [0 if isinstance(p, bytes) else p for p in pieces]
    numbers = np.arange(len(pieces)) if ids is None else np.array(ids)
    ends = np.cumsum(sizes, dtype=np.int64)
    return TokenSpans(numbers.astype(np.int32), data, ends, np.array(roles, np.int8))


def rollout(pieces: list[bytes | int], logprobs: list[float], prompt_ids=(1,), ids=None) -> Rollout:
    return Rollout(
        PROMPT,
        np.array(prompt_ids, np.int32),
        spans(pieces, ids),
        np.array(logprobs, np.float32),
        True,
        0,
        vocabulary="a",
    )


def scored(rollouts: list[Rollout], scores: list[TeacherScores]) -> Scored:
    alignments = [align(r.response, s.response) for r, s in zip(rollouts, scores, strict=True)]
    targets = [project(s, a, signal="chunk") for s, a in zip(scores, alignments, strict=True)]
    return Scored(rollouts, scores, alignments, targets)


def teacher(pieces: list[bytes | int], logprobs: list[float], unscored: Unscored | None = None):
    return TeacherScores(spans(pieces), np.array(logprobs, np.float32), "t", "w", unscored=unscored)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_the_student_s_pass_is_the_plain_forward_whatever_the_groups(group):
    decoder = Decoder(CONFIG, rngs=nnx.Rngs(0))
    graphdef, variables = nnx.split(decoder, nnx.Param)
    prompts = [[5, 6, 7], [8], [9, 10]]
    responses = [[11, 12, 13, 3], [14, 3], [15]]
    rows = [
        rollout([b"x"] * len(ids), [0.0] * len(ids), prompt_ids, ids)
        for prompt_ids, ids in zip(prompts, responses, strict=True)
    ]
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1))
    found = StudentLogprobs(graphdef, mesh, [4, 8], group)(nnx.to_pure_dict(variables), rows)
    for row, prompt_ids, ids in zip(found, prompts, responses, strict=True):
        hidden = np.asarray(decoder(jnp.asarray([prompt_ids + ids])))[0]
        logits = (hidden @ np.asarray(decoder.output_embedding).T).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        expected = [logprobs[len(prompt_ids) - 1 + i, token] for i, token in enumerate(ids)]
        np.testing.assert_allclose(row.logprobs, expected, atol=1e-5)


def test_bits_and_the_gap_by_hand():
    one = rollout([b"1", b"0", b" eggs", 1], [-0.1, -0.2, -0.3, -0.4])
    two = rollout([b"yes", 1], [-2.0, -1.0])
    pair = scored(
        [one, two], [teacher([b"10", b" eggs", 1], [-0.5, -0.25, -0.25]), teacher([b"yes", 1], [-1, 0])]
    )
    values = {name: mean.value for name, mean in reference_figures([one, two], pair).items()}
    assert values["student_bits_per_byte"] == pytest.approx(2.6 / np.log(2) / 10)
    assert values["student_end_logprob"] == pytest.approx(-1.4 / 2)
    assert values["teacher_bits_per_byte"] == pytest.approx(1.75 / np.log(2) / 10)
    assert values["teacher_end_logprob"] == pytest.approx(-0.25 / 2)
    assert values["cross_entropy_gap_per_byte"] == pytest.approx((-2.0 + 4.0) / 10)
    alone = reference_figures([one, two], None)
    assert {name: mean.value for name, mean in alone.items()} == {
        name: values[name] for name in ("student_bits_per_byte", "student_end_logprob")
    }


def test_references_without_an_end_of_turn_have_no_figure_for_it():
    values = reference_figures([rollout([b"yes"], [-2.0])], None)
    assert {name: mean.value for name, mean in values.items()} == {
        "student_bits_per_byte": pytest.approx(2.0 / np.log(2) / 3)
    }


def test_a_token_of_another_role_is_neither_text_nor_an_end():
    values = reference_figures(
        [rollout([ROLES["think_open"], b"yes", END_OF_TURN], [-7.0, -2.0, -1.0])], None
    )
    assert values["student_bits_per_byte"].value == pytest.approx(2.0 / np.log(2) / 3)
    assert values["student_end_logprob"].value == pytest.approx(-1.0)


def test_the_gap_on_the_teacher_s_own_texts_is_the_forward_kl():
    """Eight one-byte texts with exactly the teacher's shares: the sampled mean is the expectation."""
    p_t, p_s = np.array([0.5, 0.25, 0.25]), np.array([0.2, 0.7, 0.1])
    texts = [0, 0, 0, 0, 1, 1, 2, 2]
    letters = [b"a", b"b", b"c"]
    rows = [rollout([letters[i]], [np.log(p_s[i])]) for i in texts]
    pair = scored(rows, [teacher([letters[i]], [np.log(p_t[i])]) for i in texts])
    gap = reference_figures(rows, pair)["cross_entropy_gap_per_byte"].value
    assert gap == pytest.approx(float((p_t * np.log(p_t / p_s)).sum()), abs=1e-6)


def test_what_the_teacher_did_not_score_is_in_neither_its_bits_nor_the_gap():
    one, lost = rollout([b"yes", 1], [-2.0, -1.0]), rollout([b"no", 1], [-9.0, -9.0])
    whole = scored([one], [teacher([b"yes", 1], [-1, -0.5])])
    reason = Unscored("too_long", "row too long")
    with_lost = scored([one, lost], [whole.scores[0], teacher([], [], reason)])
    expected, values = reference_figures([one], whole), reference_figures([one, lost], with_lost)
    for name in ("teacher_bits_per_byte", "cross_entropy_gap_per_byte"):
        assert values[name] == expected[name]
    assert values["student_bits_per_byte"].value == pytest.approx(11 / np.log(2) / 5)


class FixedStudent(StudentLogprobs):
    """Its weights are the first token's log-probability."""

    def __init__(self):
        pass

    def __call__(self, params, rollouts):
        return [rollout([b"yes", 1], [params, -1.0]) for _ in rollouts]


class CountingTeachers(Teachers):
    """Know one text; count how often they are asked."""

    asked = 0

    def __init__(self):
        super().__init__([], Routes([EmbeddedConfig(name="t", model="m")], seed=0))

    def score(self, rollouts):
        CountingTeachers.asked += 1
        return [teacher([b"yes", 1], [-1.0, -0.5]) for _ in rollouts]

    def same_vocabulary(self, rollout, scores):
        return False

    def check_share(self, scores):
        assert len(scores) == 1


def test_the_teachers_are_asked_once_and_the_student_each_time():
    teachers = CountingTeachers()
    scoring = Scoring(teachers, Tokenizer.load("assets/toy/student"), Stopwatch())
    references = References([rollout([b"yes", 1], [0.0, 0.0])], FixedStudent(), scoring)
    gaps = [references(params)["cross_entropy_gap_per_byte"].value for params in (-1.0, -2.0)]
    assert teachers.asked == 1
    assert gaps == [pytest.approx(0.5 / 3), pytest.approx(1.5 / 3)]
