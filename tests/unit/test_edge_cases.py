"""The edge cases of a response, each from its tokens through `Scoring` and `pack` to the gradient of every
objective, with real tokenizers and real projections.

The student's hidden states are fixed noise, and its rows carry exactly the log-probabilities these give, so
that no ratio is clipped: a token with a signal must learn, and nothing else may.

Letters: B rows, T positions, D hidden, V model vocabulary, K proposals.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers

from jaxdistill.batch import Batch
from jaxdistill.losses import Vocabularies, build_objective, evaluate_objective
from jaxdistill.losses.alm import ALMConfig
from jaxdistill.losses.end_of_turn import EndOfTurnConfig
from jaxdistill.losses.gkd import GKDConfig
from jaxdistill.losses.gold import GOLDConfig
from jaxdistill.losses.minillm import MiniLLMConfig
from jaxdistill.losses.registry import SINGLE
from jaxdistill.losses.reverse_kl import ReverseKLConfig
from jaxdistill.losses.sft import SFTConfig
from jaxdistill.losses.uld import ULDConfig
from jaxdistill.losses.xtoken import XTokenConfig
from jaxdistill.metrics import Stopwatch
from jaxdistill.packing import pack
from jaxdistill.records import Prompt, Rollout, TeacherScores, TokenSpans, Unscored
from jaxdistill.scoring import Scored, Scoring
from jaxdistill.teachers import Routes, TeacherIdentity, Teachers
from jaxdistill.teachers.base import carry_over
from jaxdistill.teachers.config import TeacherSettings
from jaxdistill.text import Tokenizer, concatenate
from tests.unit.text.small_tokenizers import CHATML, write

TOY = Path(__file__).parents[2] / "assets" / "toy"
ROWS, LENGTH, HIDDEN, VOCAB, TOP_K = 3, 256, 8, 709, 8
PROMPT = np.asarray([1, 2, 3], np.int32)
PARTS = frozenset({"projection", "shared", "end"})
PLAIN: Mapping[str, Any] = {"baseline": "none", "normalize": False}


def crossing(folder: Path, merges: Sequence[tuple[str, str]]) -> Tokenizer:
    """All bytes and these merges: of the letters a to f two of them share no border and no longer token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*letters, *(a + b for a, b in merges)])}
    raw = RawTokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer.load(str(write(folder, raw, CHATML, {})))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("crossing")
    return {
        "small": Tokenizer.load(str(TOY / "student")),
        "large": Tokenizer.load(str(TOY / "teacher")),
        "even": crossing(root / "even", [("a", "b"), ("c", "d"), ("e", "f")]),
        "odd": crossing(root / "odd", [("b", "c"), ("d", "e"), ("f", "a")]),
    }


class NoiseTeacher:
    """Next-token probabilities that hang on the row and the position alone; `reads` tokens of a response at
    most, and none of the rows it is to refuse."""

    name = "teacher"

    def __init__(self, tokenizer: Tokenizer, *, top_k: int, reads: int, refuses: bool):
        self.tokenizer = tokenizer
        self.identity = TeacherIdentity("teacher", "m", "t", "0", tokenizer.fingerprint, True, 10**6, (), ())
        self._top_k, self._reads, self._refuses = top_k, reads, refuses

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        views = carry_over([(r.response, r.vocabulary) for r in rollouts], self.tokenizer)
        return [self._scores(row, view) for row, view in enumerate(views)]

    def table(self, row: int, response: TokenSpans) -> np.ndarray:
        """[S + 1, V] log-probabilities; the response's own tokens are likely."""
        logits = 2 * np.random.default_rng(row).normal(size=(len(response) + 1, self.tokenizer.vocab_size))
        logits[np.arange(len(response)), response.ids] += 4
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    def _scores(self, row: int, view: TokenSpans) -> TeacherScores:
        if self._refuses:
            return TeacherScores(
                view.head(0),
                np.zeros(0, np.float32),
                self.name,
                "0",
                unscored=Unscored("too_long", "made so"),
            )
        table = self.table(row, view)
        response = view.head(self._reads)
        size = len(response)
        ids = np.argsort(-table, axis=1)[:size, : self._top_k].astype(np.int32)
        return TeacherScores(
            response,
            table[np.arange(size), response.ids].astype(np.float32),
            self.name,
            "0",
            ids,
            np.take_along_axis(table[:size], ids, axis=1).astype(np.float32),
            table[: size + 1, self.tokenizer.roles["end_of_turn"]].astype(np.float32),
        )

    def generate(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("it only scores")

    def take_counts(self) -> Mapping[str, int]:
        return {}

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Case:
    """Responses as their parts: text to be encoded, a role's name, or ids as sampled. `silent`: the teacher
    gives no signal at all."""

    responses: Sequence[Sequence[str | tuple[int, ...]]]
    student: str = "small"
    teacher: str = "large"
    finished: bool = True
    reads: int = 10**6
    refuses: bool = False
    silent: bool = False
    rows: int = ROWS


END = "end_of_turn"
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
WORDS = [["Tom has 12 apples.", END], ["12 + 30 = 42", END]]
CASES = {
    "empty response": Case([[], []], finished=False, silent=True),
    "empty beside another": Case([[], WORDS[0]]),
    "only special tokens": Case([[END], [(0,), (0,), END]]),
    "truncated": Case([["Tom has 12 apples and 1"], ["12 + 3"]], finished=False),
    "truncated inside a character": Case([["caf\u00e9"], [FAMILY]], finished=False),
    "read in part by the teacher": Case(WORDS, reads=4),
    "very long": Case([["Tom has 12 apples. " * 12]], finished=False),
    "emoji": Case([[f"{FAMILY} ok \U0001f44d\U0001f3fd!", END]]),
    "mixed scripts": Case(
        [["M\u00fcller \u4f60\u597d \u0645\u0631\u062d\u0628\u0627 \u0928\u092e e\u0301", END]]
    ),
    "code": Case([["def f(x):\n    return x**2  # \\frac{a}{b}\n\n\n\t<|im_end|>", END]]),
    "identical tokenizers": Case(WORDS, student="large"),
    "disjoint vocabularies": Case([["abcdefabcdef", END], ["fabcde", END]], student="even", teacher="odd"),
    "teacher vocabulary larger": Case(WORDS),
    "teacher vocabulary smaller": Case(WORDS, student="large", teacher="small"),
    "not the tokenizer's own cut": Case([["To", "m", " ha", "s 1", "2", END]]),
    "batch of one": Case(WORDS[:1], rows=1),
    "all rows masked": Case(WORDS, refuses=True, silent=True),
}


def spans_of(tokenizer: Tokenizer, parts: Sequence[str | tuple[int, ...]]) -> TokenSpans:
    def one(part: str | tuple[int, ...]) -> TokenSpans:
        if isinstance(part, tuple):
            return tokenizer.spans(part)
        return tokenizer.role_span(part) if part == END else tokenizer.encode(part)

    return concatenate([one(part) for part in parts]) if parts else tokenizer.spans([])


@jax.jit
def student_model() -> tuple[jax.Array, jax.Array]:
    hidden = jax.random.normal(jax.random.key(0), (ROWS, LENGTH, HIDDEN))
    return hidden, jax.random.normal(jax.random.key(1), (VOCAB, HIDDEN))


def student_logprobs() -> np.ndarray:
    """[B, T, V] in float64; column t is the state before token t (column 0 has none)."""
    hidden, embedding = (np.asarray(x, np.float64) for x in student_model())
    logits = hidden @ embedding.T
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return np.concatenate([np.full_like(logprobs[:, :1], np.nan), logprobs[:, :-1]], axis=1)


def scored(case: Case, tokenizers: Mapping[str, Tokenizer], *, top_k: int = TOP_K) -> Scored:
    """The case's responses as the student sampled them, with all the teacher says of them."""
    student, logprobs = tokenizers[case.student], student_logprobs()
    rollouts = []
    for row, parts in enumerate(case.responses):
        response = spans_of(student, parts)
        columns = len(PROMPT) + np.arange(len(response))
        rollouts.append(
            Rollout(
                prompt=Prompt([{"role": "user", "content": "hi"}], row, "test"),
                prompt_ids=PROMPT,
                response=response,
                logprobs=logprobs[row, columns, response.ids].astype(np.float32),
                finished=case.finished,
                policy_version=0,
                vocabulary=student.vocab_fingerprint,
            )
        )
    teacher = NoiseTeacher(tokenizers[case.teacher], top_k=top_k, reads=case.reads, refuses=case.refuses)
    settings = TeacherSettings(top_k=top_k, end_logprobs=True)
    teachers = Teachers([teacher], Routes([settings], seed=0))
    try:
        return Scoring(teachers, student, Stopwatch(), parts=PARTS)(rollouts)
    finally:
        teachers.close()


def packed(found: Scored, rows: int) -> Batch:
    return pack(found.rollouts, found.targets, buckets=[LENGTH], rows=rows)


@partial(jax.jit, static_argnums=0)
def loss_and_gradient(objective: Any, batch: Batch, hidden: jax.Array, embedding: jax.Array) -> Any:
    def loss(h: jax.Array, e: jax.Array) -> jax.Array:
        out = evaluate_objective(objective, objective.prepare(batch), h, e)
        return jnp.asarray(out.objective.total / out.objective.weight)

    return jax.value_and_grad(loss, (0, 1))(hidden, embedding)


def run(objective: Any, batch: Batch) -> Any:
    hidden, embedding = student_model()
    rows = batch.tokens.shape[0]
    return loss_and_gradient(objective, jax.tree.map(jnp.asarray, batch), hidden[:rows], embedding)


def still_to_come(signal: np.ndarray) -> np.ndarray:
    return np.flip(np.logical_or.accumulate(np.flip(signal, 1), axis=1), 1)


def lookahead(batch: Any) -> np.ndarray:
    """The tokens of chunks, and in rows of another vocabulary those behind one."""
    chunk = np.where(batch.loss_mask, batch.chunk_of_token, -1)
    closed = (chunk[:, :-1] >= 0) & (chunk[:, 1:] != chunk[:, :-1]) & ~batch.same_vocabulary[:, None]
    return batch.loss_mask | np.pad(closed, ((0, 0), (1, 0)))


# Each objective, and the tokens whose states must learn, and alone.
OBJECTIVES: dict[str, tuple[Any, Callable[[Batch], np.ndarray]]] = {
    "alm": (ALMConfig(), lambda b: b.loss_mask),
    "end_of_turn": (EndOfTurnConfig(), lambda b: b.end.mask),
    "gkd": (GKDConfig(), lambda b: b.projection.mask & (b.projection.log_support >= np.log(1e-3))),
    "gold": (GOLDConfig(), lambda b: b.shared.mask),
    "minillm": (MiniLLMConfig(**PLAIN, credit="projected"), lambda b: still_to_come(b.projection.mask)),
    "minillm chunk": (MiniLLMConfig(**PLAIN, credit="chunk"), lambda b: still_to_come(b.loss_mask)),
    "reverse_kl": (ReverseKLConfig(**PLAIN, credit="projected"), lambda b: b.projection.mask),
    "reverse_kl lookahead": (ReverseKLConfig(**PLAIN, credit="lookahead"), lookahead),
    "sft": (SFTConfig(), lambda b: b.response_mask),
    "uld": (ULDConfig(), lambda b: b.shared.mask),
    "xtoken": (XTokenConfig(), lambda b: b.shared.mask),
}


def test_every_objective_is_here() -> None:
    assert {config.kind for config, _ in OBJECTIVES.values()} == set(SINGLE)


@pytest.mark.parametrize("name", CASES)
def test_what_has_a_signal_learns_and_nothing_else(name: str, tokenizers: dict[str, Tokenizer]) -> None:
    case = CASES[name]
    found = scored(case, tokenizers)
    batch = packed(found, case.rows)
    vocabularies = Vocabularies(tokenizers[case.student], (tokenizers[case.teacher],))
    for label, (config, signal) in OBJECTIVES.items():
        objective = build_objective(config, vocabularies)
        value, (d_hidden, d_embedding) = run(objective, batch)
        assert all(np.isfinite(x).all() for x in (value, d_hidden, d_embedding)), label
        learning = signal(batch) & batch.response_mask & (batch.weight > 0)[:, None]
        moved = np.abs(np.asarray(d_hidden)).sum(axis=-1) > 0
        np.testing.assert_array_equal(moved[:, :-1], learning[:, 1:], err_msg=label)  # t predicts t + 1
        if case.silent and label != "sft":
            assert value == 0 and not moved.any(), label
        elif any(len(r.response) for r in found.rollouts):
            assert moved.any(), label


@pytest.mark.parametrize("name", CASES)
def test_what_the_projection_says_is_a_distribution(name: str, tokenizers: dict[str, Tokenizer]) -> None:
    case = CASES[name]
    found = scored(case, tokenizers)
    batch = packed(found, case.rows)
    projection = batch.projection
    assert projection is not None
    # Static: as many columns as the teacher was asked for and one, whatever a row has.
    assert projection.ids.shape == (case.rows, LENGTH, TOP_K + 1)
    assert found.rollouts and (projection.mask <= batch.response_mask).all()
    # Known wherever a chunk is, so at every state the teacher read the bytes around.
    np.testing.assert_array_equal(projection.mask, batch.loss_mask)
    assert (projection.logprob[projection.mask] <= 0).all()
    assert (projection.log_support <= 0).all() and not projection.log_support[~projection.mask].any()
    mass = np.exp(projection.logprobs.astype(np.float64)).sum(axis=-1)
    assert (
        (mass[projection.mask] > 0).all() and (mass <= 1 + 1e-6).all() and (mass[~projection.mask] == 0).all()
    )
    sampled = (projection.ids == batch.tokens[..., None]) & projection.mask[..., None]
    assert (sampled.sum(axis=-1) == projection.mask).all()
    np.testing.assert_array_equal(projection.logprobs[sampled], projection.logprob[projection.mask])


def test_a_batch_of_one_is_that_row_beside_padding(tokenizers: dict[str, Tokenizer]) -> None:
    case = CASES["batch of one"]
    found = scored(case, tokenizers)
    vocabularies = Vocabularies(tokenizers[case.student], (tokenizers[case.teacher],))
    for label, (config, _) in OBJECTIVES.items():
        objective = build_objective(config, vocabularies)
        one, many = (run(objective, packed(found, rows)) for rows in (1, ROWS))
        np.testing.assert_allclose(one[0], many[0], rtol=1e-5, atol=1e-7, err_msg=label)
        np.testing.assert_allclose(one[1][0], many[1][0][:1], atol=1e-6, err_msg=label)
        np.testing.assert_allclose(one[1][1], many[1][1], atol=1e-5, err_msg=label)


def test_identical_tokenizers_give_the_textbook(tokenizers: dict[str, Tokenizer]) -> None:
    """With the whole vocabulary listed each divergence is that of the two tables, position by position."""
    side = tokenizers["large"]
    assert side.vocab_size == VOCAB
    found = scored(CASES["identical tokenizers"], tokenizers, top_k=VOCAB)
    teacher = NoiseTeacher(side, top_k=0, reads=0, refuses=False)
    tables = [teacher.table(row, rollout.response)[:-1] for row, rollout in enumerate(found.rollouts)]
    mine = student_logprobs()
    states = [mine[row, len(PROMPT) :][: len(table)] for row, table in enumerate(tables)]
    log_p, log_q = np.concatenate(tables), np.concatenate(states)
    for beta, of in ((0.0, log_p), (1.0, log_q)):
        sign = 1 - 2 * beta
        wanted = (np.exp(of) * sign * (log_p - log_q)).sum(axis=1).mean()
        objective = build_objective(GKDConfig(beta=beta), Vocabularies(side, (side,)))
        np.testing.assert_allclose(run(objective, packed(found, ROWS))[0], wanted, rtol=1e-5)
