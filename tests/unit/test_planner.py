"""What a step takes of a device's memory, and what is said where it does not fit."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from jaxdistill import assemble, train
from jaxdistill.config import load
from jaxdistill.errors import ConfigError
from jaxdistill.inputs import check_mesh, read_student
from jaxdistill.losses.gkd import GKD, GKDConfig
from jaxdistill.losses.reverse_kl import ReverseKL, ReverseKLConfig
from jaxdistill.memory import SamplingMemory, StepMemory, sampling_memory, step_memory
from jaxdistill.optimizer import OptimizerConfig, make_optimizer
from jaxdistill.packing import blank
from jaxdistill.parallel import MeshConfig, make_mesh
from jaxdistill.parallel.mesh import AXES
from jaxdistill.parallel.rules import rows_sharding
from jaxdistill.planner import MemoryPlan, Shapes, advice, size, table
from jaxdistill.run_config import RunConfig
from jaxdistill.samplers import Generator, RolloutConfig, sampling_params
from jaxdistill.students import Decoder, LoraConfig, abstract_decoder, check_folder, parse_config
from tests.devices.workers import run_worker

ROOT = Path(__file__).parents[2]
ROWS, LENGTH, LAYERS, HIDDEN, VOCAB = 4, 256, 3, 64, 512
CONFIG = parse_config(
    {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": LENGTH,
    },
    where="the test",
)
MEMORY = StepMemory(parameters=40, optimizer=80, batch=1, temporary=100, gradients=40, head=10)
SAMPLING = SamplingMemory(weights=4, rows=4, temporary=2)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def measured(mesh, lora: LoraConfig | None = None, length: int = LENGTH, **settings) -> StepMemory:
    batch = blank(ROWS, length, {"projection": 4})
    optimizer = make_optimizer(OptimizerConfig(), 10)
    decoder = abstract_decoder(CONFIG, mesh=mesh, lora=lora)
    return step_memory(decoder, GKD(GKDConfig()), optimizer, batch, mesh, **settings)


def test_a_step_is_measured_without_a_single_value(mesh, unchecked):
    whole = measured(mesh)
    count = 2 * VOCAB * HIDDEN + HIDDEN + LAYERS * (2 * HIDDEN + HIDDEN * (3 * 128 + 2 * 64 + 2 * 32))
    assert whole.parameters == whole.gradients == 4 * count
    assert 8 * count <= whole.optimizer < 8 * count + 100  # two moments and some counters
    kept = 4 * LAYERS * ROWS * LENGTH * HIDDEN  # every layer's input
    assert whole.temporary > whole.gradients + kept
    assert 4 * ROWS * LENGTH * VOCAB < whole.head < whole.temporary
    # One row at a time takes less of everything but the gradients, of which there are two then.
    parts = measured(mesh, accumulation=ROWS)
    assert parts.head < whole.head / 2 and parts.activations < whole.activations
    assert parts.state == whole.state and parts.batch == whole.batch


def test_frozen_parameters_are_counted_without_gradients_or_moments(mesh, unchecked):
    short = 8  # so that activations are less than gradients
    adapted, whole = measured(mesh, LoraConfig(rank=4), short), measured(mesh, None, short)
    count = 2 * VOCAB * HIDDEN + HIDDEN + LAYERS * (2 * HIDDEN + HIDDEN * (3 * 128 + 2 * 64 + 2 * 32))
    # In and out of query and output, key and value, and the three of the feed-forward.
    wide = 2 * (HIDDEN + 64) + 2 * (HIDDEN + 32) + 3 * (HIDDEN + 128)
    trained = LAYERS * 4 * wide
    assert adapted.parameters == 4 * (count + trained) and adapted.gradients == 4 * trained
    assert 8 * trained <= adapted.optimizer < 8 * trained + 100
    # What the step takes has no room for gradients of the frozen ones either.
    assert adapted.temporary < whole.temporary - 4 * (count - trained)


@pytest.mark.parametrize(
    ("samples", "kv_dtype", "new_tokens"),
    [
        (4, None, 16),
        pytest.param(4, None, 96, marks=pytest.mark.slow),
        pytest.param(1, None, 192, marks=pytest.mark.slow),
        pytest.param(4, "int8", 192, marks=pytest.mark.slow),
    ],
)
def test_sampling_takes_what_a_call_takes(mesh, unchecked, samples, kv_dtype, new_tokens):
    """Measured on a real call: at each of its programs, all arrays that are there and what the program takes
    beside them."""
    prompts, width = 8, 32
    asked = RolloutConfig(
        samples_per_prompt=samples, max_prompt_tokens=width, max_new_tokens=new_tokens, kv_dtype=kv_dtype
    )
    planned = sampling_memory(abstract_decoder(CONFIG, mesh=mesh), asked, mesh, prompts=prompts)
    graphdef, params = nnx.split(
        Decoder(CONFIG, rngs=nnx.Rngs(0), activation_sharding=rows_sharding(mesh, 3))
    )
    params = jax.device_put(nnx.to_pure_dict(params), NamedSharding(mesh, PartitionSpec()))
    generator = Generator(graphdef, mesh=mesh, kv_dtype=kv_dtype and jnp.dtype(kv_dtype), ahead=True)
    before, peaks = {id(array) for array in jax.live_arrays()}, {}

    def measured_calls(name, program):
        def call(*arguments, **named):
            there = sum(array.nbytes for array in jax.live_arrays() if id(array) not in before)
            memory = program.lower(*arguments, **named).compile().memory_analysis()
            new = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            peaks[name] = max(peaks.get(name, 0), there + new)
            return program(*arguments, **named)

        return call

    for name in ("_weights", "_begin", "_advance", "_taken"):
        setattr(generator, name, measured_calls(name, getattr(generator, name)))
    generator(
        params,
        np.ones((prompts, width), np.int32),
        np.full(prompts, width, np.int32),
        # Rows end at different times, so that the batch is halved.
        np.where(np.arange(prompts) < 2, new_tokens, 4).astype(np.int32),
        jax.random.split(jax.random.key(0), prompts * samples),
        sampling_params(1.0),
        samples=samples,
        max_new_tokens=new_tokens,
        stop_ids=(3,),
    )
    assert ("_taken" in peaks) == (new_tokens > 64)
    assert sum(planned) == pytest.approx(max(peaks.values()), rel=0.05)


def test_prompts_that_do_not_share_evenly_are_padded_before_they_are_sampled(tmp_path):
    """Two prompts on eight devices are eight prompts, each sampled four times."""
    out = tmp_path / "out.json"
    run_worker("sampling_memory", out, devices=8)
    two, eight, nine = json.loads(out.read_text())
    assert two == eight and nine[1] == 2 * eight[1]


def quickstart(*overrides: str) -> RunConfig:
    return load(ROOT / "configs/quickstart.yaml", overrides, RunConfig)


def run_of(mesh, *overrides: str) -> Shapes:
    """A run of 8 rows with this file's model."""
    few = ("data.prompts_per_step=4", "rollout.samples_per_prompt=2")
    objective = ReverseKL(ReverseKLConfig(credit="lookahead"))
    return Shapes(quickstart(*few, *overrides), CONFIG, "xla", objective, mesh)


def said_of(run: Shapes, room: float, part: str) -> dict[str, str]:
    """Setting -> what it is said to save, of the `part` that does not fit."""
    lines = advice(run, run.step(), run.sampling(), room)
    start = next(number for number, line in enumerate(lines) if line.startswith(part))
    found = {}
    for line in lines[start + 1 :]:
        if not line.startswith("  "):
            break
        what, _, saved = line.strip().rpartition(": ")
        found[what] = saved
    return found


def test_what_fits_is_said_to_fit(mesh):
    assert advice(run_of(mesh), MEMORY, SAMPLING, 221) == ["fits into the 0.0 MiB that may be used"]
    assert size(3 * 2**30) == "3.00 GiB"
    said = "\n".join(table(MEMORY, SAMPLING, None))
    assert "activations and the rest" in said and "--device-memory" in said


@pytest.mark.slow
def test_what_makes_a_step_smaller_is_said_as_the_compiler_counts_it(mesh, unchecked):
    long = ("rollout.max_new_tokens=200", "student.remat=none")
    run = run_of(mesh, *long)
    whole = run.step().total

    def other(*changed: str) -> int:
        return whole - run_of(mesh, *long, *changed).step().total

    parts = {n: other(f"optimizer.gradient_accumulation_steps={n}") for n in (2, 4, 8)}
    said = said_of(run, whole - parts[4], "a step")
    assert parts[2] < parts[4] < parts[8]
    assert said["optimizer.gradient_accumulation_steps=4"] == size(parts[4])
    assert said["student.remat=layer"] == size(other("student.remat=layer"))
    assert "none of them is enough alone" not in said and not any("max_new_tokens" in what for what in said)
    said = said_of(run, 0, "a step")
    assert said["optimizer.gradient_accumulation_steps=8"] == size(parts[8])
    assert said["none of them is enough alone"] == f"{size(whole)} is lacking"


@pytest.mark.slow
def test_what_makes_no_step_smaller_is_not_offered(mesh, unchecked):
    """Where rows are few a second buffer of gradients takes more than a part of them saves."""
    short = ("rollout.max_prompt_tokens=2", "rollout.max_new_tokens=2")
    run = run_of(mesh, *short)
    whole = run.step().total
    assert run_of(mesh, *short, "optimizer.gradient_accumulation_steps=8").step().total > whole
    said = said_of(run, whole / 2, "a step")
    assert not any("accumulation" in what or "remat" in what for what in said)
    assert any(what.startswith("mesh.fsdp=2") for what in said)
    assert any(what.startswith("student.lora=") for what in said)


@pytest.mark.slow
def test_what_makes_sampling_smaller_is_said_as_the_compiler_counts_it(mesh, unchecked):
    run = run_of(mesh)
    whole = run.sampling()
    said = said_of(run, 0, "sampling")
    halves = run_of(mesh, "rollout.kv_dtype=bfloat16"), run_of(mesh, "data.prompts_per_step=2")
    for what, changed in zip(("rollout.kv_dtype=bfloat16", "data.prompts_per_step=2"), halves, strict=True):
        assert said[what] == size(sum(whole) - sum(changed.sampling()))
    moments = run_of(mesh, "optimizer.moment_dtype=bfloat16")
    assert said["optimizer.moment_dtype=bfloat16, of parameters and optimizer alone"] == size(
        run.state() - moments.state()
    )
    # Every matrix is split over twice the devices, the norms are not.
    half = said["mesh.fsdp=2 on twice the devices, of parameters and optimizer alone"]
    assert float(half.split()[0]) == pytest.approx(run.state() / 2 / 2**20, abs=0.06)


def test_a_plan_puts_nothing_on_the_devices(unchecked, monkeypatch):
    """What it is for are students that do not fit there."""
    monkeypatch.chdir(ROOT)
    at_planning = []

    def spy(config, inputs, limit):
        at_planning.extend(array.shape for array in jax.live_arrays() if id(array) not in before)
        return MemoryPlan([f"limit {limit}"], True)

    monkeypatch.setattr(assemble, "memory_plan", spy)
    before = {id(array) for array in jax.live_arrays()}
    said, obstacles = assemble.plan(quickstart("run.dir=none"), 7.0)
    assert not obstacles
    assert "limit 7.0" in said and "student: " in said
    parameters = jax.tree.leaves(nnx.state(read_student(quickstart(), shapes_only=True).decoder, nnx.Param))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in parameters)
    assert not {leaf.shape for leaf in parameters} & set(at_planning)


def test_a_plan_checks_the_weights_by_their_headers(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "student"
    shutil.copytree(ROOT / "assets/toy/student", folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name][:-1].copy()}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=rf"tensor {name} has shape"):
        assemble.plan(quickstart(f"student.path={folder}"))
    with pytest.raises(ConfigError, match=r"mesh.expert=\d+, but the model in .* has no experts"):
        mesh = AbstractMesh((1, 1, 2, 1), AXES)
        check_folder(folder, abstract_decoder(CONFIG), mesh)


def test_an_axis_that_splits_nothing_is_not_taken_in_silence(caplog):
    """Of the widths 64, 128, 2 heads and the vocabulary, 4 divides some and 7 none."""
    decoder = abstract_decoder(CONFIG)
    check_mesh(decoder, AbstractMesh((7, 4, 1, 4), AXES))
    assert not caplog.records
    with pytest.raises(ConfigError, match=r"mesh\.tensor=7 divides none .*hidden 64.*mesh\.data"):
        check_mesh(decoder, AbstractMesh((1, 1, 1, 7), AXES))
    check_mesh(decoder, AbstractMesh((1, 7, 1, 1), AXES))
    assert "mesh.fsdp=7 divides none of the model's widths" in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device-memory", "80"], "--device-memory goes with --dry-run"),
        (["--dry-run", "--device-memory", "0"], "--device-memory: invalid"),
    ],
)
def test_device_memory_is_asked_for_as_it_should_be(options, said, capsys):
    with pytest.raises(SystemExit):
        train.main(["--config", "configs/quickstart.yaml", *options])
    assert said in capsys.readouterr().err
