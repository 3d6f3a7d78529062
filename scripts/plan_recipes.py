"""The memory plan of every recipe in configs/, as `--dry-run` makes it for the hardware in its name.

    python scripts/plan_recipes.py [--write] [NAME ...]

Prints the table of docs/recipes.md; with --write it is put there. No model is needed: a student's folder has
the published config.json, as far as that tells shapes, a genuine tokenizer (scripts/fetch_tokenizers.py), and
a file as long as its weights, of which nothing but the header is on disk. Each plan is made by `train
--dry-run` in a process of its own, on as many virtual CPU devices as the student has of the hardware. They
compute in float32, where a GPU computes in bfloat16: its own figures are smaller.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

from jaxdistill.config import load
from jaxdistill.errors import ConfigError, JaxDistillError
from jaxdistill.run_config import RunConfig
from jaxdistill.students import DecoderConfig, abstract_decoder, parse_config
from jaxdistill.students.checkpoint import TOP, layer_tensors
from jaxdistill.teachers import EmbeddedConfig

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/recipes.md"
CACHE = Path(os.environ.get("JAXDISTILL_CACHE", "~/.cache/jaxdistill")).expanduser()
# GiB of a device, by the end of a recipe's name. A CPU's is the memory of a small machine.
DEVICES: Mapping[str, int] = {"h100": 78, "h200": 139, "cpu": 16}
HEAD = (
    "| recipe | hardware | student | teacher | objective | a step, GiB | sampling, GiB | may be used, GiB |"
)

# The published config.json of each student, as far as it tells shapes, by the name of its folder.
CONFIGS: Mapping[str, Mapping[str, Any]] = json.loads((ROOT / "assets/published_configs.json").read_text())

# How a model's folder begins, and the genuine tokenizer that stands for its own.
FAMILIES: Mapping[str, str] = {
    "Qwen3": "qwen3",
    "Llama-3": "llama3",
    "gemma-3": "gemma3",
    "smollm2": "smollm2",
}


class Hardware(NamedTuple):
    """What a recipe's name says it is for, and GiB of each of its devices."""

    words: str
    memory: int


class Plan(NamedTuple):
    """What `--dry-run` said of a recipe, GiB of each device: what the run may take at most is `room`."""

    step: float
    sampling: float
    room: float
    fits: bool
    text: str


def recipes() -> list[str]:
    """Their names, the smallest hardware first."""
    names = [path.stem for path in (ROOT / "configs").glob("*.yaml")]
    return sorted(names, key=lambda name: (DEVICES[hardware(name).words.rpartition(" ")[2].lower()], name))


def hardware(name: str) -> Hardware:
    """Read off the end of a recipe's name: cpu, 1xh100, 2x8xh200. The quickstart is for a CPU."""
    found = re.search(
        r"_(?:(?:(\d+)x)?(\d+)x)?(h100|h200|cpu)$", "quickstart_cpu" if name == "quickstart" else name
    )
    if found is None:
        raise ConfigError(f"configs/{name}.yaml: its name ends with no hardware, such as _1xh100; rename it")
    machines, count, kind = found.groups()
    words = "CPU" if kind == "cpu" else f"{f'{machines} x ' if machines else ''}{count} {kind.upper()}"
    return Hardware(words, DEVICES[kind])


def device_memory(name: str) -> float:
    """GiB of each device that the run is given: of a GPU that it shares, what the recipe itself says."""
    share = re.search(r"XLA_PYTHON_CLIENT_MEM_FRACTION=([\d.]+)", (ROOT / f"configs/{name}.yaml").read_text())
    return hardware(name).memory * (1.0 if share is None else float(share[1]))


def write_model(folder: Path, raw: Mapping[str, Any], tokenizer: Path) -> None:
    """Make `folder` a model of the shape that `raw`, a config.json, tells, with the files of the folder
    `tokenizer`. Its bfloat16 weights are a hole in a file: zeros to whoever reads them."""
    folder.mkdir(parents=True)
    for file in tokenizer.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            (folder / file.name).symlink_to(file)
    (folder / "config.json").write_text(json.dumps(raw))
    header, end = {}, 0
    for tensor, shape in tensors(parse_config(raw, folder.name)):
        start, end = end, end + 2 * math.prod(shape)
        header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def tensors(config: DecoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a checkpoint of this shape, as Hugging Face has them."""
    shapes = nnx.to_pure_dict(nnx.state(abstract_decoder(config), nnx.Param))
    yield from ((theirs, shapes[ours].shape) for ours, theirs in TOP.items() if ours in shapes)
    for tensor in layer_tensors(config):
        *first, _ = shapes["layers"][tensor.parameters[0]].shape[1 if tensor.expert is None else 2 :]
        for layer in range(config.num_layers):
            yield tensor.of(layer), (sum(tensor.rows), *first)


def tokenizer_of(model: str) -> Path:
    """A genuine tokenizer of the family that the folder `model` is of."""
    family = next((name for start, name in FAMILIES.items() if model.startswith(start)), None)
    if family is None or not (CACHE / "tokenizers" / family / "tokenizer.json").is_file():
        raise ConfigError(
            f"{model}: no tokenizer of its family in {CACHE / 'tokenizers'}; make it with "
            "scripts/fetch_tokenizers.py, or name the family in FAMILIES"
        )
    return CACHE / "tokenizers" / family


def lay_out(root: Path, config: RunConfig) -> None:
    """Make below `root` what a recipe reads: models, data, and what the repository has."""
    for name in ("assets", "configs"):
        (root / name).symlink_to(ROOT / name)
    toy = "models/toy_early/student"
    names = [config.student.path]
    names += [
        one.model if isinstance(one, EmbeddedConfig) else one.tokenizer or "" for one in config.all_teachers
    ]
    for name in names:
        if name == toy:  # the quickstart's student, trained for less long
            (root / toy).parent.mkdir(parents=True)
            (root / toy).symlink_to(ROOT / "assets/toy/student")
        elif name.startswith("models/") and not (root / name).exists():
            model = Path(name).name
            if model in CONFIGS:
                write_model(root / name, CONFIGS[model], tokenizer_of(model))
            else:  # a teacher that is not asked
                (root / name).parent.mkdir(exist_ok=True)
                (root / name).symlink_to(tokenizer_of(model))
    row = {
        "messages": [
            {"role": "user", "content": "How much is 2 and 2?"},
            {"role": "assistant", "content": "4"},
        ]
    }
    for file in filter(None, (config.data.path, config.eval.path)):
        if (path := root / file).exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jsonl":
            path.write_text(f"{json.dumps(row)}\n" * 64)
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(
                pa.Table.from_pylist([row | {"source": "math"}, row | {"source": "chat"}] * 32), path
            )


def dry_run(name: str, *overrides: str, memory: float | None = None) -> Plan:
    """The plan of the recipe `name` on devices of `memory` GiB (default: `device_memory`)."""
    config = load(ROOT / f"configs/{name}.yaml", overrides, RunConfig)
    sizes = [config.mesh.data, config.mesh.fsdp, config.mesh.expert, config.mesh.tensor]
    devices = math.prod(size for size in sizes if size > 0)
    given = device_memory(name) if memory is None else memory
    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder), config)
        flags = f"--xla_force_host_platform_device_count={devices}"
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        words = [sys.executable, "-m", "jaxdistill", "train", "--config", f"configs/{name}.yaml", *overrides]
        # Programs are kept where later plans find them: a recipe that did not change is planned sooner.
        words += [f"run.compilation_cache={CACHE / 'recipes'}", "--dry-run", "--device-memory", str(given)]
        done = subprocess.run(
            words,
            cwd=folder,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
    _, found, text = done.stdout.partition("memory of each device")
    if not found:
        raise ConfigError(
            f"configs/{name}.yaml has no plan (exit code {done.returncode}): {done.stderr[-2000:]}"
        )
    return Plan(
        step=_size(text, "a step takes"),
        sampling=_size(text, "; sampling"),
        room=0.9 * given,
        fits="\n  fits into the" in text,
        text=found + text,
    )


def _size(text: str, words: str) -> float:
    """GiB that stand behind `words`."""
    found = re.search(rf"{re.escape(words)} ([\d.]+) (GiB|MiB)", text)
    assert found is not None, text
    return float(found[1]) / (1 if found[2] == "GiB" else 1024)


def row(name: str, plan: Plan) -> str:
    """One line of the page's table."""
    config = load(ROOT / f"configs/{name}.yaml", [], RunConfig)
    teachers = [
        one.model if isinstance(one, EmbeddedConfig) else one.tokenizer or "" for one in config.all_teachers
    ]
    student = Path(config.student.path).name + (", adapters" if config.student.lora else "")
    cells = [
        f"[`{name}`](../configs/{name}.yaml)",
        hardware(name).words,
        # The toy pair's folders are called after their parts.
        student if student != "student" else f"toy {student}",
        " and ".join("toy teacher" if (base := Path(one).name) == "teacher" else base for one in teachers),
        f"`{config.objective.kind}`",
        *(f"{value:.1f}" for value in (plan.step, plan.sampling, plan.room)),
    ]
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Plan and print; 0 where every recipe fits, 1 where one does not, 2 where one cannot be planned."""
    parser = argparse.ArgumentParser(description="Plan the memory of every recipe in configs/.")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    parser.add_argument("names", nargs="*", help="recipes, such as quickstart (default: all)")
    arguments = parser.parse_args(argv)
    if arguments.write and arguments.names:
        parser.error("--write puts the whole table there; leave the names out")
    lines, fit = [HEAD, "|---|---|---|---|---|---|---|---|"], True
    try:
        for name in arguments.names or recipes():
            plan = dry_run(name)
            lines.append(row(name, plan))
            print(f"{name}: {plan.text.strip()}", file=sys.stderr, flush=True)
            fit = fit and plan.fits
    except JaxDistillError as error:
        print(f"plan_recipes: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(lines))
    if arguments.write:
        text = PAGE.read_text()
        start, end = text.index(HEAD), text.index("\n\n", text.index(HEAD))
        PAGE.write_text(text[:start] + "\n".join(lines) + text[end:])
    return 0 if fit else 1


if __name__ == "__main__":
    sys.exit(main())
