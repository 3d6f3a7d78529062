"""How the tensors of a Hugging Face checkpoint map to the decoder's parameters: one table, read both ways.

Kernels are stored [out, in] there and [L, in, out] here; some checkpoints keep several of ours as one tensor,
stacked along `out`. Experts are tensors of their own there, and [L, N, in, out] here.

Letters: L layers, N experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxdistill.students.architecture import DecoderConfig
from jaxdistill.students.layer import layer_shapes

TOP: Mapping[str, str] = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}

_MODULES: Mapping[str, str] = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "router": "mlp.gate",
    "expert_gate": "mlp.experts.{}.gate_proj",
    "expert_up": "mlp.experts.{}.up_proj",
    "expert_down": "mlp.experts.{}.down_proj",
    "attention_norm": "input_layernorm",
}
_FUSED: Mapping[str, tuple[str, ...]] = {
    "self_attn.qkv_proj": ("query", "key", "value"),
    "mlp.gate_up_proj": ("gate", "up"),
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a layer in a checkpoint: its name behind `model.layers.N.`, the parameters stacked in
    it, how many rows (`out`) each has, and whether it is a kernel, to be transposed. `expert`: which entry
    of the parameters' axis of experts it is, where they have one."""

    name: str
    parameters: tuple[str, ...]
    rows: tuple[int, ...]
    kernel: bool
    expert: int | None = None

    def of(self, layer: int) -> str:
        """Its whole name in layer number `layer`."""
        return f"model.layers.{layer}.{self.name}"


def layer_tensors(config: DecoderConfig) -> list[Tensor]:
    """The tensors that every layer of a checkpoint with this config has, in a fixed order."""
    shapes = {name: shape for name, (shape, _) in layer_shapes(config).items()}
    groups: dict[str, tuple[str, ...]] = {
        _module(config, name): (name,) for name in shapes if not name.endswith("_bias")
    }
    if config.fused_projections:
        for module, names in _FUSED.items():
            for name in names:
                del groups[_module(config, name)]
            groups[module] = names
    tensors = []
    for module, names in groups.items():
        kernel = len(shapes[names[0]]) >= 2
        rows = tuple(shapes[name][-1] for name in names)
        if len(shapes[names[0]]) == 3:
            for expert in range(shapes[names[0]][0]):
                tensors.append(Tensor(f"{module.format(expert)}.weight", names, rows, kernel, expert))
            continue
        tensors.append(Tensor(f"{module}.weight", names, rows, kernel))
        biases = tuple(f"{name}_bias" for name in names)
        if biases[0] in shapes:
            tensors.append(Tensor(f"{module}.bias", biases, rows, False))
    return tensors


def _module(config: DecoderConfig, name: str) -> str:
    """Checkpoints call the norm before the feed-forward `post_attention_layernorm`, unless there is a norm
    behind the attention to have that name."""
    norms = {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
    norms["mlp_norm"] = "pre_feedforward_layernorm" if config.post_norm else "post_attention_layernorm"
    return norms.get(name) or _MODULES[name]


def stored(params: Mapping[str, Any], tensor: Tensor, layer: int) -> list[Any]:
    """The parts of a checkpoint tensor of one layer, as the checkpoint has them: [out, in] each."""
    where = layer if tensor.expert is None else (layer, tensor.expert)
    parts = [params[name][where] for name in tensor.parameters]
    return [part.T for part in parts] if tensor.kernel else parts
