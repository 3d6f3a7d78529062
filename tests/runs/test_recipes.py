"""Each recipe fits the hardware in its name by the plan of `--dry-run`, and docs/recipes.md says the same."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from jaxdistill.config import load
from jaxdistill.errors import ConfigError
from jaxdistill.run_config import RunConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/recipes.md").read_text()
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
# The objectives that two recipes name as another way to run them.
VARIANTS = [
    ("qwen3_1.7b_gkd_from_llama3.1_8b_1xh100", "objective=null objective.kind=minillm"),
    ("llama3.2_1b_minillm_from_qwen3_8b_1xh100", "objective=null objective.kind=gkd"),
]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plan_recipes", ROOT / "scripts/plan_recipes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script()


@pytest.fixture
def planner(script: ModuleType) -> ModuleType:
    """The script, where the tokenizers are that it needs; a test that has none is skipped."""
    for family in script.FAMILIES.values():
        if not (script.CACHE / "tokenizers" / family / "tokenizer.json").is_file():
            pytest.skip(f"no tokenizer {family}; make it with: .venv/bin/python scripts/fetch_tokenizers.py")
    return script


def numbers(line: str) -> list[float]:
    """The last three cells."""
    return [float(cell) for cell in line.split("|")[-4:-1]]


@pytest.mark.slow
@pytest.mark.genuine
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_fits_the_hardware_in_its_name(name: str, planner: ModuleType) -> None:
    plan = planner.dry_run(name)
    assert plan.fits and "NOT FIT" not in plan.text, plan.text
    assert max(plan.step, plan.sampling) <= plan.room
    made = planner.row(name, plan)
    (shown,) = [line for line in PAGE.splitlines() if line.startswith(f"| [`{name}`]")]
    assert shown.split("|")[:-4] == made.split("|")[:-4]
    # Another processor's programs take a little more or less.
    assert numbers(shown) == pytest.approx(numbers(made), rel=0.05, abs=0.06), (
        "scripts/plan_recipes.py --write"
    )


@pytest.mark.slow
@pytest.mark.genuine
@pytest.mark.parametrize(("name", "override"), VARIANTS)
def test_the_variant_that_a_recipe_names_fits_too(name: str, override: str, planner: ModuleType) -> None:
    assert override in (ROOT / f"configs/{name}.yaml").read_text()
    plan = planner.dry_run(name, *override.split())
    assert plan.fits, plan.text


@pytest.mark.slow
@pytest.mark.genuine
def test_a_recipe_on_too_small_a_device_does_not_fit_and_says_what_helps(planner: ModuleType) -> None:
    plan = planner.dry_run("smollm2_from_gemma3_cpu", memory=2)
    assert not plan.fits
    assert "a step does NOT FIT into the 1.80 GiB that may be used; what helps:" in plan.text
    assert "optimizer.moment_dtype=bfloat16" in plan.text


def test_every_recipe_is_on_the_page_and_none_that_is_not_there() -> None:
    assert sorted(re.findall(r"^\| \[`([^`]+)`\]", PAGE, flags=re.MULTILINE)) == NAMES


def test_the_hardware_is_read_off_the_name(script: ModuleType) -> None:
    assert script.hardware("quickstart") == ("CPU", 16)
    assert script.hardware("a_from_b_1xh100") == ("1 H100", 78)
    assert script.hardware("a_from_b_2x8xh200") == ("2 x 8 H200", 139)
    with pytest.raises(ConfigError, match="its name ends with no hardware"):
        script.hardware("a_from_b")
    # What the student gets of a GPU that it shares is what the recipe tells to set.
    assert script.device_memory("qwen3_1.7b_from_llama3.1_8b_1xh100") == pytest.approx(0.55 * 78)


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("Qwen3-1.7B", 1.72e9),
        ("Qwen3-8B", 8.19e9),
        ("Qwen3-30B-A3B", 30.5e9),
        ("Llama-3.2-1B-Instruct", 1.24e9),
        ("smollm2-135m-instruct", 0.1345e9),
    ],
)
def test_the_shapes_are_those_of_models_this_large(model: str, parameters: float, script: ModuleType) -> None:
    shapes = script.tensors(script.parse_config(script.CONFIGS[model], model))
    assert sum(script.math.prod(shape) for _, shape in shapes) == pytest.approx(parameters, rel=0.005)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_how_it_is_started_and_does_not_write_into_anothers_run(name: str) -> None:
    text = (ROOT / f"configs/{name}.yaml").read_text()
    assert name == "quickstart" or "_cpu" in name or re.search(r"^#   \S", text, flags=re.MULTILINE)
    places = {one: load(ROOT / f"configs/{one}.yaml", [], RunConfig).run.dir for one in NAMES}
    assert list(places.values()).count(places[name]) == 1
