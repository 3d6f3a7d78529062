"""Whom a server is asked as."""

from dataclasses import dataclass

from jaxdistill.errors import (
    JaxDistillError,
    SamplerContractError,
    SamplerUnavailable,
    TeacherContractError,
    TeacherUnavailable,
)


@dataclass(frozen=True)
class Peer:
    """The part a server plays in a run: `name` in messages, which is its section of the config too.

    `unavailable` is raised where it cannot be reached in time, `contract` where it refuses for good or
    answers what must not be believed."""

    name: str
    unavailable: type[JaxDistillError]
    contract: type[JaxDistillError]

    def at(self, endpoint: str) -> str:
        """How a message begins that is about a server there."""
        return f"{self.name} at {endpoint}"


TEACHER = Peer("teacher", TeacherUnavailable, TeacherContractError)
SAMPLER = Peer("sampler", SamplerUnavailable, SamplerContractError)
