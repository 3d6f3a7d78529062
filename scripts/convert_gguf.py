"""Write a GGUF file of a small model as a Hugging Face folder, without torch.

    python scripts/convert_gguf.py FILE.gguf --out DIR [--tokenizer DIR]

Weights are dequantised to float32, the whole model in memory: what comes out is the quantised model, not the
weights its authors published. Architectures: llama without scaled rotary positions (Llama 2, SmolLM 2,
Llama 3), and gemma3 (text). All else is refused by name. A GGUF file does not hold its tokenizer's rules, but
a name for them, so that the tokenizer's files are taken from the folder --tokenizer; SmolLM's rules are known
here, and need none.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fetch_gemma3
import fetch_smollm2
from gguf import GGUFReader
from gguf_folder import metadata, write_json
from safetensors.numpy import save_file

from jaxdistill.errors import ConfigError, DataError, JaxDistillError
from jaxdistill.text import Tokenizer

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def read(file: Path) -> tuple[GGUFReader, dict[str, Any]]:
    """The tensors and the fields of a GGUF file; `ConfigError` where it cannot be read as one."""
    if not file.is_file():
        raise ConfigError(f"no GGUF file at {file}; check the path")
    try:
        reader = GGUFReader(file)
        return reader, metadata(reader)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ConfigError(f"{file} cannot be read as GGUF ({error}); fetch it again") from error


def model(reader: GGUFReader, fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights by their Hugging Face names, and config.json. `DataError` for another architecture, a tensor or
    a scaling that it has no place for, or a field that is missing."""
    architecture = fields.get("general.architecture")
    try:
        if architecture == "gemma3":
            return fetch_gemma3.hf_weights(reader), fetch_gemma3.hf_config(fields)
        if architecture == "llama":
            if (scaling := fields.get("llama.rope.scaling.type", "none")) != "none":
                raise DataError(f"its rotary positions are scaled ({scaling!r}), which is not converted")
            # What some files leave out, and no decoder reads.
            fields = {"tokenizer.ggml.padding_token_id": None} | fields
            fields.setdefault("llama.rope.freq_base", 10_000.0)
            fields.setdefault("llama.vocab_size", len(fields["tokenizer.ggml.tokens"]))
            heads, kv = (fields[f"llama.attention.head_count{end}"] for end in ("", "_kv"))
            weights = fetch_smollm2.hf_weights(reader, heads, kv)
            return weights, fetch_smollm2.hf_config(fields, tied="lm_head.weight" not in weights)
    except KeyError as error:
        raise DataError(f"the field {error} is missing; was the file written by another tool?") from error
    raise DataError(f"its architecture is {architecture!r}, expected 'llama' or 'gemma3'")


def write_tokenizer(fields: dict[str, Any], tokenizer: Path | None, out: Path) -> None:
    """The tokenizer's files, from the folder `tokenizer` or by the rules that are known. `DataError` where
    there are neither, or the folder's has more ids than the file."""
    if tokenizer is None:
        fetch_smollm2.build_tokenizer(fields).save(str(out / "tokenizer.json"))
        write_json(out / "tokenizer_config.json", fetch_smollm2.tokenizer_config(fields))
        return
    if not (tokenizer / "tokenizer.json").is_file():
        raise DataError(f"--tokenizer {tokenizer} is no folder with a tokenizer.json; download it first")
    theirs, ours = Tokenizer.load(str(tokenizer)).vocab_size, len(fields["tokenizer.ggml.tokens"])
    if theirs > ours:
        raise DataError(f"--tokenizer {tokenizer} has {theirs} ids, the file {ours}; they are of two models")
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, out / name)


def convert(file: Path, out: Path, tokenizer: Path | None) -> None:
    """Write the new folder `out`, which is there only once it is whole. Raises `ConfigError` or `DataError`
    where it cannot be."""
    if out.exists():
        raise ConfigError(f"--out {out} exists already; choose a new folder")
    fresh = out.with_name(f".{out.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        reader, fields = read(file)
        try:
            weights, config = model(reader, fields)
            fresh.mkdir(parents=True)
            write_tokenizer(fields, tokenizer, fresh)
        except DataError as error:
            raise DataError(f"{file}: {error}") from error
        save_file(weights, fresh / "model.safetensors", metadata={"format": "pt"})
        write_json(fresh / "config.json", config)
        ends = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(fresh / "generation_config.json", ends)
        write_json(fresh / "source.json", {"gguf": file.name})
        fresh.rename(out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit 0 when the folder is there, 2 with one line on stderr when it cannot be made."""
    parser = argparse.ArgumentParser(
        description="Write a GGUF file of a small model as a Hugging Face folder."
    )
    parser.add_argument("file", type=Path, metavar="FILE.gguf", help="the file to convert")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new folder")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="a folder with the model's own tokenizer.json"
    )
    arguments = parser.parse_args(argv)
    try:
        convert(arguments.file, arguments.out, arguments.tokenizer)
    except JaxDistillError as error:
        print(f"convert_gguf: {error}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
