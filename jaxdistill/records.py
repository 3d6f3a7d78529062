"""Host records: what travels between the rooms before anything reaches a device. numpy only.

Letters: P prompt tokens, R student response tokens, S teacher response tokens, C chunks, K top-k,
N tokens of either side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int8, Int32, Int64

# Numbers of the roles a token can play; 0 is plain content. Both sides use the same numbers, so a
# role aligns by meaning although each tokenizer has its own id for it. Numbers are never reused.
CONTENT = 0
ROLES: Mapping[str, int] = {
    "end_of_turn": 1,
    "think_open": 2,
    "think_close": 3,
    "tool_open": 4,  # before one tool call
    "tool_close": 5,
    "tool_list_open": 6,  # before all tool calls of a turn, where a family marks that apart
    "tool_list_close": 7,
    "tool_argument": 8,  # between a tool's name and its arguments
    "tool_result_open": 9,  # before the output of one tool; a model may write it too, mistakenly
    "tool_result_close": 10,
    "end_of_call": 11,  # ends a turn that waits for a tool, where that is not the end of turn
}
ROLE_NAMES: Mapping[int, str] = {number: name for name, number in ROLES.items()}
OTHER_SPECIAL = 127  # a special token no role is known for: carries no bytes and never aligns
END_OF_TURN = ROLES["end_of_turn"]

# Who wrote a response: the student now, a reference of the data, or the teacher.
Origin = Literal["student", "reference", "teacher"]
ORIGINS: Mapping[Origin, int] = {"student": 0, "reference": 1, "teacher": 2}

Signal = Literal["chunk", "exact"]  # which chunks carry the teacher's signal: all, or one-to-one alone

Part = Literal["projection", "shared", "end"]  # of `Targets`, built where an objective reads it

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}, as chat templates read it


@dataclass(frozen=True)
class Prompt:
    """One row of the data: a chat that ends before the assistant's turn.

    `index` is the row's place in its source and seeds its samples; `place` says to people where it stands
    (a file and a line), and is no part of what the row is. `answer` is what a scorer compares with;
    `response` is the assistant's turn that follows in the data, which `sft` trains on. `tools` are the tool
    descriptions both templates are given. `metadata` is whatever else a row says for its scorer; nothing else
    reads it.
    """

    messages: Sequence[Message]
    index: int
    source: str
    answer: str | None = None
    response: Message | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    metadata: Mapping[str, Any] | None = None
    place: str = field(default="", compare=False)

    @property
    def where(self) -> str:
        """The row's name in messages."""
        return self.place or f"{self.source} row {self.index}"


@dataclass(frozen=True)
class TokenSpans:
    """Tokens beside the bytes they stand for. Token i covers `data[ends[i-1]:ends[i]]`.

    A role token (`roles[i] != 0`) carries no content bytes: its span is empty.
    """

    ids: Int32[np.ndarray, " N"]
    data: bytes
    ends: Int64[np.ndarray, " N"]
    roles: Int8[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def starts(self) -> Int64[np.ndarray, " N"]:
        """Byte offset at which each token begins."""
        return np.concatenate([np.zeros(1, np.int64), self.ends])[: len(self.ends)]

    def head(self, count: int) -> "TokenSpans":
        """The first `count` tokens with their bytes; itself where that is all of them."""
        if count >= len(self):
            return self
        size = int(self.ends[count - 1]) if count else 0
        return TokenSpans(self.ids[:count], self.data[:size], self.ends[:count], self.roles[:count])

    @property
    def text(self) -> str:
        """The content as text, for people: bytes that are not UTF-8 show as U+FFFD."""
        return self.data.decode("utf-8", errors="replace")


@dataclass(frozen=True)
class Unscored:
    """Why a response has no scores, or the teacher wrote none: the row was longer than the teacher reads, the
    reply for it must not be believed, or a replay does not hold it. `detail` is for people."""

    kind: Literal["too_long", "bad_reply", "not_recorded"]
    detail: str


@dataclass(frozen=True)
class Rollout:
    """A response the student sampled, or a reference in its place. Its ids are kept for ever; nothing
    re-tokenises its text.

    `logprobs` are natural logs of the probability each token was sampled with, `model_logprobs` of what the
    model gave it, at temperature 1 and without filters (None: the same). `finished` is false when the
    response was cut at the length limit; else it ends with its end of turn or with a stop string.
    `vocabulary` is the `vocab_fingerprint` of the tokenizer the ids belong to: a teacher with the same one
    reads them as they are. A reference of several turns has `assistant_mask`, false on what stands between
    them (user turns, tool output, the template's marks); None: the assistant wrote all of the response.
    `origin` says who wrote it; only the student's own rows have `logprobs` that mean anything. `weight` is
    how many samples of its prompt the row stands for: a text that would be the same each time is there once.
    `unwritten` is why the teacher wrote nothing, where it was to: the response is empty then.
    """

    prompt: Prompt
    prompt_ids: Int32[np.ndarray, " P"]
    response: TokenSpans
    logprobs: Float32[np.ndarray, " R"]
    finished: bool
    policy_version: int
    vocabulary: str
    assistant_mask: Bool[np.ndarray, " R"] | None = None
    origin: Origin = "student"
    weight: float = 1.0
    unwritten: Unscored | None = None
    model_logprobs: Float32[np.ndarray, " R"] | None = None

    @property
    def own_logprobs(self) -> Float32[np.ndarray, " R"]:
        """The model's log-probabilities of the response, whatever it was sampled with."""
        return self.logprobs if self.model_logprobs is None else self.model_logprobs


@dataclass(frozen=True)
class TeacherScores:
    """The teacher's natural-log probabilities of its own tokens for one response.

    `logprobs[j]` is log p(response token j | teacher prompt, tokens before j) at temperature 1.
    The optional fields are present only where they were asked for: `topk_*` are the most likely next
    tokens at each position (descending), `end_logprobs[j]` is log p(end of turn) before token j (one
    more entry than tokens: the last is after the response). A response with `unscored` set has no
    tokens here, so that none of the student's aligns; `response` may also be only the beginning of
    what the student wrote, where the rest did not fit.
    """

    response: TokenSpans
    logprobs: Float32[np.ndarray, " S"]
    teacher: str
    weight_version: str
    topk_ids: Int32[np.ndarray, "S K"] | None = None
    topk_logprobs: Float32[np.ndarray, "S K"] | None = None
    end_logprobs: Float32[np.ndarray, " S1"] | None = None
    unscored: Unscored | None = None


@dataclass(frozen=True)
class Alignment:
    """Which student tokens and which teacher tokens stand for the same bytes.

    Chunk numbers rise along the response; -1 marks a token that is not aligned. `exact[c]` says that
    chunk c is one student token and one teacher token. `shared_prefix[r]` is the teacher position
    that has read exactly the bytes before student token r, or -1. `coverage` is the share of the
    student's bytes that lie in a chunk (1.0 for a response without bytes).
    """

    student_chunk: Int32[np.ndarray, " R"]
    teacher_chunk: Int32[np.ndarray, " S"]
    num_chunks: int
    exact: Bool[np.ndarray, " C"]
    shared_prefix: Int32[np.ndarray, " R"]
    coverage: float


@dataclass(frozen=True)
class Projection:
    """The teacher's next-token distribution p_{T>S} in STUDENT tokens, at the state before each token of a
    response: of all strings the teacher may write whose student segmentation begins with the tokens so far,
    the share that goes on with each token.

    `logprob[r]` is that of the sampled token r, at most 0 and always finite where `mask`; `floored[r]` says
    that nothing seen leads to it, so that it has the unseen mass as its value. `ids` are the most likely
    next tokens, each once, descending, -1 (with -inf in `logprobs`) where fewer are known; what they lack to
    1 is the tail: everything else, the not known included. Where `mask` is false there is no projection, and
    nothing may be read.

    `log_support[r]` says how well the teacher's answer at this state is founded (natural log of a
    probability, at most 0). 0 where a token of the teacher's own reading begins at the state and the state's
    mass is that reading's, within a factor of two. Elsewhere the probability of coming to the state from
    before the teacher token that holds it or ends at it: where that is tiny, what is projected is a ratio of
    tiny probabilities.
    """

    mask: Bool[np.ndarray, " R"]
    log_support: Float32[np.ndarray, " R"]
    logprob: Float32[np.ndarray, " R"]
    floored: Bool[np.ndarray, " R"]
    ids: Int32[np.ndarray, "R K"]
    logprobs: Float32[np.ndarray, "R K"]


@dataclass(frozen=True)
class SharedTopK:
    """The teacher's own top-k before each student token, where both sides have read exactly the same bytes.

    The last column is the token the teacher then read, where that is not among its top-k: less likely than
    these, but nobody knows how many are in between.
    `ids` are teacher ids (-1, with -inf in `logprobs`, where there are fewer), `student_ids` the student's
    token of the same bytes or the same role, -1 without one. Where `mask` is false nothing may be read.
    """

    mask: Bool[np.ndarray, " R"]
    ids: Int32[np.ndarray, "R K"]
    logprobs: Float32[np.ndarray, "R K"]
    student_ids: Int32[np.ndarray, "R K"]


@dataclass(frozen=True)
class EndOfTurn:
    """`logprob[r]`: the teacher's natural-log probability of ending the turn before student token r, where
    `mask` says that it is known."""

    mask: Bool[np.ndarray, " R"]
    logprob: Float32[np.ndarray, " R"]


@dataclass(frozen=True)
class Targets:
    """The teacher's scores in student coordinates.

    `teacher_logprob[r]` is the total log-probability of the chunk student token r lies in, repeated
    on all its tokens, and 0 where `mask` is false: there the teacher said nothing, and nothing may
    read the value. `stats` are plain counts for the metrics, by name. `weight` is the row's weight in
    the objective; `same_vocabulary` says that the ids of both sides are of one vocabulary. The optional
    parts are present only where the objective asks for them.
    """

    chunk_of_token: Int32[np.ndarray, " R"]
    teacher_logprob: Float32[np.ndarray, " R"]
    mask: Bool[np.ndarray, " R"]
    stats: Mapping[str, float] = field(default_factory=dict)
    weight: float = 1.0
    same_vocabulary: bool = False
    projection: Projection | None = None
    shared: SharedTopK | None = None
    end: EndOfTurn | None = None
