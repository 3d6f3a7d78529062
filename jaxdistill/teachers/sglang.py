"""A teacher behind an SGLang server (or anything that speaks its `/generate`).

Joins whom it meets (`handshake`), what may be sent (`checks`), how it travels (`transport`), what is believed
(`replies`) and who answered (`identity`).

Letters: S teacher response tokens.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from jaxdistill.errors import ConfigError, TeacherContractError
from jaxdistill.records import (
    END_OF_TURN,
    ROLE_NAMES,
    Prompt,
    Rollout,
    TeacherScores,
    TokenSpans,
    Unscored,
)
from jaxdistill.servers import TEACHER, Policy, Reply, Transport, api_key
from jaxdistill.teachers.base import teacher_views
from jaxdistill.teachers.checks import (
    OWN_ONLY,
    Asked,
    ScoringRow,
    check_asked,
    check_row,
    fit_row,
    group_rows,
    largest_reply,
    scoring_request,
)
from jaxdistill.teachers.config import ServedSettings, SGLangConfig
from jaxdistill.teachers.generation import (
    WritingRow,
    Written,
    largest_writing,
    read_written,
    writing_request,
    writing_row,
)
from jaxdistill.teachers.handshake import meet
from jaxdistill.teachers.identity import TeacherIdentity, canary_distance, canary_row
from jaxdistill.teachers.replay import ScoreRecorder
from jaxdistill.teachers.replies import RowScores, read_reply
from jaxdistill.text import Tokenizer


class SGLangTeacher:
    """Scores rollouts, and writes responses, over HTTP; requests run concurrently inside a call."""

    identity: TeacherIdentity  # what `check` found

    def __init__(
        self,
        settings: ServedSettings,
        tokenizer: Tokenizer,
        *,
        endpoints: Sequence[str] | None = None,
        gone: Callable[[], bool] = lambda: False,
    ):
        """Reads the API key; no request is made yet (see `check`).

        `endpoints` are for a server this process started itself, and so is `gone`, which ends retries once
        it returns true; an `SGLangConfig` brings its own. Raises `ConfigError` where the key's variable is
        not set, or where the tokenizer cannot give what is asked for.
        """
        self.name = settings.name
        self.settings = settings
        self._checked = False
        configured = isinstance(settings, SGLangConfig)
        key, hint = api_key(TEACHER, settings.api_key_env if configured else None)
        if endpoints is None:
            endpoints = settings.endpoints if configured else ()
        self.tokenizer = tokenizer
        self._asked = _what_to_ask(settings, self.tokenizer)
        self._unscored: Counter[str] = Counter()
        self._recorder: ScoreRecorder | None = None
        self._transport = Transport(
            TEACHER, endpoints, Policy.of(settings), api_key=key, key_hint=hint, gone=gone
        )

    def check(self) -> TeacherIdentity:
        """Ask every endpoint what it serves, before any work; errors as in `handshake.meet`.

        The counts start anew: they are of scoring alone."""
        self.identity = meet(self._transport, self.tokenizer, self.settings, self._asked)
        self._checked = True
        self._transport.take_counts()  # the counts are of scoring: a resumed run asks all this once more
        if self.settings.record is not None:
            self._recorder = ScoreRecorder(
                self.settings.record, self.identity, tolerance=self.settings.canary_tolerance
            )
        return self.identity

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        """log p of each response token by the teacher, at temperature 1, in the order given.

        A rollout whose response is empty to the teacher is not sent and has no scores; one that it should
        have written itself keeps the reason why not. A row that is too long, or whose reply is not believed,
        comes back without tokens and with the reason in `unscored`. Asks for the teacher's identity first,
        where `check` has not been called.

        Raises `TeacherUnavailable`, or `TeacherContractError` where the teacher changed; then no score of the
        batch is returned.
        """
        identity = self.identity if self._checked else self.check()
        views = teacher_views(self.tokenizer, rollouts, self.settings.template_kwargs)
        found: dict[int, RowScores | Unscored] = {}
        rows: list[ScoringRow] = []
        for number, (prompt, response) in enumerate(views):
            if not len(response):
                continue
            row = ScoringRow(number, prompt, response.ids)
            with _named(rollouts[number].prompt):
                check_row(row, self.tokenizer.vocab_size)
                fitting = fit_row(row, identity.longest, self.settings.too_long)
            if isinstance(fitting, Unscored):
                found[number] = fitting
            else:
                rows.append(fitting)
        found |= self._ask(rows, identity)
        self._unscored.update(result.kind for result in found.values() if isinstance(result, Unscored))
        scores = [
            # What was never written was counted when it was to be.
            self._scores(response, found.get(number, rollout.unwritten), identity.weight_version)
            for number, (rollout, (_, response)) in enumerate(zip(rollouts, views, strict=True))
        ]
        if self._recorder is not None:
            self._recorder.write(views, scores)
        return scores

    def generate(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
    ) -> list[Written | Unscored]:
        """The teacher's own response to each prompt, in the order given; see `Teacher.generate`.

        Genuine servers heed the seeds only where they run with `--enable-deterministic-inference`. Raises
        `TeacherUnavailable`; or `TeacherContractError` where the teacher changed, cannot read a prompt (one
        that is merely too long only where `too_long` is "stop"), or answers something else; then no response
        of the batch is returned.
        """
        identity = self.identity if self._checked else self.check()
        size, longest = self.tokenizer.vocab_size, identity.longest
        canary = canary_row(self.tokenizer, longest)
        answers: dict[int, Written | Unscored] = {}
        rows: list[WritingRow] = []
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            ids = self.tokenizer.render(
                prompt.messages, tools=prompt.tools, template_kwargs=self.settings.template_kwargs
            )
            with _named(prompt):
                row = writing_row(
                    number,
                    ids,
                    max_new_tokens,
                    seed,
                    longest=longest,
                    vocab_size=size,
                    too_long=self.settings.too_long,
                )
            if isinstance(row, Unscored):
                answers[number] = row
                self._unscored[row.kind] += 1
            else:
                rows.append(row)
        groups = group_rows(rows, max(1, self.settings.max_tokens_per_request - len(canary)))
        stops = sorted(self.tokenizer.stop_ids)
        replies = self._transport.post_all(
            "/generate",
            [
                writing_request(group, canary, temperature=temperature, top_p=top_p, stop_ids=stops)
                for group in groups
            ],
            largest_reply=[largest_writing(group, canary) for group in groups],
        )
        for reply, group in zip(replies, groups, strict=True):
            *results, last = _results(reply, len(group) + 1)
            read = [
                read_written(TEACHER, result, row, size, reply.endpoint)
                for result, row in zip(results, group, strict=True)
            ]
            (scored,) = read_reply([last], [canary], OWN_ONLY, size)
            versions = {row.label: version for row, (_, _, version) in zip(group, read, strict=True)}
            if unproven := self._proof(reply, versions, scored, identity):
                raise TeacherContractError(
                    f"teacher at {reply.endpoint}: its reply does not prove who made it: {unproven}"
                )
            for row, (ids, finished, _) in zip(group, read, strict=True):
                answers[row.number] = Written(self.tokenizer.spans(ids), finished)
        return [answers[number] for number in range(len(prompts))]

    def take_counts(self) -> dict[str, int]:
        """What happened since the last call: the transport's counts, and rows without scores by reason."""
        counts = {**self._transport.take_counts(), "too_long": 0, "bad_reply": 0}
        counts.update(self._unscored)
        self._unscored.clear()
        return counts

    def close(self) -> None:
        """Close the connections; calling it again does nothing."""
        self._transport.close()

    def _ask(self, rows: Sequence[ScoringRow], identity: TeacherIdentity) -> dict[int, RowScores | Unscored]:
        """Score the rows in groups, each with the canary after it."""
        canary = canary_row(self.tokenizer, identity.longest)
        room = max(1, self.settings.max_tokens_per_request - len(canary))
        groups = [[*group, canary] for group in group_rows(rows, room)]
        replies = self._transport.post_all(
            "/generate",
            [scoring_request(group, self._asked) for group in groups],
            largest_reply=[largest_reply(group, self._asked) for group in groups],
        )
        found: dict[int, RowScores | Unscored] = {}
        for reply, group in zip(replies, groups, strict=True):
            results = read_reply(reply.body, group, self._asked, self.tokenizer.vocab_size)
            versions = {
                row.label: result.weight_version
                for row, result in zip(group, results, strict=True)
                if isinstance(result, RowScores)
            }
            proof = self._proof(reply, versions, results[-1], identity)
            for row, result in zip(group[:-1], results[:-1], strict=True):
                assert row.number is not None, "only the canary has none"
                if proof is not None and isinstance(result, RowScores):
                    result = Unscored(
                        "bad_reply", f"{row.label}: its reply does not prove who made it: {proof}"
                    )
                if isinstance(result, Unscored):
                    result = replace(result, detail=f"{result.detail} (from {reply.endpoint})")
                found[row.number] = result
        return found

    def _proof(
        self,
        reply: Reply,
        versions: Mapping[str, str],
        canary: RowScores | Unscored,
        identity: TeacherIdentity,
    ) -> str | None:
        """Who made this reply, by the weight version of each row and the canary in it: None for the teacher
        that `check` met, or the reason why that cannot be told. Raises `TeacherContractError` for another
        teacher.
        """
        for label, version in versions.items():
            if version != identity.weight_version:
                raise TeacherContractError(
                    f"teacher at {reply.endpoint}: {label}: got weight_version {version!r}, expected "
                    f"{identity.weight_version!r}; the served model was changed, do not update a teacher "
                    "while a run uses it"
                )
        if isinstance(canary, Unscored):
            return canary.detail
        apart = canary_distance(identity.canary, canary.logprobs.tolist())
        tolerance = self.settings.canary_tolerance
        if apart > tolerance:
            raise TeacherContractError(
                f"another model is served at {reply.endpoint}: got canary log-probabilities {apart:.3g} nats "
                f"a token from those at the start, expected at most {tolerance:g} "
                "(teacher.canary_tolerance); serve the first model again, or start another run"
            )
        return None

    def _scores(
        self, response: TokenSpans, result: RowScores | Unscored | None, version: str
    ) -> TeacherScores:
        if not isinstance(result, RowScores):
            return TeacherScores(
                response.head(0), np.zeros(0, np.float32), self.name, version, unscored=result
            )
        return TeacherScores(
            response=response.head(len(result.logprobs)),
            logprobs=result.logprobs,
            teacher=self.name,
            weight_version=version,
            topk_ids=result.topk_ids,
            topk_logprobs=result.topk_logprobs,
            end_logprobs=result.end_logprobs,
        )


@contextmanager
def _named(prompt: Prompt) -> Iterator[None]:
    """What is refused before it is sent is named by its row in the data, which is what can be changed."""
    try:
        yield
    except TeacherContractError as error:
        raise TeacherContractError(f"{prompt.where}: {error}") from error


def _results(reply: Reply, count: int) -> list[Any]:
    """The reply's results, one for each of `count` rows."""
    if not isinstance(reply.body, list) or len(reply.body) != count:
        raise TeacherContractError(
            f"teacher at {reply.endpoint}: got {reply.body!r:.80}, expected a list of {count} results, one "
            "for each row sent; check that the address is an SGLang server's"
        )
    return reply.body


def _what_to_ask(settings: ServedSettings, tokenizer: Tokenizer) -> Asked:
    role = ROLE_NAMES[END_OF_TURN]
    if settings.end_logprobs and role not in tokenizer.roles:
        raise ConfigError(
            f"teacher.end_logprobs: no token of {tokenizer.where} plays the role {role!r}; name one under "
            "teacher.roles, or turn end_logprobs off"
        )
    asked = Asked(settings.top_k, tokenizer.roles[role] if settings.end_logprobs else None)
    check_asked(asked, tokenizer.vocab_size)
    return asked
