"""A fused attention is taken only where it computes what XLA's does; what is wrong with it is said."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxdistill.errors import ConfigError
from jaxdistill.parallel import MeshConfig, make_mesh
from jaxdistill.students import fused_attention
from jaxdistill.students.architecture import DecoderConfig, LayerKind
from jaxdistill.students.attention import causal_attention
from jaxdistill.students.families import read_config
from jaxdistill.students.fused_attention import choose_attention, fault_of

PARITY = Path(__file__).parents[2] / "golden" / "parity"
LENGTHS = (7, 24)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig())


@pytest.fixture(scope="module")
def config() -> DecoderConfig:
    """Grouped queries, and layers that look back at everything beside layers that do not."""
    return replace(read_config(PARITY / "qwen3"), layers=(LayerKind(window=8), LayerKind()))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable], None]:
    """Puts a function (config, kind, query, key, value) in the place of cuDNN's kernel, on a device that has
    one."""

    def put(computed: Callable) -> None:
        def attend(config, kind, *x, implementation):
            return (
                computed(config, kind, *x)
                if implementation == "cudnn"
                else causal_attention(config, kind, *x)
            )

        monkeypatch.setattr(fused_attention, "causal_attention", attend)
        monkeypatch.setattr(fused_attention, "_obstacle", lambda config, dtype: None)

    return put


def no_window(config, kind, *x):
    return causal_attention(config, LayerKind(), *x)


def looks_ahead(config, kind, query, key, value):
    return causal_attention(config, kind, query, jnp.roll(key, -1, axis=1), jnp.roll(value, -1, axis=1))


def no_number_at_odd_lengths(config, kind, query, key, value):
    """Right values, and a gradient that is not a number."""
    out = causal_attention(config, kind, query, key, value)
    return out + jnp.sqrt(query * 0) if query.shape[1] % 2 else out


def does_not_build(config, kind, *x):
    raise NotImplementedError("no engine for this shape")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_right_has_no_fault(config, mesh, dtype):
    assert fault_of("xla", config, LENGTHS, dtype, mesh) is None


@pytest.mark.parametrize(
    ("computed", "said"),
    [
        (no_window, r"rows of 24 tokens with a window of 8: the output off by"),
        (looks_ahead, r"rows of 7 tokens: the output off by"),
        (no_number_at_odd_lengths, r"rows of 7 tokens: the gradient of queries off by nan"),
        (does_not_build, "rows of 7 tokens: NotImplementedError: no engine for this shape"),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_wrong_is_named_and_not_used(kernel, config, mesh, caplog, dtype, computed, said):
    kernel(computed)
    with caplog.at_level(logging.WARNING):
        assert choose_attention("auto", config, LENGTHS, dtype, mesh) == "xla"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    with pytest.raises(ConfigError, match=said) as refused:
        choose_attention("cudnn", config, LENGTHS, dtype, mesh)
    assert "student.attention=cudnn" in str(refused.value) and "xla" in str(refused.value)


def test_a_right_kernel_is_taken_unless_xla_is_asked_for(kernel, config, mesh, caplog):
    kernel(causal_attention)
    assert choose_attention("auto", config, LENGTHS, jnp.bfloat16, mesh) == "cudnn"
    assert choose_attention("cudnn", config, LENGTHS, jnp.bfloat16, mesh) == "cudnn"
    assert choose_attention("xla", config, LENGTHS, jnp.bfloat16, mesh) == "xla"
    assert not caplog.records


def test_on_a_cpu_it_is_xla_without_a_word_and_cudnn_is_refused(config, mesh, caplog):
    assert choose_attention("auto", config, LENGTHS, jnp.bfloat16, mesh) == "xla"
    assert not caplog.records
    with pytest.raises(ConfigError, match="cuDNN runs on NVIDIA's GPUs, and the devices here are cpu"):
        choose_attention("cudnn", config, LENGTHS, jnp.bfloat16, mesh)
    # The kernel's own refusal is a fault as any other.
    assert "rows of 7 tokens" in (fault_of("cudnn", config, LENGTHS, jnp.bfloat16, mesh) or "")
