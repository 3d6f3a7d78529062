"""Shapes of models that several benchmarks use, and how many bytes of a device a step should take by
formula: the sum of its parts.

Each term is an array that the computation holds, in float32; none is fitted. XLA's CPU backend holds them all
at once: it makes room for gradients and gathers the head's matrix before the first layer runs.

Letters: H heads, T positions.
"""

import json
import math
from pathlib import Path
from typing import Any

from jaxdistill.losses import head
from jaxdistill.students import DecoderConfig
from jaxdistill.students.layer import layer_shapes

FLOAT = 4
# The published config.json of each model, as far as it tells shapes, by its name.
PUBLISHED: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "assets/published_configs.json").read_text()
)
SMOLLM2_135M, QWEN3_1_7B = PUBLISHED["smollm2-135m-instruct"], PUBLISHED["Qwen3-1.7B"]
# Of --smoke, on top of either.
TINY = {"vocab_size": 512, "hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 2}


def parameter_count(c: DecoderConfig) -> int:
    """All parameters: the layers', the embedding, the final norm, and the head's matrix if it is another."""
    tables = (1 if c.tied_embeddings else 2) * c.vocab_size * c.hidden_size
    return c.num_layers * sum(_layer_counts(c).values()) + tables + c.hidden_size


def _layer_counts(c: DecoderConfig) -> dict[str, int]:
    return {name: math.prod(shape) for name, (shape, _) in layer_shapes(c).items()}


def step_flops(c: DecoderConfig, rows: int, length: int) -> float:
    """Floating point operations that a step over `rows` rows of `length` tokens needs (a dense decoder).

    6 for each token and each weight of a product (the layers' matrices, and the head's, tied or not): 2 of
    the forward pass and 4 of the backward pass. And attention's two products, scores and sums of values, of
    each query with the T/2 keys on average that it may see: 6 * L * T * H * E a token, half of what Chowdhery
    et al. 2022, appendix B, count without the causal mask. What is computed a second time is not counted.
    """
    matrices = {name: math.prod(shape) for name, (shape, _) in layer_shapes(c).items() if len(shape) == 2}
    weights = c.num_layers * sum(matrices.values()) + c.vocab_size * c.hidden_size
    attention = 6 * c.num_layers * length * c.num_heads * c.head_dim
    return float(rows * length * (6 * weights + attention))


def head_bytes(rows: int, length: int, hidden: int, vocab: int, *, gathered: bool) -> int:
    """Of the head and its gradient: a tile's part of the matrix's gradient before it is added; where the
    matrix is `gathered` that too, and the whole gradient (elsewhere that is a result, not temporary); logits
    and their gradient of a tile; hidden states and their gradient, cut into tiles."""
    width = head.tile_length(rows, length, vocab)
    matrices = (3 if gathered else 1) * vocab * hidden
    return FLOAT * (matrices + 2 * rows * width * vocab + 2 * rows * length * hidden)


def temporary_bytes(
    c: DecoderConfig, rows: int, length: int, devices: int, *, expert: int = 1
) -> dict[str, int]:
    """Of a step over `rows` rows of a device, parameters split over `devices`, by expert over `expert` of
    them: gradients; every layer's input; the head; and of one layer its weights, gathered, with their
    gradient, three of attention's [H, T, T] (scores, probabilities, a gradient), and what the feed-forward's
    products make with its gradient.

    With experts also `masked`: the compiler has no grouped product, and for the weights' gradients it keeps
    each operand once for every expert of the device, the narrow ones twice, since they are turned over.
    """
    counts = _layer_counts(c)
    experts = sum(count for name, count in counts.items() if name.startswith("expert_"))
    positions = rows * length
    numbers = {
        "gradients": parameter_count(c) // devices,
        "layer_inputs": c.num_layers * positions * c.hidden_size,
        "weights": 2 * (sum(counts.values()) - experts + experts // expert),
        "attention": 3 * rows * c.num_heads * length**2,
    }
    if c.experts is None:
        numbers["feed_forward"] = 6 * positions * c.intermediate_size
    else:
        read = expert * positions * c.experts.per_token  # all of them, should all tokens choose its experts
        mine, width = c.experts.count // expert, c.experts.width
        numbers["feed_forward"] = read * (6 * width + 4 * c.hidden_size)
        numbers["masked"] = mine * read * (2 * c.hidden_size + 2 * 3 * width)
    parts = {name: FLOAT * count for name, count in numbers.items()}
    return parts | {"head": head_bytes(rows, length, c.hidden_size, c.vocab_size, gathered=devices > 1)}
