"""README.md of an export: a model card in the hubs' format, from what the run folder says of itself."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from jaxdistill.config import flat, show
from jaxdistill.metrics.rows import read_rows
from jaxdistill.model_folders import hub_name
from jaxdistill.report.pages import template_text
from jaxdistill.report.run_data import read_manifest

Row = tuple[str, str]  # what, and its value as Markdown


def model_card(
    run: Path,
    config: Mapping[str, Any],
    *,
    step: int,
    name: str,
    place: Path,
    dtype: str,
    adapters: bool,
    taught: bool,
) -> str:
    """The card of checkpoint `step` of a run with the (dumped) `config`, as Markdown with YAML in front.

    `place` is the export's folder, `dtype` that of its weights; `adapters`: it holds those alone. `taught`:
    it learned from its teachers, which a run may also have for its evaluations alone. What the run folder
    does not say is left out: without an evaluation there are no figures. Raises `DataError` where
    its manifest.json or metrics.jsonl cannot be read as what it should be.
    """
    manifest = read_manifest(run / "manifest.json") or {}
    steps, figures = held_out(read_rows(run / "metrics.jsonl"), step)
    lora = config["student"]["lora"]
    # Values come from files that others wrote: they stand in code spans, where Markdown reads nothing. There
    # is no HTML to escape for.
    environment = Environment(autoescape=False, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "code": code,
        "step": "step {}".format,
        "tojson": lambda value: json.dumps(value, ensure_ascii=False),
        "shell": shlex.quote,
    }
    return environment.from_string(template_text("model_card.md.j2")).render(
        front=front_matter(config, adapters=adapters),
        name=plain(name),
        student=config["student"]["path"],
        base=hub_name(config["student"]["path"]) or (config["student"]["path"], None),
        taught=taught,
        teachers=teachers_of(manifest, config),
        figures=figures,
        figure_steps=steps,
        heldout=manifest.get("data", {}).get("heldout"),
        temperature=config["rollout"]["temperature"],
        facts=facts(config, manifest, step, dtype="float32" if adapters else dtype, lora=lora),
        place=str(place),
        adapters=adapters,
    )


def front_matter(config: Mapping[str, Any], *, adapters: bool) -> str:
    """What hubs read of a card, as YAML."""
    tags = ["jaxdistill", "distillation", "on-policy-distillation", *(["lora"] if adapters else [])]
    base = hub_name(config["student"]["path"])
    relation = "adapter" if adapters else "finetune"
    values = {  # a folder's name means nothing there
        **({} if base is None else {"base_model": base[0], "base_model_relation": relation}),
        "library_name": "peft" if adapters else "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def held_out(rows: Sequence[Mapping[str, Any]], step: int) -> tuple[list[int], list[tuple[str, list[str]]]]:
    """The steps of the first evaluation and of the last one that is not behind `step`, and each held-out
    figure there; both empty without an evaluation."""
    prefix = "eval/"
    found = [row for row in rows if row["step"] <= step and any(key.startswith(prefix) for key in row)]
    ends = [found[0], found[-1]] if len(found) > 1 else found
    names = dict.fromkeys(key for row in ends for key in row if key.startswith(prefix))
    figures = [(key.removeprefix(prefix), [_figure(row.get(key)) for row in ends]) for key in names]
    return [row["step"] for row in ends], figures


def teachers_of(manifest: Mapping[str, Any], config: Mapping[str, Any]) -> list[dict[str, str]]:
    """Name, model, kind and the model's proof of each teacher that took part."""
    kinds = {one["name"]: one["kind"] for one in (config["teacher"], *config["teachers"]) if one}
    return [
        {
            "name": name,
            "kind": kinds.get(name, ""),
            "model": str(one["identity"]["model"]),
            "weights": str(one["identity"]["weight_version"]),
            "tokenizer": str(one["identity"]["tokenizer"])[:12],
        }
        for name, one in manifest.get("teachers", {}).items()
    ]


def facts(
    config: Mapping[str, Any],
    manifest: Mapping[str, Any],
    step: int,
    *,
    dtype: str,
    lora: Mapping[str, Any] | None,
) -> list[Row]:
    """Who took part, on what data, with which objective, for how long, with which versions."""
    student, data = manifest.get("student", {}), manifest.get("data", {})
    counted = "parameters, the adapters' among them" if lora else "parameters"
    found: list[Row] = [
        ("student", _several(config["student"]["path"], _count(student.get("parameters"), counted)))
    ]
    for one in teachers_of(manifest, config):
        said = f"{one['kind']}, weights {one['weights']}, tokenizer {one['tokenizer']}"
        found.append((f"teacher {code(one['name'])}", f"{code(one['model'])} ({plain(said)})"))
    rollout, run = config["rollout"], config["run"]
    found += [
        ("objective", _settings(config["objective"])),
        ("steps", f"{step:,} of {run['steps']:,}, seed {run['seed']}"),
        (
            "each step",
            f"{config['data']['prompts_per_step']} prompts of {rollout['samples_per_prompt']} responses, "
            f"at most {rollout['max_new_tokens']} tokens, temperature {rollout['temperature']}",
        ),
        ("optimizer", _settings(config["optimizer"])),
    ]
    if lora:
        found.append(("adapters", _settings(lora)))
    if data:
        found.append(("data", f"{data['prompts']:,} prompts, fingerprint {code(data['fingerprint'])}"))
    found.append(("weights", dtype))
    if versions := manifest.get("versions"):
        found.append(("versions", ", ".join(f"{plain(key)} {plain(str(versions[key]))}" for key in versions)))
    if devices := manifest.get("devices"):
        found.append(("devices", f"{devices['count']} × {plain(str(devices['kind']))}"))
    return found


def code(value: Any) -> str:
    """`value` as a code span that also stands in a table: on one line, its backticks and bars kept."""
    text = " ".join(str(value).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}".replace("|", "\\|")


def plain(text: str) -> str:
    """Text on one line in which Markdown finds nothing to do."""
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", " ".join(text.split()))


def _settings(values: Mapping[str, Any]) -> str:
    given = {key: value for key, value in flat(values).items() if value not in (None, [], {}, "")}
    return code(", ".join(f"{key}={show(value, 60)}" for key, value in given.items()))


def _several(path: str, count: str) -> str:
    return f"{code(path)}, {count}" if count else code(path)


def _count(number: Any, what: str) -> str:
    return f"{number:,} {what}" if isinstance(number, int) else ""


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"
