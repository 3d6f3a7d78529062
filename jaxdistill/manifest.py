"""manifest.json: what a reader needs to know to run a run again, and what a resumed run is compared with."""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from jaxdistill.errors import ConfigError, TeacherContractError
from jaxdistill.inputs import Inputs
from jaxdistill.metrics import write_atomically
from jaxdistill.run_config import RunConfig
from jaxdistill.run_folder import has_begun
from jaxdistill.students import Decoder
from jaxdistill.teachers import ServedSettings, TeacherIdentity, Teachers


def write_manifest(folder: Path, config: RunConfig, inputs: Inputs, teachers: Teachers | None) -> None:
    """Write manifest.json into the run's folder. A run that goes on there must have the teachers it began
    with: `TeacherContractError` else, and the file stays as it was."""
    facts = manifest(config, inputs, teachers)
    path = folder / "manifest.json"
    if has_begun(folder):
        _check_same_teachers(path, config, facts["teachers"])
    write_atomically(path, json.dumps(facts, indent=2).encode() + b"\n")


def manifest(config: RunConfig, inputs: Inputs, teachers: Teachers | None) -> dict[str, Any]:
    """Versions, fingerprints, hardware, and who the teachers are."""
    packages = (
        "jaxdistill",
        "jax",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "transformers",
        "tokenizers",
    )
    devices = jax.devices()
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "devices": {"kind": devices[0].device_kind, "platform": devices[0].platform, "count": len(devices)},
        "mesh": dict(inputs.mesh.shape),
        "student": {
            "path": config.student.path,
            "tokenizer": inputs.tokenizer.fingerprint,
            "parameters": count_parameters(inputs.decoder),
        },
        "teachers": []
        if teachers is None
        else [
            {"same_vocabulary": member.tokenizer.vocab_fingerprint == inputs.tokenizer.vocab_fingerprint}
            | member.identity.to_json()
            for member in teachers.members.values()
        ],
        "data": {
            "fingerprint": inputs.prompts.fingerprint,
            "prompts": inputs.prompts.rows,
            "heldout": len(inputs.heldout),
        },
    }


def _check_same_teachers(path: Path, config: RunConfig, now: Sequence[Mapping[str, Any]]) -> None:
    """Numbers of another teacher would not belong to those before. `now` are the new file's entries."""
    then = {entry["name"]: entry for entry in _read_manifest(path).get("teachers", [])}
    for settings, entry in zip(config.all_teachers, now, strict=True):
        before = then.get(settings.name)
        if before is None:
            continue  # the config's check names a changed list of teachers
        tolerance = settings.canary_tolerance if isinstance(settings, ServedSettings) else 0.0
        other = _identity(before).difference(_identity(entry), tolerance)
        if other is not None:
            raise TeacherContractError(
                f"teacher {settings.name!r} is not the one {path.parent} was begun with: {other}; serve that "
                "one again, or use another run.dir"
            )


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); restore it, or use another run.dir") from error


def _identity(entry: Mapping[str, Any]) -> TeacherIdentity:
    return TeacherIdentity.from_json({key: value for key, value in entry.items() if key != "same_vocabulary"})


def count_parameters(decoder: Decoder) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(decoder, nnx.Param)))
