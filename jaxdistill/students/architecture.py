"""What a decoder-only transformer is made of: all that tells one supported family from another.

Nothing here computes; `families` reads it from a Hugging Face config, `decoder` and `weights` follow it.
"""

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (Su et al. 2021, equation 34) of one kind of layer.

    Element i of a head turns against element i + len(frequencies), by position * frequencies[i] radians;
    elements beyond 2 * len(frequencies) are left as they are. `scale` multiplies what was turned (YaRN's
    attention factor, Peng et al. 2023, section 3.4).
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0


@dataclass(frozen=True)
class LayerKind:
    """How a layer attends: to the last `window` positions, its own included (None: to all), and with
    which rotary embedding (None: with none)."""

    window: int | None = None
    rotary: Rotary | None = None


@dataclass(frozen=True)
class Experts:
    """A feed-forward of `count` experts, each `width` wide, of which every token is given to the
    `per_token` its router likes best; `normalised`: their weights are made to sum to 1."""

    count: int
    per_token: int
    width: int
    normalised: bool

    def __post_init__(self):
        if not 1 <= self.per_token <= self.count:
            raise ValueError(f"a token is given to {self.per_token} of {self.count} experts")


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder-only transformer; sizes in elements, lengths in tokens.

    - `layers`: one kind per layer.
    - `pre_norm`, `post_norm`: an RMS norm before attention and feed-forward, and one on what they add.
    - `norm_offset`: added to every norm's weight (Gemma stores weights around 0).
    - `qk_norm`: an RMS norm on queries and keys before rotation, over each `head` or the whole `row`.
    - `attention_scale` multiplies the scores; the soft caps bound x as cap * tanh(x / cap).
    - `embedding_scale` multiplies the embedding on its way in, not on its way out.
    - `experts`: what every layer has in place of one feed-forward of `intermediate_size`.
    - `fused_projections`: the checkpoint keeps q, k, v as one matrix and gate, up as one.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerKind, ...]
    norm_eps: float
    max_length: int
    attention_scale: float
    tied_embeddings: bool = False
    activation: Activation = "silu"
    pre_norm: bool = True
    post_norm: bool = False
    norm_offset: float = 0.0
    qk_norm: Literal["head", "row"] | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    experts: Experts | None = None
    fused_projections: bool = False

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def period(self) -> int:
        """After how many layers their kinds repeat."""
        kinds = self.layers
        return next(
            p for p in range(1, len(kinds) + 1) if all(k == kinds[i % p] for i, k in enumerate(kinds))
        )
