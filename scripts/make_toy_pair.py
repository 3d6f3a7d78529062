"""Remake the toy pair and its data from nothing: `python scripts/make_toy_pair.py [--out DIR]`.

Trains a teacher (byte-level BPE that merges digits, Qwen3 shape) that is right and a student
(SentencePiece-style BPE with byte fallback and single digits, Llama shape) with wrong habits, both by
this project's `sft` objective, and writes them with train.jsonl and heldout.jsonl. Everything is seeded.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flax import nnx
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from toy_task import lessons, problems, split_pairs

from jaxdistill.assemble import assemble
from jaxdistill.export import export
from jaxdistill.loop import train
from jaxdistill.metrics import read_rows
from jaxdistill.run_config import RunConfig
from jaxdistill.students import Decoder, read_config, save_decoder

SEED = 0
LESSONS = 20_000
STUDENT_HABIT = 0.9  # share of the student's problems that are worked with the wrong factor

TEACHER_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
STUDENT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] }}</turn>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "teacher": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 160,
        "intermediate_size": 448,
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "head_dim": 32,
    },
    "student": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
    },
}


def teacher_tokenizer(corpus: Iterable[str]) -> Tokenizer:
    """Byte-level BPE; up to three digits may merge into one token."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=760,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def student_tokenizer(corpus: Iterable[str]) -> Tokenizer:
    """SentencePiece-style BPE with byte fallback; digits stay single, rare letters become bytes."""
    control = ["<unk>", "<s>", "</s>", "<turn>", "</turn>"]
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("▁", behavior="merged_with_next"),
            pre_tokenizers.Split("\n", behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=420, limit_alphabet=58, special_tokens=control + byte_pieces, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    # The trainer knows only special tokens that stand outside the text; bytes are ordinary pieces.
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] in control]
    return Tokenizer.from_str(json.dumps(raw))


def write_blank_model(folder: Path, name: str, tokenizer: Tokenizer) -> None:
    """A randomly initialised model of the right shape with its tokenizer, in Hugging Face format."""
    folder.mkdir(parents=True)
    teacher = name == "teacher"
    bos, eos = ("<|endoftext|>", "<|end|>") if teacher else ("<s>", "</turn>")
    pad = "<|endoftext|>" if teacher else "</s>"
    ids = {key: tokenizer.token_to_id(token) for key, token in (("bos", bos), ("eos", eos), ("pad", pad))}
    config = {
        **SHAPES[name],
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        **{f"{key}_token_id": value for key, value in ids.items()},
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {f"{key}_token_id": value for key, value in ids.items()})
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": pad,
            "chat_template": TEACHER_TEMPLATE if teacher else STUDENT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 512,
        },
    )
    shape = read_config(folder)
    blank = folder.with_name(f"{name}.blank")
    save_decoder(Decoder(shape, rngs=nnx.Rngs(SEED)), blank, source=folder)
    shutil.copyfile(blank / "model.safetensors", folder / "model.safetensors")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    with path.open("w") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def fine_tune(model: Path, rows: Path, heldout: Path, run_dir: Path, *, steps: int) -> float:
    """Train `model` on `rows` by `sft`; returns its accuracy on `heldout`."""
    config = RunConfig.model_validate(
        {
            "run": {"steps": steps, "dir": run_dir, "seed": SEED, "tensorboard": False},
            "data": {"path": rows, "prompts_per_step": 64},
            "student": {"path": str(model)},
            "rollout": {"samples_per_prompt": 1, "max_prompt_tokens": 32, "max_new_tokens": 48},
            "shapes": {"buckets": [48, 64, 80]},
            "objective": {"kind": "sft"},
            "optimizer": {"learning_rate": 3e-3, "warmup_steps": 50, "weight_decay": 0.01},
            "checkpoint": {"every": steps, "keep": 1},
            "eval": {"path": heldout, "every": 300, "prompts": 256, "scorer": "final_line"},
        }
    )
    with assemble(config) as run:
        train(run)
    return read_rows(run_dir / "metrics.jsonl")[-1]["eval/accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("models/toy"))
    parser.add_argument("--only", choices=("teacher", "student"), help="make one of the two")
    parser.add_argument("--teacher-steps", type=int, default=900)
    parser.add_argument("--student-steps", type=int, default=900)
    arguments = parser.parse_args()
    out: Path = arguments.out
    for name in ("teacher", "student"):
        if arguments.only in (None, name) and (out / name).exists():
            parser.error(f"{out / name} exists already; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    train_pairs, heldout_pairs = split_pairs(SEED)
    # Prompts only: the student must never see a reference response.
    prompts = [{k: row[k] for k in ("messages", "answer")} for row in problems(train_pairs, 1024, SEED)]
    write_rows(out / "train.jsonl", prompts)
    heldout = [{k: row[k] for k in ("messages", "answer")} for row in problems(heldout_pairs, 256, SEED + 1)]
    write_rows(out / "heldout.jsonl", heldout)
    with tempfile.TemporaryDirectory() as scratch:
        for name, steps in (("teacher", arguments.teacher_steps), ("student", arguments.student_steps)):
            if arguments.only not in (None, name):
                continue
            work = Path(scratch) / name
            work.mkdir()
            rows = list(
                lessons(train_pairs, LESSONS, SEED + 2, habit=STUDENT_HABIT if name == "student" else 0.0)
            )
            corpus = [text for row in rows for text in (row["messages"][0]["content"], row["response"])]
            tokenizer = teacher_tokenizer(corpus) if name == "teacher" else student_tokenizer(corpus)
            write_blank_model(work / "blank", name, tokenizer)
            accuracy = fine_tune(
                work / "blank",
                write_rows(work / "lessons.jsonl", rows),
                out / "heldout.jsonl",
                work / "run",
                steps=steps,
            )
            export(work / "run", None, out / name)
            size = sum(f.stat().st_size for f in (out / name).iterdir()) / 1e6
            print(f"{name}: held-out accuracy {accuracy:.3f}, {size:.2f} MB")


if __name__ == "__main__":
    main()
