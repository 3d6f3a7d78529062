"""A whole run that trains adapters: what it leaves behind, how it goes on, and what is made of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxdistill.checkpoint import restore_params
from jaxdistill.students import LoraConfig, abstract_decoder, load_decoder, read_config, trained_and_frozen

from .conftest import ROOT, call, rows, without_clocks

LORA = ("student.lora.rank=4", "student.lora.alpha=8.0")
FILES = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


@pytest.fixture(scope="module")
def overrides(served, tmp_path_factory) -> tuple[str, ...]:
    """The small run with adapters, to a copy of the toy student that a test may change."""
    base = tmp_path_factory.mktemp("base")
    for name in FILES:
        shutil.copyfile(ROOT / "assets/toy/student" / name, base / name)
    few = ("run.steps=3", "eval.prompts=4", "optimizer.schedule=constant", "optimizer.learning_rate=5e-3")
    # Two samples of so sure a student are mostly the same: beside each other they would teach nothing.
    return (*served, f"student.path={base}", *LORA, *few, "objective.baseline=batch")


def base_of(overrides: tuple[str, ...]) -> Path:
    return Path(next(x for x in overrides if x.startswith("student.path=")).removeprefix("student.path="))


@pytest.fixture(scope="module")
def run(train, overrides, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    result = train(folder, *overrides)
    assert result.returncode == 0, result.stderr
    return folder


def trained(run: Path) -> dict[str, Any]:
    """The parameters of the newest checkpoint; restoring fails where it holds others than adapters."""
    blank = abstract_decoder(read_config(ROOT / "assets/toy/student"), lora=LoraConfig(rank=4, alpha=8.0))
    template, _ = trained_and_frozen(nnx.to_pure_dict(nnx.state(blank, nnx.Param)))
    return jax.tree.map(jnp.asarray, restore_params(run, None, template)[1])


@pytest.mark.slow
def test_a_run_goes_on_bitwise_from_adapters_and_its_base(train, overrides, run, tmp_path):
    """Its checkpoints hold neither the base nor moments of it."""
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows(run)[:-1])
    assert [row["recompiles"] for row in rows(run)[:-1]] == [0] * 3
    stored = sum(file.stat().st_size for file in (run / "checkpoints/3/state").rglob("*"))
    assert stored < (base_of(overrides) / "model.safetensors").stat().st_size
    assert train(tmp_path / "run", *overrides, "run.steps=2").returncode == 0
    assert train(tmp_path / "run", *overrides).returncode == 0
    # Where it stopped it was evaluated once more.
    again = [without_clocks(row) for row in rows(tmp_path / "run")]
    again[2] = {name: value for name, value in again[2].items() if not name.startswith("eval/")}
    assert again == [without_clocks(row) for row in rows(run)]
    for name, value in trained(run)["adapters"].items():
        np.testing.assert_array_equal(trained(tmp_path / "run")["adapters"][name], value, err_msg=name)


def test_an_export_is_the_base_with_its_adapters_merged(overrides, run, tmp_path):
    out = tmp_path / "model"
    result = call("export", "--run", str(run), "--out", str(out))
    assert result.returncode == 0, result.stderr
    merged, base = (load_file(folder / "model.safetensors") for folder in (out, base_of(overrides)))
    assert merged.keys() == base.keys()
    changed = {name for name in base if (merged[name] != base[name]).any()}
    assert changed == {name for name in base if name.endswith("proj.weight")}
    tokens = jnp.arange(5, 45, dtype=jnp.int32).reshape(2, 20)
    lora = LoraConfig(rank=4, alpha=8.0)
    graphdef, variables = nnx.split(load_decoder(base_of(overrides), lora=lora), nnx.Param)
    ours = nnx.merge(graphdef, nnx.to_pure_dict(variables) | trained(run))
    whole = load_decoder(out)
    np.testing.assert_allclose(ours.logits(ours(tokens)), whole.logits(whole(tokens)), rtol=0, atol=1e-4)


def test_adapters_alone_are_written_for_peft(run, tmp_path):
    out = tmp_path / "adapters"
    arguments = ("export", "--run", str(run), "--out", str(out), "--adapters")
    assert call(*arguments).returncode == 0
    assert call(*arguments, "--step", "2").returncode == 0  # an export may be replaced by another
    assert call(*arguments).returncode == 0
    facts = json.loads((out / "adapter_config.json").read_text())
    assert (facts["r"], facts["lora_alpha"]) == (4, 8.0)
    tensors = load_file(out / "adapter_model.safetensors")
    ours = trained(run)["adapters"]
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    np.testing.assert_array_equal(tensors[name.format("A")], np.asarray(ours["down_lora_a"][1]).T)
    np.testing.assert_array_equal(tensors[name.format("B")], np.asarray(ours["down_lora_b"][1]).T)
    assert len(tensors) == 2 * 7 * 3
    card = (out / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "peft"
    assert "PeftModel.from_pretrained" in card and "rank=4" in card
    assert not (out / "generation_config.json").exists()  # the base has its own
    both = call(*arguments, "--dtype", "bfloat16")
    assert both.returncode == 2 and "float32" in both.stderr


def test_the_figures_of_a_checkpoint_are_those_the_run_logged_there(run, tmp_path):
    out = tmp_path / "figures.json"
    result = call("evaluate", "--run", str(run), "--json", str(out))
    assert result.returncode == 0, result.stderr
    logged = {name: value for name, value in rows(run)[-1].items() if name.startswith("eval/")}
    assert {f"eval/{name}": value for name, value in json.loads(out.read_text())["metrics"].items()} == logged


def test_adapters_are_not_used_beside_other_weights(train, overrides, run, tmp_path):
    """They mean nothing there; a run that trained everything has all its weights itself."""
    file = base_of(overrides) / "model.safetensors"
    original = file.read_bytes()
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5
    save_file(tensors, file)
    try:
        for result in (
            train(run, *overrides),
            call("export", "--run", str(run), "--out", str(tmp_path / "out")),
            call("evaluate", "--run", str(run)),
        ):
            assert result.returncode == 2, result.stderr
            assert "begun with another student.weights (" in result.stderr
    finally:
        file.write_bytes(original)
    assert train(run, *overrides).returncode == 0


def test_a_dry_run_says_how_much_is_trained(train, overrides, tmp_path, unchecked):
    result = train(tmp_path / "run", *overrides, "--dry-run")
    assert result.returncode == 0, result.stderr
    count = sum(x.size for x in load_file(base_of(overrides) / "model.safetensors").values())
    hidden, queries, keys, wide = 96, 96, 48, 288
    adapters = 3 * 4 * (2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + wide))
    assert f"student: {count + adapters:,} parameters ({adapters:,} of them trained)" in result.stdout


def test_a_run_without_adapters_has_none_to_export(tmp_path):
    shutil.copyfile(ROOT / "configs/quickstart.yaml", tmp_path / "config.yaml")
    result = call("export", "--run", str(tmp_path), "--out", str(tmp_path / "out"), "--adapters")
    assert result.returncode == 2 and "made without student.lora" in result.stderr
