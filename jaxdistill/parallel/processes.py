"""The processes of a run: how they join, what they agree on, and who is named when one does not come.

Everything here goes through the key-value store and the barrier of JAX's own coordination service, which
process 0 serves: it needs no device, and it has timeouts. All processes call these functions in the same
order, from their main threads. With one process each of them answers at once.

Letters: N processes.
"""

import json
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import jax
from jax._src.clusters import ClusterEnv  # what `jax.distributed.initialize` asks; there is no public name
from jax._src.distributed import global_state  # nor for the client
from jax.errors import JaxRuntimeError

from jaxdistill import errors, logs
from jaxdistill.batch import Mean
from jaxdistill.errors import ConfigError, JaxDistillError, ProcessError
from jaxdistill.stopping import Stop, Stopped

logger = logging.getLogger(__name__)

_JOIN_S = 300  # for a job's processes to start
# JAX ends a process that lost another one without a word of ours; where each waits for all alike, it shall be
# later than we are.
_MARGIN_S = 60
_ROLL_CALL_S = 10
_VARIABLES = ("JAXDISTILL_COORDINATOR", "JAXDISTILL_PROCESSES", "JAXDISTILL_PROCESS")
_FLAGS = ("--coordinator", "--processes", "--process")


class Place(NamedTuple):
    """Where a process stands: `coordinator` (host:port of process 0), how many there are, which one it is;
    `devices` are those of its machine it shall use, None for all."""

    coordinator: str
    processes: int
    process: int
    devices: list[int] | None = None


class _Joined:
    """What `joined` settles for this process."""

    timeout_s = 600.0
    calls = 0


@contextmanager
def joined(place: Place | None, timeout_s: float) -> Iterator[None]:
    """One of the processes of a run while the context lasts: `place` (`find_place`), None to be alone. Must
    come before anything asks for a device. Nobody is waited for longer than `timeout_s` in it; at its end all
    leave together.

    Raises `ProcessError` where the others cannot be reached."""
    _Joined.timeout_s = timeout_s
    if place is None:
        yield
        return
    _join(place, int(timeout_s) + _MARGIN_S)
    try:
        with abandoning():
            yield
    finally:
        jax.distributed.shutdown()


def _join(place: Place, later_s: int) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM for itself, which `stopping` listens to.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process,
            place.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=_JOIN_S,
            heartbeat_timeout_seconds=later_s,
            shutdown_timeout_seconds=later_s,
        )
    except JaxRuntimeError as error:
        raise ProcessError(
            f"process {place.process} of {place.processes} could not join the others at {place.coordinator} "
            f"within {_JOIN_S} s ({error}); see that all of them were started with the same coordinator and "
            "number of processes"
        ) from error


def find_place(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> Place | None:
    """This process's place by the three flags given here, else by JAXDISTILL_COORDINATOR, _PROCESSES and
    _PROCESS, else by what JAX finds of SLURM, Open MPI, Kubernetes or a TPU; None where it is alone, which
    `processes` 1 says outright. Raises `ConfigError` for settings that are not whole or mean nothing."""
    given: list[Any] = [coordinator, processes, process]
    names = _FLAGS
    if given == [None] * 3:
        given, names = [os.environ.get(name) for name in _VARIABLES], _VARIABLES
    said = " ".join(f"{name}={value}" for name, value in zip(names, given, strict=True) if value is not None)
    if str(given[1]) == "1":
        return None
    if given == [None] * 3:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, _JOIN_S)
        address, there, which, devices = found
        if address is None or there is None or which is None or there == 1:
            return None
        if devices is None or os.environ.get("JAX_LOCAL_DEVICE_IDS"):  # JAX reads it where it is given none
            return Place(address, there, which)
        return Place(address, there, which, list(devices))
    missing = [name for name, value in zip(names, given, strict=True) if value is None]
    if missing:
        raise ConfigError(
            f"got {said}, but not {' and '.join(missing)}; each process of a run is given all three, or none "
            "where SLURM, Open MPI or Kubernetes say them"
        )
    try:
        place = Place(str(given[0]), int(given[1]), int(given[2]))
        sound = 0 <= place.process < place.processes and place.coordinator.rpartition(":")[2].isdigit()
    except ValueError:
        sound = False
    if not sound:
        raise ConfigError(
            f"got {said}; expected a coordinator HOST:PORT (of process 0), the number of processes, and "
            "which one this is, counted from 0"
        )
    return place


def count() -> int:
    """N, how many processes the run has."""
    return global_state.num_processes if global_state.client is not None else 1


def index() -> int:
    """Which of them this is, from 0."""
    return global_state.process_id if count() > 1 else 0


def leads() -> bool:
    """Whether this is process 0, which alone writes what a run has only one of."""
    return index() == 0


def share(total: int) -> range:
    """Which of `total` things this process does: every N-th, so that any stretch of them is spread evenly."""
    return range(index(), total, count())


def gather(what: str, value: Any, *, longer_s: float = 0.0) -> list[Any]:
    """The `value` of every process, in their order; values are what JSON can hold, `what` says in words what
    is being waited for. Raises `ProcessError` naming the processes that did not come within
    `run.barrier_timeout_s`, and `longer_s` where one of them alone has something to wait for so long."""
    if count() == 1:
        return [value]
    client: Any = global_state.client
    _Joined.calls += 1
    folder = f"jaxdistill/{_Joined.calls}/"
    client.key_value_set(f"{folder}{index()}", json.dumps(value))
    timeout_s = _Joined.timeout_s + longer_s
    try:
        client.wait_at_barrier("jaxdistill", int(timeout_s * 1000))
    except JaxRuntimeError as error:
        came = client.key_value_dir_get(folder)
        missing = _named(set(range(count())) - {_number(key) for key, _ in came})
        if not missing:
            raise
        more = f" and {longer_s:g} s" if longer_s else ""
        raise ProcessError(
            f"{missing} did not come to {what} within run.barrier_timeout_s={_Joined.timeout_s:g} s{more}: "
            f"dead, stuck, or slower than that; process {index()} ends. Look at its log, and run the same "
            "command again to go on from the last checkpoint"
        ) from error
    found = {_number(key): json.loads(text) for key, text in client.key_value_dir_get(folder)}
    # All are past the one before: nobody reads it any more.
    if _Joined.calls > 1:
        client.key_value_delete(f"jaxdistill/{_Joined.calls - 1}/{index()}")
    return [found[number] for number in range(count())]


@contextmanager
def together(what: str, stop: Stop | None = None, *, longer_s: float = 0.0) -> Iterator[None]:
    """Work each process does for itself, which ends in the same way for all; `longer_s` as in `gather`.

    What one raises all raise: the same kind of error where it is one of ours, with the number of the process
    in its message, else `ProcessError`. Where any was asked to `stop`, all raise `Stopped`. No program over
    several processes' devices may come after what can fail inside."""
    if count() == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except ProcessError:
        raise
    except Exception as error:
        failure = error
        if not isinstance(error, JaxDistillError):
            logger.error("process %d: %s: %s", index(), type(error).__name__, error)
    reason = None if stop is None else stop.reason
    said = gather(what, [failure and [type(failure).__name__, str(failure)], reason], longer_s=longer_s)
    if failure is not None:
        raise failure
    for number, (failed, _) in enumerate(said):
        if failed is not None:
            raise _theirs(number, what, *failed)
    for number, (_, reason) in enumerate(said):
        if reason is not None:
            raise Stopped(f"process {number} {reason}")


def _theirs(number: int, what: str, kind: str, message: str) -> JaxDistillError:
    known = getattr(errors, kind, None)
    if known is None:
        return ProcessError(f"process {number} failed in {what} ({kind}: {message}); see its log")
    return known(f"process {number}: {message}")


@contextmanager
def watched(what: str) -> Iterator[None]:
    """A program over all processes' devices: it waits for ever where one of them does not take part, and no
    error can reach it. So where it takes longer than `run.barrier_timeout_s`, whoever is not in it is named
    and the process ends."""
    if count() == 1:
        yield
        return
    timer = threading.Timer(_Joined.timeout_s, _roll_call, [what])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _roll_call(what: str) -> None:
    client: Any = global_state.client
    folder = f"jaxdistill/roll/{_Joined.calls}/"
    client.key_value_set(f"{folder}{index()}", "")
    try:
        client.wait_at_barrier(folder, _ROLL_CALL_S * 1000)
        missing = "no process"
    except JaxRuntimeError:
        came = {_number(key) for key, _ in client.key_value_dir_get(folder)}
        missing = _named(set(range(count())) - came) or "no process"
    _abandon(
        ProcessError(
            f"{what} took longer than run.barrier_timeout_s={_Joined.timeout_s:g} s, and {missing} was "
            f"missing in it; process {index()} ends. Run the same command again to go on from the last "
            "checkpoint"
        )
    )


@contextmanager
def abandoning() -> Iterator[None]:
    """Where another process is missing, end this one at once with the error's message and exit code: closing
    things in order would wait for the one that does not come."""
    try:
        yield
    except ProcessError as error:
        if count() == 1:
            raise
        _abandon(error)


def _abandon(error: ProcessError) -> NoReturn:
    logs.say_error(error, error.exit_code)
    logs.flushed(sys.stdout)
    os._exit(error.exit_code)


def agree_max(what: str, value: int) -> int:
    """The largest `value` of any process."""
    return max(gather(what, value))


def summed(what: str, means: Mapping[str, Mean]) -> dict[str, Mean]:
    """Host metrics over the rows of all processes; a name that only some have counts for these."""
    total: dict[str, Mean] = {}
    for one in gather(what, {name: [float(m.total), float(m.weight)] for name, m in means.items()}):
        for name, (part, weight) in one.items():
            total[name] = total.get(name, Mean(0.0, 0.0)) + Mean(part, weight)
    return total


def worst(what: str, values: Mapping[str, float]) -> dict[str, float]:
    """Of each name the largest value any process has."""
    largest: dict[str, float] = {}
    for one in gather(what, dict(values)):
        for name, value in one.items():
            largest[name] = max(value, largest.get(name, value))
    return largest


def _number(key: str) -> int:
    return int(key.rpartition("/")[2])


def _named(numbers: set[int]) -> str:
    if not numbers:
        return ""
    return ("process " if len(numbers) == 1 else "processes ") + ", ".join(map(str, sorted(numbers)))
