"""Teacher scores in student coordinates.

Letters: R student tokens, S teacher tokens, C chunks.
"""

import numpy as np

from jaxdistill.errors import AlignmentError, TeacherContractError
from jaxdistill.records import Alignment, Signal, Targets, TeacherScores


def _check(scores: TeacherScores, alignment: Alignment) -> None:
    count = len(scores.response)
    if len(scores.logprobs) != count:
        raise TeacherContractError(
            f"teacher {scores.teacher!r} gave {len(scores.logprobs)} log-probabilities for {count} response "
            "tokens; expected one for each"
        )
    if len(alignment.teacher_chunk) != count:
        raise AlignmentError(
            f"the alignment has {len(alignment.teacher_chunk)} teacher tokens, the scores of "
            f"{scores.teacher!r} have {count}; project the scores with the alignment of the same response"
        )
    bad = np.flatnonzero(~np.isfinite(scores.logprobs))
    if len(bad):
        raise TeacherContractError(
            f"teacher {scores.teacher!r}: {len(bad)} of {count} log-probabilities are not finite (first: "
            f"{scores.logprobs[bad[0]]} at response token {bad[0]}, id {scores.response.ids[bad[0]]}); "
            "its answer must not be trained on"
        )


def project(scores: TeacherScores, alignment: Alignment, *, signal: Signal) -> Targets:
    """Gives each student token the teacher's total log-probability (nats) of the chunk it lies in.

    `signal="chunk"` uses every chunk; `"exact"` only those of one student and one teacher token: all other
    tokens lose their chunk and their signal. Where `mask` is false `teacher_logprob` is 0.

    `stats` count what has a signal: student_tokens, aligned_tokens, exact_tokens (one-to-one, whatever the
    signal), bytes, aligned_bytes, chunks, teacher_logprob_total. `bytes` are the student's; for a response
    without any aligned byte they are taken from the teacher's side, which encodes the same content.

    Raises TeacherContractError for a wrong number of log-probabilities or one that is not finite,
    AlignmentError for the alignment of another response.
    """
    _check(scores, alignment)
    on_teacher = alignment.teacher_chunk >= 0
    owner = alignment.teacher_chunk[on_teacher]
    # Chunks can be long; float64 keeps a sum of thousands of terms exact to float32.
    totals = np.bincount(owner, weights=scores.logprobs[on_teacher], minlength=alignment.num_chunks)
    sizes = np.diff(scores.response.ends, prepend=0)
    chunk_bytes = np.bincount(owner, weights=sizes[on_teacher], minlength=alignment.num_chunks)
    aligned = alignment.student_chunk >= 0
    exact = np.zeros(len(aligned), bool)
    exact[aligned] = alignment.exact[alignment.student_chunk[aligned]]
    kept = alignment.exact if signal == "exact" else np.ones(alignment.num_chunks, bool)
    mask = exact if signal == "exact" else aligned
    chunk_of_token = np.where(mask, alignment.student_chunk, -1).astype(np.int32)
    teacher_logprob = np.zeros(len(mask), np.float32)
    teacher_logprob[mask] = totals[chunk_of_token[mask]]
    agreeing = chunk_bytes.sum()
    total_bytes = round(agreeing / alignment.coverage) if agreeing else _unaligned_bytes(scores, alignment)
    stats = {
        "student_tokens": float(len(mask)),
        "aligned_tokens": float(mask.sum()),
        "exact_tokens": float(exact.sum()),
        "bytes": float(total_bytes),
        "aligned_bytes": float(chunk_bytes[kept].sum()),
        "chunks": float(kept.sum()),
        "teacher_logprob_total": float(totals[kept].sum()),
    }
    return Targets(chunk_of_token, teacher_logprob, mask, stats)


def _unaligned_bytes(scores: TeacherScores, alignment: Alignment) -> int:
    # Coverage 1 without an aligned byte means that the student wrote none.
    return 0 if alignment.coverage == 1.0 else len(scores.response.data)
