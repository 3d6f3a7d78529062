"""Every exception this package raises on purpose; imports nothing.

A message says what was got, what was expected, where, and what to do. The command lines turn these
into one line on stderr and an exit code; anything else is a bug and keeps its traceback.
"""


class JaxDistillError(Exception):
    """Root of every deliberate error; `exit_code` is what a command line ends with."""

    exit_code = 1


class ConfigError(JaxDistillError, ValueError):
    """A configuration that cannot be run: unknown key, wrong type, missing folder."""

    exit_code = 2


class DataError(JaxDistillError, ValueError):
    """Input data that breaks its contract: a row without messages, an unreadable file."""

    exit_code = 2


class TooLongError(DataError):
    """A row of the data with more tokens than the run has room for: `by` so many more than the setting
    (or the sum of some) that `limit` names."""

    def __init__(self, message: str, *, by: int = 0, limit: str = ""):
        super().__init__(message)
        self.by = by
        self.limit = limit


class AlignmentError(DataError):
    """Two token sequences that cannot be put side by side, or a broken alignment."""


class TeacherUnavailable(JaxDistillError, ConnectionError):
    """The teacher could not be reached in time; worth trying again later."""

    exit_code = 75


class TeacherContractError(JaxDistillError, ValueError):
    """The teacher answered something that must not be believed, or refused the request for good."""


class SamplerUnavailable(JaxDistillError, ConnectionError):
    """The server that samples could not be reached in time; worth trying again later."""

    exit_code = 75


class SamplerContractError(JaxDistillError, ValueError):
    """The server that samples answered something that must not be believed, or refused for good."""


class StaleRolloutError(JaxDistillError):
    """A rollout was sampled by a policy older than the run allows."""


class NonFiniteError(JaxDistillError, FloatingPointError):
    """A loss or gradient is not a finite number."""


class ProcessError(JaxDistillError, RuntimeError):
    """Another process of the run is missing, or failed in a way only its own log tells."""

    exit_code = 75


class CheckpointError(JaxDistillError, RuntimeError):
    """A checkpoint could not be written, read, or does not belong to this run."""
