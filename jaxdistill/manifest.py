"""manifest.json: what a reader needs to know to run a run again, and what a resumed run is compared with."""

import json
import platform
from collections.abc import Collection, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from jaxdistill.config import flat
from jaxdistill.errors import ConfigError, TeacherContractError
from jaxdistill.inputs import Inputs
from jaxdistill.metrics import write_atomically
from jaxdistill.model_folders import hub_commit, model_folder
from jaxdistill.run_config import RunConfig
from jaxdistill.run_folder import has_begun
from jaxdistill.students.tensor_files import fingerprint
from jaxdistill.teachers import ServedSettings, TeacherIdentity, Teachers


class _Recorded(NamedTuple):
    """What a resumed run is compared with: the fingerprints of a manifest by the names of their fields, and
    the teachers by their names in the config."""

    fingerprints: Mapping[str, str]
    teachers: Mapping[str, TeacherIdentity]


def check_texts(folder: Path, config: RunConfig, inputs: Inputs, allowed: Collection[str] = ()) -> None:
    """Raise `ConfigError` where `write_manifest` would for data, tokenizer or a chat template, before any
    teacher is started or asked for the run."""
    if not has_begun(folder):
        return
    path = folder / "manifest.json"
    templates = {
        f"teachers.{one.name}.chat_template": tokenizer.template_fingerprint
        for one, tokenizer in zip(config.all_teachers, inputs.vocabularies.teachers, strict=True)
    }
    now = {
        "student.chat_template": inputs.tokenizer.template_fingerprint,
        **templates,
        "student.tokenizer": inputs.tokenizer.fingerprint,
        "data.fingerprint": inputs.prompts.fingerprint,
    }
    before = _read(path, config)
    _check_all_there(path, before, [one.name for one in config.all_teachers])
    _check_fingerprints(path, before.fingerprints, now, allowed)


def write_manifest(
    folder: Path,
    config: RunConfig,
    inputs: Inputs,
    teachers: Teachers | None,
    allowed: Collection[str] = (),
) -> None:
    """Write manifest.json into the run's folder. A run that goes on there must have the data, the student's
    tokenizer, the chat templates, the weights beside its adapters (`ConfigError` else) and the teachers
    (`TeacherContractError`) it began with, but for the fields `allowed` to change (teachers.NAME for a
    teacher); where it has not, the file stays as it was."""
    path = folder / "manifest.json"
    facts = manifest(config, inputs, teachers)
    if has_begun(folder):
        before, now = _read(path, config), _recorded(facts, config)
        _check_all_there(path, before, now.teachers)
        _check_fingerprints(path, before.fingerprints, now.fingerprints, allowed)
        for name, identity in now.teachers.items():
            if f"teachers.{name}" in allowed:
                continue
            _check_teacher(path, config, name, before.teachers[name], identity)
            # What was first seen stays the measure: a teacher must not drift from resume to resume.
            facts["teachers"][name]["identity"] = before.teachers[name].to_json()
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
            "hub_commit": hub_commit(config.student.path),
            "tokenizer": inputs.tokenizer.fingerprint,
            "chat_template": inputs.tokenizer.template_fingerprint,
            "parameters": count_parameters(inputs.decoder),
            **_base(config),
        },
        "teachers": {
            name: {
                "same_vocabulary": one.tokenizer.vocab_fingerprint == inputs.tokenizer.vocab_fingerprint,
                "chat_template": one.tokenizer.template_fingerprint,
                "identity": one.identity.to_json(),
            }
            for name, one in ({} if teachers is None else teachers.members).items()
        },
        "data": {
            "fingerprint": inputs.prompts.fingerprint,
            "prompts": inputs.prompts.rows,
            "heldout": len(inputs.heldout.prompts),
            "left_out": len(inputs.left_out) + len(inputs.heldout.left_out),
        },
    }


def _base(config: RunConfig) -> dict[str, str]:
    """The fingerprint of the weights beside adapters, which no checkpoint has; without adapters nothing."""
    return {} if config.student.lora is None else {"weights": fingerprint(model_folder(config.student.path))}


def check_base(run: Path, config: RunConfig) -> None:
    """Raise `ConfigError` where the folder `run` has adapters to other weights than `config.student.path` has
    now, with which they mean nothing, or where that is a model of the hub that has moved on since: its config
    and tokenizer belong to a checkpoint as much."""
    path = run / "manifest.json"
    now = {f"student.{name}": value for name, value in _base(config).items()}
    if (commit := hub_commit(config.student.path)) is not None:
        now["student.hub_commit"] = commit
    if now:
        _check_fingerprints(path, _read(path, config).fingerprints, now, ())


def _check_all_there(path: Path, before: _Recorded, teachers: Iterable[str]) -> None:
    for name in teachers:
        if name not in before.teachers:
            raise ConfigError(
                f"{path} says nothing of teacher {name!r}, although the run has begun; restore it, or "
                "use another run.dir"
            )


def _check_fingerprints(
    path: Path, before: Mapping[str, str], now: Mapping[str, str], allowed: Collection[str]
) -> None:
    """Raise `ConfigError` for the first field that differs and is not `allowed` to."""
    for field, value in now.items():
        if value != (there := before.get(field, "none")) and field not in allowed:
            raise ConfigError(
                f"{path.parent} was begun with another {field} ({there[:12]} there, {value[:12]} "
                "now); give its file the content it had, use another run.dir, or go on with the change by "
                f"--allow-changed {field}"
            )


def _check_teacher(
    path: Path, config: RunConfig, name: str, before: TeacherIdentity, now: TeacherIdentity
) -> None:
    """Raise `TeacherContractError` where a teacher is not who it was when the run began; numbers of another
    would not belong to those before."""
    settings = next(one for one in config.all_teachers if one.name == name)
    tolerance = settings.canary_tolerance if isinstance(settings, ServedSettings) else 0.0
    other = before.difference(now, tolerance)
    if other is not None:
        raise TeacherContractError(
            f"teacher {name!r} is not the one {path.parent} was begun with: {other}; serve that one "
            f"again, use another run.dir, or go on with the change by --allow-changed teachers.{name}"
        )


def _read(path: Path, config: RunConfig) -> _Recorded:
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); restore it, or use another run.dir") from error
    try:
        return _recorded(facts, config)
    except (KeyError, TypeError, AttributeError) as error:
        what = f"it lacks the field {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(
            f"{path} was written by another version of jaxdistill ({what}); finish the run with that "
            "version, or start a new one in another run.dir"
        ) from error


def _recorded(facts: Mapping[str, Any], config: RunConfig) -> _Recorded:
    """Raises `KeyError` with the name of a field that is missing, and `TypeError` or `AttributeError` for
    what is no manifest of this version otherwise."""
    values, teachers = flat(facts), facts["teachers"]
    # The templates first: a tokenizer's fingerprint holds its template too.
    templates = ("student.chat_template", *(f"teachers.{name}.chat_template" for name in teachers))
    weights = () if config.student.lora is None else ("student.weights",)
    # Only a model of the hub has one.
    commit = ("student.hub_commit",) if values.get("student.hub_commit") else ()
    named = (*templates, "student.tokenizer", *weights, *commit, "data.fingerprint")
    fingerprints = {field: values[field] for field in named}
    identities = {name: TeacherIdentity.from_json(one["identity"]) for name, one in teachers.items()}
    return _Recorded(fingerprints, identities)


def count_parameters(module: nnx.Module) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
