"""p_{T>S}: the teacher's next-token distribution in student tokens, at every student state.

With M(h) the teacher's probability of all strings whose student segmentation begins with h (`masses`), and
N(h, c) = M(h + c),

    p_{T>S}(c | h) = N(h, c) / M(h)

For the sampled token both are at hand: log M behind it less log M before it. For the other tokens N is summed
here over the same kind of terms, now of the strings that go on behind the state's border e: a teacher token v
proposed on the scored path that agrees with the response up to e and reaches beyond, or that begins at e. Its
weight is P(j) p(v), and `Cuts.behind` says which student token its bytes begin behind e, once if nothing
follows v and once going on. So a term

- belongs to one student token for certain where both answers are that token; an end of turn, and any token
  that plays a role, belongs to the student's token of the same role;
- is nobody's where the student would not keep h before it;
- is split up if it is the path's own token and the answers differ: into what the teacher proposes at the next
  position, with the rest of v before it, up to `_LEVELS` times, since a student token may span several
  teacher tokens;
- stays undecided otherwise.

The tail, 1 less what is listed, holds all the rest: tokens beyond the top-k, terms of less than `_LEAST` of
M(h), role tokens the student has no counterpart for, what other teacher tokens that end at e go on with, and
what is undecided. A token that undecided terms could belong to by either answer has a lower bound for its
N: it is listed if they are at most `_DOUBT` of it, else all of it stays in the tail, which is the truth with
a coarser grain. The sampled token is always listed.

Where the masses were estimated, the listed tokens can come out with more than is left beside the sampled one;
then they are scaled down to that. Where nothing is left, none is listed.

Letters: R student tokens, S teacher tokens, J proposals at each (see `terms`), K listed candidates, E
borders, N terms, X pairs of a border and a student token.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64

from jaxdistill.align.projection.cuts import Cuts
from jaxdistill.align.projection.masses import masses_of
from jaxdistill.align.projection.proposals import vocabulary_symbols
from jaxdistill.align.projection.terms import Ground, known_proposals, read_ground
from jaxdistill.errors import ConfigError
from jaxdistill.records import ROLE_NAMES, Alignment, Projection, TeacherScores, TokenSpans
from jaxdistill.text import Tokenizer

_LEAST = 1e-4
_LEVELS = 4
_DOUBT = 0.1
_UNSEEN = 1e-10  # the least probability taken to be beyond the top-k


class Projector:
    """Projects the scores of one pair of tokenizers; what it asks of them is remembered across responses.

    `candidates` is K, the student tokens listed at each state.
    """

    def __init__(self, student: Tokenizer, teacher: Tokenizer, *, candidates: int) -> None:
        """Reads both vocabularies (about a second). Raises ConfigError for `candidates` below 1."""
        if candidates < 1:
            raise ConfigError(f"a projection of {candidates} candidates lists nothing; expected at least 1")
        self._candidates = candidates
        self._cuts = Cuts(student, teacher)
        self._vocabulary = vocabulary_symbols(teacher)
        spans = teacher.spans(np.arange(teacher.vocab_size, dtype=np.int32))
        # Of every teacher id that is no content, the student's token of the same role, -1 without one.
        mine = [student.roles.get(ROLE_NAMES.get(role, ""), -1) for role in range(128)]
        self._role_ids = np.asarray(mine, np.int32)[spans.roles]
        self._is_role = spans.roles != 0

    def __call__(self, response: TokenSpans, scores: TeacherScores, alignment: Alignment) -> Projection:
        """The projection of one response [R], [R, K]; all of it masked where the teacher scored nothing.

        `logprob` of the sampled token is log M(after) - log M(before), at most 0. M(after) is at least
        V(after) times what is unseen at the position that holds the border (at least 1e-10): a token that
        nothing seen leads to has that as its value, and is `floored`.

        Linear in teacher tokens times top-k. Raises TeacherContractError for scores without a top-k.
        """
        if scores.unscored is not None or not len(scores.response):
            return self._nothing(len(response))
        if self._cuts.identical:
            return self._textbook(response, scores, alignment)
        ground = read_ground(response, scores, alignment, self._vocabulary, self._cuts)
        borders = masses_of(ground, self._cuts)
        found = self._nothing(len(response))
        tokens = np.flatnonzero(borders.before >= 0)
        before, after = borders.before[tokens], borders.after[tokens]
        history = np.where(np.isfinite(borders.log_m), borders.log_m, borders.log_v)
        floor = borders.log_v[after] + np.log(np.maximum(borders.unseen[after], _UNSEEN))
        log_p = np.minimum(np.maximum(borders.log_m[after], floor) - history[before], 0.0)
        finite = np.isfinite(log_p)
        found.mask[tokens] = finite
        found.log_support[tokens] = _log_support(ground, history)[before]
        found.logprob[tokens] = np.where(finite, log_p, 0.0)
        found.floored[tokens] = finite & (borders.log_m[after] < floor)
        of_border = np.full(len(history), -1)
        of_border[before] = tokens
        seen = self._candidates_at(ground, history)
        row = of_border[seen.border]
        kept = (row >= 0) & (seen.ids != response.ids[row]) & (seen.doubt <= _DOUBT * seen.share)
        kept &= (seen.share > 0) & found.mask[row]
        row, ids, share = row[kept], seen.ids[kept], seen.share[kept]
        left = 1.0 - np.exp(found.logprob.astype(np.float64))
        sums = np.bincount(row, weights=share, minlength=len(response))
        share = share * np.minimum(1.0, left / np.maximum(sums, _UNSEEN))[row]
        some = share > 0
        _fill(found, response, row[some], ids[some], np.log(share[some]))
        return found

    def _nothing(self, count: int) -> Projection:
        """A projection [R], [R, K] in which nothing is known."""
        return Projection(
            np.zeros(count, bool),
            np.zeros(count, np.float32),
            np.zeros(count, np.float32),
            np.zeros(count, bool),
            np.full((count, self._candidates), -1, np.int32),
            np.full((count, self._candidates), -np.inf, np.float32),
        )

    def _textbook(self, response: TokenSpans, scores: TeacherScores, alignment: Alignment) -> Projection:
        """One vocabulary: the teacher's own top-k, with the sampled token's own log-probability."""
        known_ids, known_logprobs = known_proposals(scores, self._cuts.end_of_turn)
        found, position = self._nothing(len(response)), alignment.shared_prefix
        rows = np.flatnonzero((alignment.student_chunk >= 0) & (position >= 0))
        rows = rows[scores.response.ids[position[rows]] == response.ids[rows]]
        found.mask[rows], found.logprob[rows] = True, np.minimum(scores.logprobs[position[rows]], 0.0)
        ids, logprobs = known_ids[position[rows]], known_logprobs[position[rows]]
        row, column = np.nonzero((ids >= 0) & (ids != response.ids[rows, None]))
        _fill(found, response, rows[row], ids[row, column], logprobs[row, column])
        return found

    def _candidates_at(self, ground: Ground, history: Float64[np.ndarray, " E"]) -> "_Candidates":
        """What of each state's mass goes on with which student token. `history` is log M of the states."""
        last = len(ground.proposals.ids) - 1
        front, sums = _first_terms(ground, history), _Sums([], [], [])
        for level in range(_LEVELS + 1):
            alone, going_on = self._answers(front)
            decided = alone == going_on
            splits = ~decided & front.own & (front.position < last) & (level < _LEVELS)
            sums.add(front, alone, decided & (alone >= 0), certain=True)
            for answer in (alone, going_on):
                sums.add(front, answer, ~decided & ~splits & (answer >= 0), certain=False)
            if not splits.any():
                break
            front = self._next_terms(ground, history, front, np.flatnonzero(splits))
        return sums.total()

    def _answers(self, front: "_Front") -> Int32[np.ndarray, "2 N"]:
        """The student token each term begins behind its border, alone and going on; -1 for nobody's."""
        answers = np.tile(self._role_ids[front.token], (2, 1))
        at = np.flatnonzero(~(self._is_role[front.token] & front.first))
        answers[:, at] = self._cuts.behind(front.context[at], front.token[at], front.offset[at])
        return answers

    def _next_terms(
        self, ground: Ground, history: Float64[np.ndarray, " E"], front: "_Front", at: Int64[np.ndarray, " N"]
    ) -> "_Front":
        """What the teacher proposes behind terms of the path's own tokens."""
        contexts = self._cuts.longer(front.context[at], front.token[at], front.offset[at])
        return _proposed(ground, history, front.border[at], contexts, front.position[at] + 1, first=False)


def _log_support(ground: Ground, history: Float64[np.ndarray, " E"]) -> Float64[np.ndarray, " E"]:
    """See `records.Projection`. `history` is log M of the states."""
    starts, offsets = ground.response.starts, ground.places.offsets
    position = ground.places.holder + 1  # of the path's first token that begins at the state or behind
    reached = np.minimum(history - ground.path[np.maximum(position - 1, 0)], 0.0)
    own = (starts[position] == offsets) & (np.abs(history - ground.path[position]) <= np.log(2.0))
    return np.where(own, 0.0, np.where(np.isfinite(history), reached, -np.inf))


@dataclass(frozen=True)
class _Front:
    """Terms to be asked. `first`: nothing stands between the border and what is asked from `offset` on."""

    border: Int64[np.ndarray, " N"]
    context: Int32[np.ndarray, " N"]
    position: Int64[np.ndarray, " N"]
    token: Int32[np.ndarray, " N"]
    offset: Int64[np.ndarray, " N"]
    share: Float64[np.ndarray, " N"]  # of M(h)
    own: Bool[np.ndarray, " N"]  # the path's own token
    first: Bool[np.ndarray, " N"]


def _first_terms(ground: Ground, history: Float64[np.ndarray, " E"]) -> _Front:
    """Tokens that reach beyond each border from before, and all that begin at it."""
    places, starts, terms = ground.places, ground.response.starts, ground.terms
    lengths = ground.vocabulary.lengths
    share = np.exp(terms.weight - history[terms.border])
    at = np.flatnonzero((terms.offset < lengths[terms.token]) & (terms.own | (share > _LEAST)))
    border = terms.border[at]
    over = _Front(
        border,
        places.contexts[border],
        places.holder[border],  # of the path's own token; others need none
        terms.token[at],
        terms.offset[at],
        share[at],
        terms.own[at],
        np.ones(len(at), bool),
    )
    position = places.holder + 1
    begins = np.flatnonzero(np.append(starts[:-1], -1)[position] == places.offsets)
    here = _proposed(ground, history, begins, places.contexts[begins], position[begins], first=True)
    return _Front(
        *(np.concatenate(both) for both in zip(vars(over).values(), vars(here).values(), strict=True))
    )


def _proposed(
    ground: Ground,
    history: Float64[np.ndarray, " E"],
    border: Int64[np.ndarray, " N"],
    context: Int32[np.ndarray, " N"],
    position: Int64[np.ndarray, " N"],
    *,
    first: bool,
) -> _Front:
    """All that is proposed at each of these positions, for these borders with these contexts."""
    proposals = ground.proposals
    sampled = proposals.sampled[position]
    share = np.exp(proposals.weights[position] - history[border][:, None])
    listed = share > _LEAST
    listed[np.arange(len(position)), sampled] = True
    row, column = np.nonzero(listed)
    count = len(row)
    return _Front(
        border[row],
        context[row],
        position[row],
        proposals.ids[position[row], column],
        np.zeros(count, np.int64),
        share[row, column],
        column == sampled[row],
        np.full(count, first),
    )


@dataclass(frozen=True)
class _Candidates:
    """Student tokens behind borders, each pair once: the share of M that is theirs for certain, and the share
    that could be theirs."""

    border: Int64[np.ndarray, " X"]
    ids: Int32[np.ndarray, " X"]
    share: Float64[np.ndarray, " X"]
    doubt: Float64[np.ndarray, " X"]


@dataclass(frozen=True)
class _Sums:
    """Shares of M(h) by border and student token, as they are found."""

    keys: list[Int64[np.ndarray, " _"]]
    shares: list[Float64[np.ndarray, " _"]]
    certain: list[Bool[np.ndarray, " _"]]

    def add(
        self, front: _Front, ids: Int32[np.ndarray, " N"], which: Bool[np.ndarray, " N"], *, certain: bool
    ) -> None:
        """The shares of some of the terms, each to its token."""
        self.keys.append((front.border[which] << 32) | ids[which])
        self.shares.append(front.share[which])
        self.certain.append(np.full(int(which.sum()), certain))

    def total(self) -> _Candidates:
        """What was added, each pair of a border and a token once."""
        keys, inverse = np.unique(np.concatenate(self.keys), return_inverse=True)
        shares, certain = np.concatenate(self.shares), np.concatenate(self.certain)
        share, doubt = (
            np.bincount(inverse, weights=np.where(which, shares, 0.0), minlength=len(keys)).astype(np.float64)
            for which in (certain, ~certain)
        )
        return _Candidates(keys >> 32, (keys & 0xFFFFFFFF).astype(np.int32), share, doubt)


def _fill(
    found: Projection,
    response: TokenSpans,
    rows: Int64[np.ndarray, " X"],
    ids: Int32[np.ndarray, " X"],
    logprobs: Float64[np.ndarray, " X"],
) -> None:
    """Writes the sampled token of each row that is not masked and the likeliest others, descending.

    `rows` rise; `ids` are the others, each once in its row. Equal ones keep their order.
    """
    count, room = np.bincount(rows, minlength=len(response)), found.ids.shape[1]
    column = np.arange(len(rows)) - (np.cumsum(count) - count)[rows]
    others = np.full((len(response), count.max(initial=0)), -1, np.int32)
    values = np.full(others.shape, -np.inf)
    others[rows, column], values[rows, column] = ids, logprobs
    likeliest = np.argsort(-values, axis=1, kind="stable")[:, : room - 1]
    others, values = (np.take_along_axis(x, likeliest, axis=1) for x in (others, values))
    # In float32 as they are kept, so that they descend there too. The sampled token is before its equals.
    listed = np.column_stack([np.where(found.mask, response.ids, -1), others])
    values = np.column_stack([np.where(found.mask, found.logprob, -np.inf), values]).astype(np.float32)
    order = np.argsort(-values, axis=1, kind="stable")
    found.ids[:, : listed.shape[1]] = np.take_along_axis(listed, order, axis=1)
    found.logprobs[:, : listed.shape[1]] = np.take_along_axis(values, order, axis=1)
