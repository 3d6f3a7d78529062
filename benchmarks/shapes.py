"""How many bytes of a device a step should take, by formula: the sum of its parts, none of them fitted.

Each term is an array that the computation holds, in float32. XLA's CPU backend holds them all at once: it
makes room for gradients and gathers the head's matrix before the first layer runs.

Letters: N devices, b rows of a device in a part, T positions, C positions in a tile, D hidden, F width of a
feed-forward, H heads, E head dimension, V vocabulary, M rows an expert device reads, K experts of a token.
"""

import math

from jaxdistill.losses import head
from jaxdistill.students import DecoderConfig
from jaxdistill.students.layer import layer_shapes

FLOAT = 4


def parameter_count(c: DecoderConfig) -> int:
    """All parameters: the layers', the embedding, the final norm, and the head's matrix if it is another."""
    tables = (1 if c.tied_embeddings else 2) * c.vocab_size * c.hidden_size
    return c.num_layers * sum(_layer_counts(c).values()) + tables + c.hidden_size


def _layer_counts(c: DecoderConfig) -> dict[str, int]:
    return {name: math.prod(shape) for name, (shape, _) in layer_shapes(c).items()}


def head_bytes(rows: int, length: int, hidden: int, vocab: int, *, gathered: bool) -> int:
    """Of the head and its gradient: the matrix's gradient and a tile's part of it before that is added, the
    matrix itself where it is `gathered`; logits and their gradient of a tile; hidden states and their
    gradient, cut into tiles."""
    width = head.tile_length(rows, length, vocab)
    matrices = (3 if gathered else 2) * vocab * hidden
    return FLOAT * (matrices + 2 * rows * width * vocab + 2 * rows * length * hidden)


def temporary_bytes(
    c: DecoderConfig, rows: int, length: int, devices: int, *, expert: int = 1
) -> dict[str, int]:
    """Of a step over `rows` rows of a device, parameters split over `devices`, by expert over `expert` of
    them: gradients; every layer's input; the head; and of one layer its weights, gathered, with their
    gradient, three of attention's [H, T, T] (scores, probabilities, a gradient), and what the feed-forward's
    products make with its gradient."""
    counts = _layer_counts(c)
    experts = sum(count for name, count in counts.items() if name.startswith("expert_"))
    positions = rows * length
    if c.experts is None:
        wide = 6 * positions * c.intermediate_size
    else:
        read = expert * positions * c.experts.per_token
        wide = read * (6 * c.experts.width + 4 * c.hidden_size)
    parts = {
        "gradients": parameter_count(c) // devices,
        "layer_inputs": c.num_layers * positions * c.hidden_size,
        "weights": 2 * (sum(counts.values()) - experts + experts // expert),
        "attention": 3 * rows * c.num_heads * length**2,
        "feed_forward": wide,
    }
    parts = {name: FLOAT * count for name, count in parts.items()}
    return parts | {"head": head_bytes(rows, length, c.hidden_size, c.vocab_size, gathered=devices > 1)}
