"""Trains small tokenizers of the families people use, each with the traps of its family."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "Tom has 12 apples and buys 30 more, so he has 42 apples in the end.",
    "The answer is 100 + 28 = 128. The other answer is 1000 - 1 = 999.",
    "def add(first, second):\n    return first + second  # the sum of both",
    "Ein M\u00fcller f\u00e4hrt \u00fcber die Br\u00fccke; la ni\u00f1a canta una canci\u00f3n.",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u4f60\u597d\uff0c\u670b\u53cb\u3002 \u2248 10 %",
    "Emma gives 7 pears to Tom. How many pears has Emma now?",
] * 4
STRIPPING_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Always opens the assistant's turn, as the first Llama-3 template did.
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}<|start_header_id|>{{ m['role'] }}"
    "<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def write(
    folder: Path,
    raw: RawTokenizer,
    template: str | None,
    config: Mapping[str, Any],
    edit: Callable = lambda d: None,
) -> Path:
    """Saves a tokenizer folder; `edit` changes the parsed tokenizer.json before it is written."""
    folder.mkdir(parents=True, exist_ok=True)
    document = json.loads(raw.to_str())
    edit(document)
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    chat = {} if template is None else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **chat}), encoding="utf-8")
    return folder


def byte_level(folder: Path, *, digits: bool, normalize: bool) -> RawTokenizer:
    """An untemplated byte-level BPE; `digits` splits numbers into single digits, `normalize` adds NFC."""
    raw = RawTokenizer(models.BPE())
    cuts: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
    raw.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    raw.decoder = decoders.ByteLevel()
    if normalize:
        raw.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    return raw


def chatml(folder: Path) -> Path:
    """Qwen's habits: NFC, think marks that are not flagged special, eos_token that ends no turn."""
    raw = byte_level(folder, digits=False, normalize=True)
    raw.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    raw.add_tokens(["<think>", "</think>", "<tool_call>"])
    return write(folder, raw, CHATML, {"eos_token": "<|endoftext|>"})


def llama3(folder: Path) -> Path:
    """Llama 3's habits: the generation prompt is always rendered, eos_token ends no turn."""
    raw = byte_level(folder, digits=True, normalize=False)
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    raw.add_special_tokens(names)
    return write(folder, raw, LLAMA3, {"bos_token": names[0], "eos_token": {"content": names[1]}})


def sentencepiece(specials: list[str]) -> RawTokenizer:
    """An SentencePiece-style BPE; the byte pieces still have to be taken out of the added tokens."""
    raw = RawTokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(
        vocab_size=560, special_tokens=["<unk>", *specials, *BYTE_PIECES], show_progress=False
    )
    raw.train_from_iterator(CORPUS, trainer)
    return raw


def _plain_bytes(document: dict[str, Any]) -> None:
    document["added_tokens"] = [e for e in document["added_tokens"] if e["content"] not in BYTE_PIECES]


def gemma(folder: Path) -> Path:
    """Gemma's habits: spaces marked by the normalizer, runs of them as added tokens, no system turn."""
    raw = sentencepiece(["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"])
    raw.add_tokens(["\n\n", "\u2581\u2581\u2581", "<h1>"])

    def edit(document: dict[str, Any]) -> None:
        _plain_bytes(document)
        document["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
        document["pre_tokenizer"] = {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        }
        steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        raw.decoder = decoders.Sequence(steps)  # type: ignore[assignment]
        document["decoder"] = json.loads(raw.to_str())["decoder"]
        known = len(document["model"]["vocab"])
        for entry in document["added_tokens"]:  # Gemma's added tokens are part of the model's vocabulary
            if entry["id"] >= known and not entry["special"]:
                document["model"]["vocab"][entry["content"]] = entry["id"]

    return write(folder, raw, GEMMA, {"bos_token": "<bos>", "eos_token": "<eos>"}, edit)


def llama2(folder: Path) -> Path:
    """Llama 2's and Mistral's habits: a space put before every text, taken off again by the decoder."""
    raw = sentencepiece(["<s>", "</s>"])

    def edit(document: dict[str, Any]) -> None:
        _plain_bytes(document)
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
        prepend = {"type": "Prepend", "prepend": "\u2581"}
        document["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]}
        document["pre_tokenizer"] = None
        document["decoder"] = STRIPPING_DECODER

    return write(folder, raw, MISTRAL, {"bos_token": "<s>", "eos_token": "</s>"}, edit)


def unigram(folder: Path) -> Path:
    """SentencePiece Unigram with byte fallback and a Metaspace that puts a space in front."""
    raw = RawTokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=460,
        special_tokens=["<unk>", "<s>", "</s>", *BYTE_PIECES],
        unk_token="<unk>",
        show_progress=False,
    )
    raw.train_from_iterator(CORPUS, trainer)

    def edit(document: dict[str, Any]) -> None:
        _plain_bytes(document)
        document["model"]["byte_fallback"] = True
        document["decoder"] = STRIPPING_DECODER

    return write(folder, raw, MISTRAL, {"bos_token": "<s>", "eos_token": "</s>"}, edit)


def wordpiece(folder: Path) -> Path:
    """A family whose bytes cannot be known."""
    raw = RawTokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)
    raw.train_from_iterator(CORPUS, trainer)
    return write(folder, raw, CHATML, {})


FAMILIES: Mapping[str, Callable[[Path], Path]] = {
    "chatml": chatml,
    "llama3": llama3,
    "gemma": gemma,
    "llama2": llama2,
    "unigram": unigram,
}
