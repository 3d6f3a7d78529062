"""Made-up batches with every optional part, and how the tests of this folder run an objective on them.

Letters: B rows, T positions, D hidden, V vocabulary, K listed tokens.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.batch import Batch, BatchEndOfTurn, BatchProjection, BatchSharedTopK
from jaxdistill.losses import evaluate_objective, head

ROWS, LENGTH, HIDDEN, VOCAB, LISTED, TEACHER_VOCAB = 4, 10, 6, 20, 5, 24


def top_k(rng, shape, vocabulary, k=LISTED):
    """Distinct ids, descending log-probabilities with a tail; the last place of every third state unused."""
    ids = np.argsort(rng.random((*shape, vocabulary)), axis=-1)[..., :k].astype(np.int32)
    masses = np.sort(rng.dirichlet(np.ones(k + 1), shape), axis=-1)[..., ::-1][..., :k]
    logprobs = np.log(masses).astype(np.float32)
    unused = (np.arange(shape[0] * shape[1]) % 3 == 0).reshape(shape)
    ids[unused, -1], logprobs[unused, -1] = -1, -np.inf
    return ids, logprobs


def make_batch(seed: int = 0, length: int = LENGTH) -> Batch:
    """Rows of a three-token prompt and a response in chunks of two, the first token of row 0 unaligned. Some
    states have no projection, fewer are shared; row 3 of row weight 0.5."""
    rng = np.random.default_rng(seed)
    shape = (ROWS, length)
    response = np.zeros(shape, bool)
    response[:, 3:9] = True
    response[1, 7:] = False
    chunk = np.where(response, (np.arange(length)[None] - 3) // 2, -1).astype(np.int32)
    chunk[0, 3] = -1
    mask = chunk >= 0
    teacher = np.zeros(shape)
    for row in range(ROWS):
        for number in range(3):
            teacher[row, chunk[row] == number] = -1.0 - number - 0.5 * row
    ids, logprobs = top_k(rng, shape, VOCAB)
    projected = response & (rng.random(shape) < 0.8)
    theirs, their_logprobs = top_k(rng, shape, TEACHER_VOCAB)
    # Teacher ids 0 to 19 have a student token, two of them the same one; 20 and more have none.
    student_of = np.concatenate([np.arange(18), [3, 4], np.full(TEACHER_VOCAB - 20, -1)]).astype(np.int32)
    student_ids = np.where(theirs >= 0, student_of[theirs], -1).astype(np.int32)
    shared = response & (rng.random(shape) < 0.6)
    return Batch(
        tokens=rng.integers(0, VOCAB, shape).astype(np.int32),
        response_mask=response,
        loss_mask=mask,
        behavior_logprobs=np.where(response, rng.uniform(-3, -0.1, shape), 0).astype(np.float32),
        chunk_of_token=chunk,
        teacher_logprob=np.where(mask, teacher, 0).astype(np.float32),
        policy_version=np.zeros(ROWS, np.int32),
        weight=np.array([1.0, 1.0, 1.0, 0.5], np.float32),
        same_vocabulary=np.zeros(ROWS, bool),
        origin=np.zeros(ROWS, np.int32),
        reward=rng.normal(size=ROWS).astype(np.float32),
        projection=BatchProjection(
            mask=projected,
            log_support=np.where(projected, rng.uniform(-12, 0, shape), 0).astype(np.float32),
            logprob=np.where(projected, rng.uniform(-4, -0.1, shape), 0).astype(np.float32),
            floored=projected & (rng.random(shape) < 0.2),
            ids=ids,
            logprobs=logprobs,
        ),
        shared=BatchSharedTopK(mask=shared, ids=theirs, logprobs=their_logprobs, student_ids=student_ids),
        end=BatchEndOfTurn(mask=shared, logprob=rng.uniform(-6, -0.05, shape).astype(np.float32)),
    )


def weights(seed: int = 1, length: int = LENGTH):
    hidden = jax.random.normal(jax.random.key(seed), (ROWS, LENGTH, HIDDEN))
    hidden = jnp.pad(hidden, ((0, 0), (0, length - LENGTH), (0, 0)), constant_values=3.0)
    return hidden, jax.random.normal(jax.random.key(seed + 1), (VOCAB, HIDDEN))


@partial(jax.jit, static_argnums=(0, 4))
def _run(objective, batch, hidden, embedding, _tile_logits):
    def loss(h, e):
        out = evaluate_objective(objective, objective.prepare(batch), h, e)
        return out.objective.total / out.objective.weight, out

    (value, out), gradient = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, embedding)
    return value, gradient, out


def run(objective, batch, hidden, embedding):
    """The mean objective, its gradient with respect to hidden states and output matrix, and the sums it and
    its metrics are made of. One program for each objective, shape and size of tiles."""
    return _run(objective, batch, hidden, embedding, head.TILE_LOGITS)


def loss_and_gradient(objective, batch, hidden, embedding):
    return run(objective, batch, hidden, embedding)[:2]


def metrics_of(objective, batch, hidden, embedding) -> dict[str, float]:
    out = run(objective, on_device(batch), hidden, embedding)[2]
    return {name: mean.value for name, mean in out.metrics.items()}


def on_device(batch: Batch) -> Batch:
    return jax.tree.map(jnp.asarray, batch)


def student_logprobs(hidden, embedding) -> np.ndarray:
    """[B, T, V] in float64; column t is the state BEFORE token t (column 0 has none)."""
    logits = np.einsum("btd,vd->btv", np.asarray(hidden, np.float64), np.asarray(embedding, np.float64))
    logits -= logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.concatenate([np.full_like(logprobs[:, :1], np.nan), logprobs[:, :-1]], axis=1)
