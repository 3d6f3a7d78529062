"""One process of several: where it stands, what it takes on, and how it ends. The others are played by a
stand-in for JAX's coordination service."""

import json
from typing import Any

import pytest
from jax.errors import JaxRuntimeError

from jaxdistill import errors
from jaxdistill.batch import Mean
from jaxdistill.errors import ConfigError, ProcessError, SamplerUnavailable, TeacherUnavailable
from jaxdistill.evaluation import EvalConfig, Evaluator
from jaxdistill.parallel import processes
from jaxdistill.records import Prompt
from jaxdistill.samplers import OriginsConfig, Schedule, SGLangSamplerConfig
from jaxdistill.samplers.served_weights import ServedWeights
from jaxdistill.servers import SAMPLER, Policy, Transport
from jaxdistill.stopping import Stop, Stopped

NAMES = ("JAXDISTILL_COORDINATOR", "JAXDISTILL_PROCESSES", "JAXDISTILL_PROCESS")


class Service:
    """Answers as JAX's client does, with `others` as what the other processes say, by their numbers."""

    def __init__(self, others: dict[int, Any]):
        self.others = others
        self.keys: dict[str, str] = {}
        self.waited_s: list[float] = []

    def key_value_set(self, key: str, value: str) -> None:
        self.keys[key] = value
        folder = key.rpartition("/")[0]
        self.keys |= {f"{folder}/{number}": json.dumps(said) for number, said in self.others.items()}

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        return [(key, text) for key, text in self.keys.items() if key.startswith(folder)]

    def key_value_delete(self, key: str) -> None:
        del self.keys[key]

    def wait_at_barrier(self, name: str, timeout_ms: int) -> None:
        self.waited_s.append(timeout_ms / 1000)
        if len(self.others) < 2:
            raise JaxRuntimeError("DEADLINE_EXCEEDED")


@pytest.fixture
def second(monkeypatch):
    """`second(others)` makes this process number 1 of 3."""

    def play(others: dict[int, Any]) -> Service:
        service = Service(others)
        for name, value in {"client": service, "num_processes": 3, "process_id": 1}.items():
            monkeypatch.setattr(processes.global_state, name, value)
        monkeypatch.setattr(processes._Joined, "calls", 0)
        return service

    return play


@pytest.fixture(autouse=True)
def _nothing_given(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        processes.ClusterEnv, "auto_detect_unset_distributed_params", lambda *_: (None, None, None, None)
    )


def test_a_place_is_found_by_flags_by_variables_and_by_the_cluster(monkeypatch):
    assert processes.find_place() is None
    found = ("node1:50000", 2, 0, [0])
    monkeypatch.setattr(processes.ClusterEnv, "auto_detect_unset_distributed_params", lambda *_: found)
    assert processes.find_place() == found
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "0,1")  # its word counts, whatever the cluster says
    assert processes.find_place() == ("node1:50000", 2, 0, None)
    for name, value in zip(NAMES, ("host:1", "4", "3"), strict=True):
        monkeypatch.setenv(name, value)
    assert processes.find_place() == ("host:1", 4, 3, None)
    assert processes.find_place("other:2", 3, 0) == ("other:2", 3, 0, None)
    assert processes.find_place(processes=1) is None  # alone, whatever is found


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, 2, None), "got --processes=2, but not --coordinator and --process"),
        (("host:1", 2, 2), "got --coordinator=host:1 --processes=2 --process=2; expected"),
        (("host", 2, 0), "expected a coordinator HOST:PORT"),
    ],
)
def test_a_place_that_is_not_whole_or_means_nothing_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        processes.find_place(*given)


def test_variables_that_are_no_numbers_are_refused(monkeypatch):
    for name, value in zip(NAMES, ("host:1", "two", "0"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"got .*JAXDISTILL_PROCESSES=two"):
        processes.find_place()


def test_alone_nothing_is_asked_and_everything_is_ones_own():
    assert (processes.count(), processes.index(), processes.leads()) == (1, 0, True)
    assert list(processes.share(3)) == [0, 1, 2]
    assert processes.gather("x", 5) == [5] and processes.agree_max("x", 5) == 5
    with pytest.raises(KeyError), processes.together("x"), processes.watched("x"):
        raise KeyError


def test_the_processes_share_everything_and_nothing_twice(second, monkeypatch):
    second({})
    shares = []
    for number in range(3):
        monkeypatch.setattr(processes.global_state, "process_id", number)
        shares.append(list(processes.share(7)))
    assert sorted(number for share in shares for number in share) == list(range(7))
    assert [len(one) for one in shares] == [3, 2, 2]


def test_sums_and_worst_are_over_all(second):
    second({0: {"a": [1.0, 2.0]}, 2: {"a": [3.0, 1.0], "b": [4.0, 8.0]}})
    found = processes.summed("x", {"a": Mean(2.0, 1.0)})
    assert found["a"].value == 1.5 and found["b"].value == 0.5
    second({0: {"a": 1.0}, 2: {"b": 3.0}})
    assert processes.worst("x", {"a": 2.0}) == {"a": 2.0, "b": 3.0}


def test_what_was_said_is_forgotten_once_all_have_read_it(second):
    service = second({0: 1, 2: 3})
    for _ in range(3):
        assert processes.gather("x", 2) == [1, 2, 3]
    assert [key for key in service.keys if key.endswith("/1")] == ["jaxdistill/3/1"]


def test_whoever_does_not_come_is_named(second):
    second({2: None})
    with pytest.raises(
        ProcessError, match=r"^process 0 did not come to step 7 within run.barrier_timeout_s="
    ):
        processes.gather("step 7", None)
    second({})
    with pytest.raises(ProcessError, match=r"^processes 0, 2 did not come"), processes.together("step 7"):
        pass


def test_all_end_as_the_one_that_failed(second):
    fine = [None, None]
    second({0: fine, 2: [["TeacherUnavailable", "gone"], None]})
    with pytest.raises(TeacherUnavailable, match=r"^process 2: gone$"), processes.together("x"):
        pass
    second({0: fine, 2: [["KeyError", "'a'"], None]})
    with (
        pytest.raises(ProcessError, match=r"process 2 failed in x \(KeyError: 'a'\)"),
        processes.together("x"),
    ):
        pass
    service = second({0: fine, 2: fine})
    with pytest.raises(KeyError), processes.together("x"):
        raise KeyError("mine")
    assert json.loads(service.keys["jaxdistill/1/1"]) == [["KeyError", "'mine'"], None]
    second({0: fine, 2: fine})
    with processes.together("x"):
        pass


@pytest.mark.parametrize("kind", [name for name, one in vars(errors).items() if isinstance(one, type)])
def test_every_error_of_ours_travels(kind):
    theirs = processes._theirs(2, "x", kind, "gone")
    assert type(theirs) is getattr(errors, kind) and str(theirs) == "process 2: gone"


def test_an_evaluation_ends_alike_where_one_gets_no_responses(second):
    class Gone:
        def sample(self, prompts, step, *, samples=None):
            raise SamplerUnavailable("gone")

        def push(self, params, version):
            raise AssertionError("an evaluation changes no weights")

    service = second({0: [None, None], 2: [None, None]})
    evaluator = Evaluator(EvalConfig(), [Prompt([], 0, "t")], None, 10, 2)
    with pytest.raises(SamplerUnavailable):
        evaluator(Gone(), None, 0)
    assert json.loads(service.keys["jaxdistill/1/1"]) == [["SamplerUnavailable", "gone"], None]


def test_the_others_are_not_met_before_the_first_push(second, tmp_path):
    """One whose sampler cannot even be made would be waited for. And who has told the servers is waited for
    as long as they may take."""
    service = second({0: "ab", 2: "cd"})
    written = []

    def write(_, path):
        written.append(path)
        service.others = {0: [None, None], 2: [None, None]}

    settings = SGLangSamplerConfig(endpoint="http://127.0.0.1:1", weights=tmp_path, start_timeout_s=900)
    transport = Transport(SAMPLER, settings.endpoints, Policy.of(settings))
    weights = ServedWeights(transport, tmp_path, write)
    assert not service.keys
    weights.push(None, 3)
    transport.close()
    assert service.waited_s == [600, 600 + 900]
    assert written == [tmp_path / "version-3"] and weights.version_of("ab.3") == 3


def test_a_stop_of_one_is_a_stop_of_all_and_leaves_nothing_half_done(second):
    stop = Stop()
    stop.agreed = True
    second({0: [None, "got SIGTERM"], 2: [None, None]})
    done = []
    with pytest.raises(Stopped, match="process 0 got SIGTERM"), processes.together("x", stop):
        done.append(1)
    stop.reason = "got SIGINT"
    second({0: [None, None], 2: [None, None]})
    with pytest.raises(Stopped, match="process 1 got SIGINT"), processes.together("x", stop), stop.at_once():
        done.append(2)
    assert done == [1, 2]


@pytest.mark.parametrize(
    "origins", [{"student": 1.0}, {"student": (0.25, 0.5), "teacher": (0.5, 0.25), "reference": 0.25}]
)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_process_never_has_more_rows_than_its_batch(origins, count):
    schedule = Schedule(OriginsConfig(**origins), prompts=8, samples=3, steps=50, seed=1, processes=count)
    fullest = 0
    for step in range(50):
        chosen = schedule.choose(step)
        for process in range(count):
            rows = {
                name: len(range(process, chosen.count(name), count)) * (3 if name == "student" else 1)
                for name in set(chosen)
            }
            fullest = max(fullest, sum(rows.values()))
    assert fullest <= schedule.rows <= fullest + 2
