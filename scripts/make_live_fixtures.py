"""Make the fixtures of tests/live: what transformers says of the models a genuine SGLang serves there.

    python scripts/make_live_fixtures.py toy_teacher=assets/toy/teacher smollm2=DIR    # needs torch

Writes tests/golden/live/<name>.npz. Rows are texts in the model's own tokens, one with special tokens, one
of random ids, one long; float32, natural logs.

Shape letters: B = rows, T = positions, K = best ids, C = chosen ids, V = vocabulary.
"""

# pyright: reportMissingImports=false
# (torch is not in the environment of the package)

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "live"
TOP, CHOSEN, LONG, RANDOM = 8, 5, 150, 40
TEXTS = (
    "What is 12 plus 30?",
    "A dozen eggs and 100 minutes: 12 × 8 = 96, so it's the 3rd of May, 2026.\n",
    "Ça coûte 3 €, grüß мир! 日本 你好 😀 ≈\ndef f(x):\n    return x ** 20",
)
CHAT = [{"role": "user", "content": "How many minutes are two hours?"}]


def rows_of(folder: Path, vocabulary: int, rng: np.random.Generator) -> list[list[int]]:
    """Token ids, one list a row."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    chat = tokenizer.encode(f"{rendered}120", add_special_tokens=False)
    every = [token for row in encoded for token in row]
    long = (every * LONG)[:LONG]
    return [*encoded, chat, rng.integers(0, vocabulary, RANDOM).tolist(), long]


def make(name: str, folder: Path) -> None:
    """Write one file: entry [b, t] is of the distribution after token t of row b."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    vocabulary = model.config.vocab_size
    rng = np.random.default_rng(0)
    rows = rows_of(folder, vocabulary, rng)
    chosen = rng.choice(vocabulary, CHOSEN, replace=False)
    shape = len(rows), max(map(len, rows))
    made = {
        "tokens": np.zeros(shape, np.int32),
        "lengths": np.array([len(row) for row in rows], np.int32),
        "next_logprob": np.zeros(shape, np.float32),  # of the token that follows; 0 after the last
        "top_ids": np.zeros((*shape, TOP), np.int32),
        "top_logprobs": np.zeros((*shape, TOP), np.float32),
        "chosen_ids": chosen.astype(np.int32),
        "chosen_logprobs": np.zeros((*shape, CHOSEN), np.float32),
    }
    for b, row in enumerate(rows):
        ids = torch.tensor([row])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(input_ids=ids).logits[0].float(), -1)
        top = logprobs.topk(TOP)
        made["tokens"][b, : len(row)] = row
        made["next_logprob"][b, : len(row) - 1] = logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0]
        made["top_ids"][b, : len(row)] = top.indices
        made["top_logprobs"][b, : len(row)] = top.values
        made["chosen_logprobs"][b, : len(row)] = logprobs[:, chosen]
    GOLDEN.mkdir(parents=True, exist_ok=True)
    path = GOLDEN / f"{name}.npz"
    np.savez_compressed(path, **made)
    print(f"{name}: {sum(map(len, rows))} tokens, {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the fixtures of tests/live.")
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    for model in parser.parse_args().models:
        name, _, folder = model.partition("=")
        make(name, Path(folder).expanduser())


if __name__ == "__main__":
    main()
