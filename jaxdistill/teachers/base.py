"""What every teacher has in common: its interface, and its view of a rollout.

Letters: P teacher prompt tokens, S teacher response tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from jaxdistill.records import CONTENT, ROLE_NAMES, Prompt, Rollout, TeacherScores, TokenSpans, Unscored
from jaxdistill.teachers.generation import Written
from jaxdistill.teachers.identity import TeacherIdentity
from jaxdistill.text import Tokenizer, concatenate

View = tuple[Int32[np.ndarray, " _"], TokenSpans]  # what a teacher reads: prompt ids, and the response


@runtime_checkable
class Teacher(Protocol):
    """Scores rollouts, and writes responses, with its own tokenizer. Built by `jaxdistill.teachers.build`,
    closed by its user."""

    name: str
    tokenizer: Tokenizer
    identity: TeacherIdentity  # what is served, known since it was built

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        """The teacher's log-probabilities of each response, in the order given.

        A response it has no scores for comes back as `Unscored`. Raises `TeacherUnavailable` (worth trying
        later) or `TeacherContractError` (another model answers, or a request is refused for good)."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
    ) -> list[Written | Unscored]:
        """The teacher's own response to each prompt, in the order given, drawn from its seed (in [0, 2**31))
        where the server heeds seeds; temperature 0 takes the most likely token each time, `top_p` below 1
        draws from the fewest tokens that have that much of the probability. A prompt it has no room for comes
        back as `Unscored`.

        Raises as `score` does, and `ConfigError` where this kind of teacher cannot write."""
        ...

    def take_counts(self) -> Mapping[str, int]:
        """What happened since the last call, by name: requests, retries, hedges and the like."""
        ...

    def close(self) -> None:
        """Let go of connections and processes; calling it again does nothing."""
        ...


def tokenizer_doubt(teacher: Teacher) -> str | None:
    """What a user is to be warned of where nothing proves that the teacher's tokenizer is the served model's
    own; None where the server's ids were compared.

    Of what a server says without being asked about ids, nothing is a proof: SGLang names its model and a
    tokenizer's folder, which mean nothing here, and no size of its vocabulary.
    """
    if teacher.identity.tokenizer_checked:
        return None
    return (
        f"teacher {teacher.name!r}: nothing proves that {teacher.tokenizer.where} is the tokenizer of the "
        f"served model {teacher.identity.model}, since no ids could be compared with its server's; see that "
        "teacher.tokenizer is the served model's own (where it is left out, the student's is taken)"
    )


def teacher_view(
    tokenizer: Tokenizer, rollout: Rollout, template_kwargs: Mapping[str, Any] | None = None
) -> View:
    """The rollout as the teacher reads it: prompt ids by the teacher's template, and the response.

    The response's bytes are encoded as plain content, apart from the prompt (generation conditions on
    that split too). A role token of the student becomes the teacher's token of the same role, and is
    left out where the teacher has none; a response without an end gets none. A teacher with the
    student's own vocabulary reads the sampled ids as they are: another cut of the same text would be
    another sample.
    """
    return teacher_views(tokenizer, [rollout], template_kwargs)[0]


def teacher_views(
    tokenizer: Tokenizer, rollouts: Sequence[Rollout], template_kwargs: Mapping[str, Any] | None = None
) -> list[View]:
    """`teacher_view` of each rollout: all contents are encoded in one call, a prompt that several
    rollouts share is rendered once."""
    prompts: dict[int, Int32[np.ndarray, " _"]] = {}
    for prompt in (rollout.prompt for rollout in rollouts):
        if id(prompt) not in prompts:
            prompts[id(prompt)] = tokenizer.render(
                prompt.messages, tools=prompt.tools, template_kwargs=template_kwargs
            )
    responses = carry_over([(rollout.response, rollout.vocabulary) for rollout in rollouts], tokenizer)
    return [(prompts[id(one.prompt)], spans) for one, spans in zip(rollouts, responses, strict=True)]


def carry_over(responses: Sequence[tuple[TokenSpans, str]], tokenizer: Tokenizer) -> list[TokenSpans]:
    """Responses of one model in the tokens of another; each with the `vocab_fingerprint` of its own.

    The bytes are encoded as plain content, a role token becomes the token of the same role, and what has no
    counterpart is left out. Ids of the same vocabulary stay as they are.
    """
    split = [_parts(response, vocabulary, tokenizer) for response, vocabulary in responses]
    contents = [part for parts in split for part in parts if isinstance(part, bytes)]
    encoded = iter(tokenizer.encode_batch(contents))
    found: list[TokenSpans] = []
    for parts in split:
        spans = [
            next(encoded)
            if isinstance(part, bytes)
            else tokenizer.role_span(part)
            if isinstance(part, str)
            else part
            for part in parts
        ]
        # A response taken over whole stays the same object: the aligner knows the identity by it.
        found.append(spans[0] if len(spans) == 1 else concatenate(spans))
    return found


def _parts(response: TokenSpans, vocabulary: str, tokenizer: Tokenizer) -> list[bytes | str | TokenSpans]:
    """The response in order: stretches of content as bytes, role tokens as the role's name; or all of
    it as sampled, where both sides have one vocabulary."""
    # Models of one tokenizer pad it differently: an id from the student's padding may not exist there.
    fits = not len(response) or int(response.ids.max()) < tokenizer.vocab_size
    if fits and vocabulary == tokenizer.vocab_fingerprint:
        return [response]
    parts: list[bytes | str | TokenSpans] = []
    begin = 0  # byte where the content not yet taken starts
    for index in np.flatnonzero(response.roles != CONTENT):
        # The stretch ends here even at a token without a counterpart: one token of the other side
        # across that place would stand for bytes on both sides of it and could not be aligned.
        end = int(response.ends[index])
        if end > begin:
            parts.append(response.data[begin:end])
        begin = end
        role = ROLE_NAMES.get(int(response.roles[index]))
        if role is not None and role in tokenizer.roles:
            parts.append(role)
    if len(response.data) > begin:
        parts.append(response.data[begin:])
    return parts
