"""Make the fixture that holds adapters to PEFT: needs an environment with torch, transformers and peft.

    python scripts/make_lora_fixtures.py                                        # tests/golden/lora/
    python scripts/make_lora_fixtures.py --check RUN_ADAPTERS --base MODEL --expected FILE.npz

The first form puts adapters on every product of the tiny `llama` of tests/golden/parity, gives them random
numbers (the seed is here), and writes them as PEFT does, with the logits PEFT computes. The second loads an
adapter folder that `jaxdistill.export --adapters` wrote into PEFT, and compares its logits with those of a
file (`tokens` int [B, T], `logits` float [B, T, V]); exit 1 when they are more than 1e-4 apart.
"""

# pyright: reportMissingImports=false
# (torch is not in the environment of the package)

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
BASE = GOLDEN / "parity" / "llama"
RANK, ALPHA, SEED, TOLERANCE = 4, 10.0, 7, 1e-4
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_model(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def logits_of(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens.astype(np.int64))).logits.numpy()


def make() -> None:
    """Write tests/golden/lora/: adapter_config.json and adapter_model.safetensors by PEFT, expected.npz."""
    rng = np.random.default_rng(SEED)
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=MODULES, task_type="CAUSAL_LM")
    model = get_peft_model(base_model(BASE), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # both factors, or the model would be its base
                values = rng.standard_normal(tuple(parameter.shape)) / parameter.shape[-1] ** 0.5
                parameter.copy_(torch.from_numpy(values))
    tokens = rng.integers(1, model.config.vocab_size, (2, 17), dtype=np.int32)
    logits, plain = logits_of(model.eval(), tokens), logits_of(base_model(BASE), tokens)
    folder = GOLDEN / "lora"
    model.peft_config["default"].base_model_name_or_path = "tests/golden/parity/llama"
    model.save_pretrained(folder)
    (folder / "README.md").unlink()  # a form to be filled in
    np.savez_compressed(folder / "expected.npz", tokens=tokens, logits=logits)
    print(f"logits std {logits.std():.2f}, moved by up to {np.abs(logits - plain).max():.2f}")


def check(adapters: Path, base: Path, expected: Path) -> int:
    """Compare PEFT's logits of an exported folder with the file's; the exit code."""
    with np.load(expected) as stored:
        tokens, wanted = stored["tokens"], stored["logits"]
    model = PeftModel.from_pretrained(base_model(base), str(adapters)).eval()
    difference = float(np.abs(logits_of(model, tokens) - wanted).max())
    agrees = difference <= TOLERANCE  # NaN on either side fails
    print(
        f"max abs difference {difference:.2e}, tolerance {TOLERANCE:.0e}: {'ok' if agrees else 'DIFFERENT'}"
    )
    return 0 if agrees else 1


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the LoRA fixture, or check an export, with PEFT.")
    parser.add_argument("--check", type=Path, help="an adapter folder")
    parser.add_argument("--base", type=Path, default=BASE, help="the model it is for (default: %(default)s)")
    parser.add_argument("--expected", type=Path, default=GOLDEN / "lora" / "expected.npz")
    options = parser.parse_args()
    torch.set_num_threads(1)  # one order of summation, so that a second run writes the same numbers
    if options.check is not None:
        return check(options.check, options.base, options.expected)
    make()
    return 0


if __name__ == "__main__":
    sys.exit(main())
