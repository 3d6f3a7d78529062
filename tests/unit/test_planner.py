"""What a step takes of a device's memory, and what is said where it does not fit."""

import jax
import jax.numpy as jnp
import pytest

from jaxdistill.losses.gkd import GKD, GKDConfig
from jaxdistill.optimizer import OptimizerConfig, make_optimizer
from jaxdistill.packing import blank
from jaxdistill.parallel import MeshConfig, make_mesh
from jaxdistill.planner import (
    SamplingMemory,
    StepMemory,
    advice,
    cache_memory,
    size,
    step_memory,
    table,
    weights_memory,
)
from jaxdistill.run_config import RunConfig
from jaxdistill.students import LoraConfig, abstract_decoder, parse_config

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
SAMPLING = SamplingMemory(weights=4, cache=6)


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


def test_the_cache_holds_keys_and_values_of_every_layer(mesh):
    decoder = abstract_decoder(CONFIG, mesh=mesh, compute_dtype=jnp.bfloat16)
    assert cache_memory(decoder, mesh, rows=6, slots=50) == 2 * LAYERS * 6 * 50 * 32 * 2
    heads, size = CONFIG.num_kv_heads, CONFIG.head_dim  # in eight bits, with a scale for each head
    kept = cache_memory(decoder, mesh, rows=6, slots=50, kv_dtype="int8")
    assert kept == 2 * LAYERS * 6 * 50 * heads * (size + 4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_the_weights_that_sampling_reads_are_those_it_makes(mesh, unchecked, dtype, lora):
    decoder = abstract_decoder(CONFIG, mesh=mesh, compute_dtype=dtype, lora=lora)
    made = jax.eval_shape(lambda d: d.weights(), decoder)
    # In float32 the output embedding is the parameter itself.
    held = made.layers if dtype == jnp.float32 else made
    assert weights_memory(decoder, mesh) == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held))


def config(**student) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"steps": 1, "dir": "run"},
            "data": {"path": "data"},
            "student": {"path": "model", **student},
            "objective": {"kind": "sft"},
        }
    )


def test_what_fits_is_said_to_fit():
    assert advice(config(), MEMORY, sampling=SAMPLING, room=221, rows=4) == [
        "fits into the 0.0 MiB that may be used"
    ]
    assert size(3 * 2**30) == "3.00 GiB"
    said = "\n".join(table(MEMORY, SAMPLING, None))
    assert "activations and the rest" in said and "does not say" in said


def test_what_does_not_fit_is_named_with_what_helps():
    said = "\n".join(advice(config(), MEMORY, sampling=SAMPLING, room=200, rows=6))
    assert "a step does NOT FIT" in said and "sampling" not in said
    # 50 are activations: a third of them is 33 less, the half only 25.
    assert "gradient_accumulation_steps=2:" in said and "fsdp" in said and "remat" not in said
    said = "\n".join(advice(config(), MEMORY, sampling=SAMPLING, room=190, rows=6))
    assert "gradient_accumulation_steps=3:" in said
    said = "\n".join(advice(config(remat="none"), MEMORY, sampling=SAMPLING, room=190, rows=1))
    assert "student.remat=layer" in said and "half of rollout.max_new_tokens" in said
    said = "\n".join(advice(config(), MEMORY, sampling=SamplingMemory(100, 100), room=230, rows=6))
    assert "sampling does NOT FIT" in said and "prompts_per_step" in said and "a step" not in said
