"""manifest.json: what a reader needs to know to run a run again, and what a resumed run is compared with."""

import json
import platform
from collections.abc import Mapping
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
    path = folder / "manifest.json"
    identities = {} if teachers is None else {name: one.identity for name, one in teachers.members.items()}
    if has_begun(folder):
        # What was first seen stays the measure: a teacher must not drift from resume to resume.
        identities = {
            name: _same_teacher(path, config, name, identity) for name, identity in identities.items()
        }
    facts = manifest(config, inputs, teachers, identities)
    write_atomically(path, json.dumps(facts, indent=2).encode() + b"\n")


def manifest(
    config: RunConfig,
    inputs: Inputs,
    teachers: Teachers | None,
    identities: Mapping[str, TeacherIdentity],
) -> dict[str, Any]:
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
        "teachers": {
            name: {
                "same_vocabulary": teachers is not None
                and teachers.members[name].tokenizer.vocab_fingerprint == inputs.tokenizer.vocab_fingerprint,
                "identity": identity.to_json(),
            }
            for name, identity in identities.items()
        },
        "data": {
            "fingerprint": inputs.prompts.fingerprint,
            "prompts": inputs.prompts.rows,
            "heldout": len(inputs.heldout),
        },
    }


def _same_teacher(path: Path, config: RunConfig, name: str, now: TeacherIdentity) -> TeacherIdentity:
    """Who this teacher was when the run began; numbers of another would not belong to those before."""
    settings = next(one for one in config.all_teachers if one.name == name)
    before = _recorded(path).get(name)
    if before is None:
        raise ConfigError(
            f"{path} says nothing of teacher {name!r}, although the run has begun; restore it, or use "
            "another run.dir"
        )
    tolerance = settings.canary_tolerance if isinstance(settings, ServedSettings) else 0.0
    other = before.difference(now, tolerance)
    if other is not None:
        raise TeacherContractError(
            f"teacher {name!r} is not the one {path.parent} was begun with: {other}; serve that one "
            "again, or use another run.dir"
        )
    return before


def _recorded(path: Path) -> dict[str, TeacherIdentity]:
    """The teachers of a manifest by their names in the config."""
    try:
        entries = json.loads(path.read_text())["teachers"]
        return {name: TeacherIdentity.from_json(entry["identity"]) for name, entry in entries.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read ({error!r}); restore it, or use another run.dir") from error


def count_parameters(decoder: Decoder) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(decoder, nnx.Param)))
