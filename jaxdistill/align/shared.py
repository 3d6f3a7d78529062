"""The teacher's own words where both sides have read exactly the same bytes: its top-k, its end of turn.

Letters: R student tokens, S teacher tokens, K proposals, V teacher vocabulary ids.
"""

import numpy as np
from jaxtyping import Int32

from jaxdistill.errors import TeacherContractError
from jaxdistill.records import ROLE_NAMES, Alignment, EndOfTurn, SharedTopK, TeacherScores
from jaxdistill.text import Tokenizer


def matching_ids(student: Tokenizer, teacher: Tokenizer) -> Int32[np.ndarray, " V"]:
    """For each teacher id the student's id of the same bytes, or of the same role; -1 where there is none.

    Of several ids with the same bytes the lowest is taken. Equal vocabularies give each id itself."""
    every = np.arange(teacher.vocab_size, dtype=np.int32)
    if student.vocab_fingerprint == teacher.vocab_fingerprint:
        return every
    own: dict[bytes, int] = {}
    for index, piece in enumerate(student.token_bytes(np.arange(student.vocab_size, dtype=np.int32))):
        if piece:
            own.setdefault(piece, index)
    found = np.asarray([own.get(piece, -1) for piece in teacher.token_bytes(every)], np.int32)
    roles = teacher.spans(every).roles
    for index in np.flatnonzero(roles).tolist():
        found[index] = student.roles.get(ROLE_NAMES.get(int(roles[index]), ""), -1)
    return found


def shared_topk(
    scores: TeacherScores, alignment: Alignment, matches: Int32[np.ndarray, " V"], columns: int
) -> SharedTopK:
    """The teacher's top-k, with the token it then read, at each student state whose bytes it has read too.

    `matches` is `matching_ids` of the pair. The result has `columns` columns, at least one more than the
    teacher's k. Raises TeacherContractError for scores without top-k.
    """
    count = len(alignment.shared_prefix)
    shape = (count, columns)
    ids, logprobs = np.full(shape, -1, np.int32), np.full(shape, -np.inf, np.float32)
    mask = alignment.shared_prefix >= 0
    if mask.any():
        if scores.topk_ids is None or scores.topk_logprobs is None:
            raise TeacherContractError(
                f"teacher {scores.teacher!r} gave no top-k, and the objective reads it; set teacher.top_k"
            )
        at = alignment.shared_prefix[mask]
        k = scores.topk_ids.shape[1]
        top, read = scores.topk_ids[at], scores.response.ids[at]
        ids[mask, :k], logprobs[mask, :k] = top, np.where(top < 0, -np.inf, scores.topk_logprobs[at])
        rows = np.flatnonzero(mask)[~(top == read[:, None]).any(axis=1)]
        missing = alignment.shared_prefix[rows]
        ids[rows, -1], logprobs[rows, -1] = scores.response.ids[missing], scores.logprobs[missing]
    return SharedTopK(mask, ids, logprobs, np.where(ids < 0, -1, matches[ids]).astype(np.int32))


def end_of_turn(scores: TeacherScores, alignment: Alignment) -> EndOfTurn:
    """The teacher's log-probability of ending the turn at each student state whose bytes it has read too.

    Raises TeacherContractError for scores without it."""
    mask = alignment.shared_prefix >= 0
    logprob = np.zeros(len(mask), np.float32)
    if mask.any():
        if scores.end_logprobs is None:
            raise TeacherContractError(
                f"teacher {scores.teacher!r} gave no log-probabilities of the end of turn, and the objective "
                "reads them; set teacher.end_logprobs=true"
            )
        logprob[mask] = scores.end_logprobs[alignment.shared_prefix[mask]]
    return EndOfTurn(mask, logprob)
