"""The teachers of a run: each response is scored by one of them, chosen by its prompt."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from jaxdistill.errors import ConfigError, TeacherContractError
from jaxdistill.records import Prompt, Rollout, TeacherScores, Unscored
from jaxdistill.teachers.base import Teacher
from jaxdistill.teachers.config import TeacherSettings
from jaxdistill.teachers.generation import Written


@dataclass(frozen=True)
class Routes:
    """Which teacher scores which prompt; `settings` in the config's order.

    A source that teachers name goes to them, every other one to the teachers that name none; among
    several it is split by their `share`. The choice hangs on the seed and the row alone: a row has the
    same teacher in every epoch and after every resume, and all its samples share it.
    """

    settings: Sequence[TeacherSettings]
    seed: int

    def choose(self, prompt: Prompt) -> str:
        """The name of the teacher that scores the responses to `prompt`."""
        able = self._able(prompt.source)
        if len(able) == 1:
            return able[0].name
        key = f"{self.seed}:{prompt.source}:{prompt.index}".encode()
        point = int.from_bytes(hashlib.sha256(key).digest()[:8]) / 2**64 * sum(one.share for one in able)
        for one in able:
            point -= one.share
            if point < 0:
                return one.name
        return able[-1].name  # the sum of the shares rounded up

    def check(self, sources: Iterable[str]) -> None:
        """Raise `ConfigError` for a source no teacher scores, and for one that no row has."""
        there = sorted(set(sources))
        for one in self.settings:
            unknown = sorted(set(one.sources) - set(there))
            if unknown:
                raise ConfigError(
                    f"teacher {one.name!r} names the sources {unknown}, which no row of the data has; "
                    f"the data has {there}"
                )
        orphans = [source for source in there if not self._able(source)]
        if orphans:
            raise ConfigError(
                f"no teacher scores the sources {orphans}: every teacher names its sources, and none these; "
                "add them to one, or leave `sources` out of one to give it all the rest"
            )

    def _able(self, source: str) -> list[TeacherSettings]:
        named = [one for one in self.settings if source in one.sources]
        return named or [one for one in self.settings if not one.sources]


class Teachers:
    """All teachers of a run as one; those concerned are asked at the same time."""

    def __init__(self, members: Sequence[Teacher], routes: Routes):
        """`members` in the order of `routes.settings`; they are closed with this object."""
        self.members: Mapping[str, Teacher] = {member.name: member for member in members}
        self.weights = {one.name: one.weight for one in routes.settings}
        self.routes = routes
        self._threads = ThreadPoolExecutor(max_workers=max(len(members), 1), thread_name_prefix="teacher")

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        """Each rollout's scores by its teacher, in the order given.

        Raises what a teacher raises. An interrupt leaves the others' requests to `close`."""
        return self._each(
            [rollout.prompt for rollout in rollouts],
            lambda teacher, rows: teacher.score([rollouts[row] for row in rows]),
        )

    def generate(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
    ) -> list[tuple[Written | Unscored, Teacher]]:
        """Each prompt's response by its teacher, and that teacher, in the order given; the teacher that
        writes a response also scores it. Raises as `Teacher.generate` does."""

        def write(teacher: Teacher, rows: Sequence[int]) -> list[tuple[Written | Unscored, Teacher]]:
            written = teacher.generate(
                [prompts[row] for row in rows],
                [seeds[row] for row in rows],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
            )
            return [(one, teacher) for one in written]

        return self._each(prompts, write)

    def _each[Answer](
        self, prompts: Sequence[Prompt], ask: Callable[[Teacher, Sequence[int]], Sequence[Answer]]
    ) -> list[Answer]:
        """What each prompt's teacher answers, asked for all its rows in one call of `ask`."""
        rows: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows.setdefault(self.routes.choose(prompt), []).append(row)
        work = {name: self._threads.submit(ask, self.members[name], mine) for name, mine in rows.items()}
        for done in as_completed(work.values()):
            done.result()  # the first failure ends the batch, whoever is still waiting for an answer
        answers = {
            row: answer
            for name, mine in rows.items()
            for row, answer in zip(mine, work[name].result(), strict=True)
        }
        return [answers[row] for row in range(len(prompts))]

    def same_vocabulary(self, rollout: Rollout, scores: TeacherScores) -> bool:
        """Whether the ids of both sides are of one vocabulary, so that the alignment is the identity."""
        return self.members[scores.teacher].tokenizer.vocab_fingerprint == rollout.vocabulary

    def check_share(self, scores: Sequence[TeacherScores]) -> None:
        """Raise `TeacherContractError` where a teacher left more of its rows without scores than its
        `max_unscored` allows. Rows longer than it reads do not count there, that is the data's doing; but
        where nothing else is left, nothing is learned."""
        reasons = [s.unscored for s in scores if s.unscored is not None]
        if reasons and len(reasons) == len(scores):
            raise TeacherContractError(
                f"none of {len(scores)} responses got scores; the first: {reasons[0].detail}"
            )
        for one in self.routes.settings:
            mine = [s for s in scores if s.teacher == one.name]
            bad = [s.unscored for s in mine if s.unscored is not None and s.unscored.kind != "too_long"]
            if bad and len(bad) > one.max_unscored * len(mine):
                raise TeacherContractError(
                    f"teacher {one.name!r}: {len(bad)} of {len(mine)} responses got no scores that can be "
                    f"trusted, more than max_unscored={one.max_unscored:g}; the first: {bad[0].detail}"
                )

    def take_counts(self) -> dict[str, float]:
        """What happened since the last call, `<teacher>/<what>`: requests, retries, hedges and the like."""
        return {
            f"{name}/{what}": float(count)
            for name, member in self.members.items()
            for what, count in member.take_counts().items()
        }

    def close(self) -> None:
        """Close every teacher, which ends the requests still under way; calling it again does nothing."""
        for member in self.members.values():
            member.close()
        self._threads.shutdown()
