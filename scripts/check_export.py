"""Check that transformers computes the expected logits from a Hugging Face folder: needs torch.

    python scripts/check_export.py --model DIR --expected FILE.npz [--tolerance 1e-4]

The file holds `tokens` int [B, T] and `logits` float [B, T, V]; optionally `columns` [N], if only those
vocabulary ids were kept (logits [B, T, N]), and `lengths` [B], if rows are right-padded. Prints the
largest absolute difference; exit 1 when it is above the tolerance, 2 when the inputs do not fit.
"""

# pyright: reportMissingImports=false
# (torch is not in the environment of the package)

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def max_difference(model_folder: Path, expected: dict[str, np.ndarray]) -> float:
    """Largest |transformers - expected| over real positions, float32; ValueError when shapes differ."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    tokens, wanted = expected["tokens"], expected["logits"]
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    if "columns" in expected:
        logits = logits[..., expected["columns"]]
    if logits.shape != wanted.shape:
        raise ValueError(f"{model_folder} gives logits {logits.shape}, the file expects {wanted.shape}")
    difference = np.abs(logits - wanted)
    if "lengths" in expected:
        difference = difference[np.arange(tokens.shape[1]) < expected["lengths"][:, None]]
    return float(difference.max())  # NaN on either side stays NaN, and fails


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Compare a model folder's logits with a file's.")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--expected", type=Path, required=True, help="npz with tokens and logits")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest difference (default: %(default)s)"
    )
    options = parser.parse_args()
    if not (options.model / "config.json").is_file():
        print(f"check_export: {options.model} holds no config.json; give a model folder", file=sys.stderr)
        return 2
    if not options.expected.is_file():
        print(
            f"check_export: {options.expected} is no file; give an npz with tokens and logits",
            file=sys.stderr,
        )
        return 2
    with np.load(options.expected) as stored:
        expected = dict(stored)
    if missing := {"tokens", "logits"} - expected.keys():
        print(f"check_export: {options.expected} lacks {', '.join(sorted(missing))}", file=sys.stderr)
        return 2
    try:
        difference = max_difference(options.model, expected)
    except ValueError as error:
        print(f"check_export: {error}", file=sys.stderr)
        return 2
    agrees = difference <= options.tolerance
    verdict = "ok" if agrees else "DIFFERENT"
    print(f"max abs difference {difference:.2e}, tolerance {options.tolerance:.0e}: {verdict}")
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
