"""The training step: CPU seconds beside bare JAX and torch; on an accelerator, the share of its peak.

`python benchmarks/step.py [--torch-python PATH] [--smoke] [--out FILE]`

On a CPU: the whole step (`make_train_step`: forward, tiled head, gradient, clipping, AdamW, state donated) of
SmolLM2-135M's shape with random weights, `sft` on 4 rows x 512 tokens in float32, with `student.remat` both
`layer` and `none`. The peer is step_bare.py, with the same two kinds of remat, scanned and written out, and
the faster of the two counts; with --torch-python, a Python that has torch and transformers, step_torch.py
too. All take turns, seconds are the least of the rounds. Before, all take two steps from the same weights:
losses and gradient norms must agree to 1e-4, those of the second step too, which say that the update was the
same.

On an accelerator: the same step of Qwen3-1.7B's shape, 8 rows x 2,048 tokens, products in bfloat16. What is
measured is the model's FLOPs (`shapes.step_flops`) over wall seconds and the device's peak (devices.py, or
--peak-flops), with the faster of the `--remat`.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import step_bare
from devices import peak, platform, spent
from flax import nnx
from measure import Report, Seconds, figure, in_turns, options, peer_process, timed
from shapes import QWEN3_1_7B, SMOLLM2_135M, TINY, step_flops

from jaxdistill.losses.sft import SFT, SFTConfig
from jaxdistill.optimizer import OptimizerConfig, make_optimizer
from jaxdistill.packing import blank
from jaxdistill.parallel import MeshConfig, make_mesh, param_shardings, place_batch
from jaxdistill.step import initial_state, make_train_step, state_shapes
from jaxdistill.students import Decoder, abstract_decoder, parse_config, save_decoder
from jaxdistill.students.decoder import Remat

SLOWER, UTILISATION = 1.1, 0.4
TOLERANCE = 1e-4
RATE, DECAY, CLIP = 1e-4, 0.1, 1.0
SIZES = {"cpu": {"rows": 4, "length": 512}, "accelerator": {"rows": 8, "length": 2048}}
SMOKE = {"rows": 2, "length": 16, "rounds": 1, "remat": ["layer"], "peak_flops": 1e12}

Said = tuple[float, float]  # of a step: loss, gradient norm


class Form(NamedTuple):
    """One way to take a step: a new state from the weights all forms start with, and (state) -> (the next
    state, loss, gradient norm)."""

    begin: Callable[[], Any]
    step: Callable[[Any], tuple[Any, Any, Any]]


def batch_tokens(vocab: int, rows: int, length: int) -> np.ndarray:
    """int32 [B, T]; step_torch.py draws the same."""
    return np.random.default_rng(0).integers(0, vocab, (rows, length)).astype(np.int32)


def our_form(decoder: Decoder, remat: Remat, tokens: np.ndarray) -> Form:
    """jaxdistill's step, put together as a run does it."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    kind = abstract_decoder(decoder.config, mesh=mesh, compute_dtype=decoder.compute_dtype, remat=remat)
    graphdef, abstract = nnx.split(kind, nnx.Param)
    shardings = param_shardings(abstract, mesh)
    params = nnx.to_pure_dict(nnx.state(decoder, nnx.Param))
    # A norm of the gradient above CLIP is the rule with random weights: clipping takes part.
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=RATE, schedule="constant", weight_decay=DECAY, clip_norm=CLIP), 10
    )
    rows, length = tokens.shape
    response = np.ones(tokens.shape, bool)
    response[:, 0] = False  # a prompt of one token
    weight = np.ones(rows, np.float32)
    batch = replace(blank(rows, length, {}), tokens=tokens, response_mask=response, weight=weight)
    placed = place_batch(batch, mesh)

    def begin() -> Any:
        own = jax.device_put(jax.tree.map(jnp.copy, params), shardings)
        return initial_state(nnx.merge(graphdef, own), optimizer, mesh)[0]

    shapes, _ = state_shapes(kind, optimizer, mesh)
    taken = make_train_step(graphdef, SFT(SFTConfig()), optimizer, shapes, mesh)

    def step(state: Any) -> tuple[Any, Any, Any]:
        state, metrics = taken(state, {}, placed)
        return state, metrics["loss"].total / metrics["loss"].weight, metrics["grad_norm"].total

    return Form(begin, step)


def bare_form(decoder: Decoder, raw: dict[str, Any], tokens: np.ndarray, *, remat: bool, scan: bool) -> Form:
    params = nnx.to_pure_dict(nnx.state(decoder, nnx.Param))
    taken = step_bare.make_step(raw, remat=remat, rate=RATE, decay=DECAY, clip=CLIP)

    def begin() -> step_bare.State:
        own = jax.tree.map(jnp.copy, params)
        return step_bare.begin(own if scan else step_bare.unstacked(own))

    return Form(begin, lambda state: taken(state, jnp.asarray(tokens)))


def two_steps(form: Form) -> list[Said]:
    """What two steps say; compiles."""
    state, said = form.begin(), []
    for _ in range(2):
        state, loss, norm = form.step(state)
        said.append((float(loss), float(norm)))
    return said


def one_step(form: Form) -> Seconds:
    """A first step's seconds."""
    state = jax.block_until_ready(form.begin())
    return timed(lambda: jax.block_until_ready(form.step(state)))


def torch_peer(
    decoder: Decoder, raw: dict[str, Any], tokens: np.ndarray, python: str, stack: ExitStack
) -> Callable[[], dict[str, Any]]:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    (folder / "source").mkdir()
    (folder / "source" / "config.json").write_text(json.dumps(raw))
    save_decoder(decoder, folder / "model", source=folder / "source")
    script = Path(__file__).with_name("step_torch.py")
    sizes = map(str, (*tokens.shape, RATE, DECAY, CLIP))
    return peer_process([python, str(script), str(folder / "model"), *sizes], stack)


def beside_peers(arguments: argparse.Namespace, report: Report) -> None:
    """Seconds over those of the peers, in float32."""
    raw = SMOLLM2_135M | (TINY if arguments.smoke else {})
    config = parse_config(raw, "this benchmark")
    decoder = Decoder(config, rngs=nnx.Rngs(0))
    tokens = batch_tokens(config.vocab_size, arguments.rows, arguments.length)
    forms = {f"ours, {remat}": our_form(decoder, remat, tokens) for remat in ("layer", "none")}
    for name, scan in (("scanned", True), ("written out", False)):
        for remat in ("layer", "none"):
            form = bare_form(decoder, raw, tokens, remat=remat == "layer", scan=scan)
            forms[f"bare, {remat}, {name}"] = form
    with ExitStack() as stack:
        said = {name: two_steps(form) for name, form in forms.items()}
        works = {name: partial(one_step, form) for name, form in forms.items()}
        if arguments.torch_python is not None:
            peer = torch_peer(decoder, raw, tokens, arguments.torch_python, stack)
            answers = [peer() for _ in range(2)]
            said["torch"] = [(answer["loss"], answer["grad_norm"]) for answer in answers]

            def torch_step() -> Seconds:
                answer = peer()
                return Seconds(answer["cpu"], answer["wall"])

            works["torch"] = torch_step
        for name, found in said.items():
            np.testing.assert_allclose(found, said["ours, layer"], rtol=TOLERANCE, err_msg=name)
        taken = in_turns(works, rounds=arguments.rounds)

    def least(prefix: str) -> float:
        return min(spent(seconds) for name, seconds in taken.items() if name.startswith(prefix))

    unit = f"times the seconds of the peer, {arguments.rows} x {arguments.length} tokens, float32"
    every = {name: {"cpu": round(s.cpu, 3), "wall": round(s.wall, 3)} for name, s in taken.items()}
    loss, norm = said["ours, layer"][0]
    report.add(
        figure("step_over_bare_jax", least("ours") / least("bare"), unit, SLOWER)
        | {"seconds": every, "loss": loss, "grad_norm": norm}
    )
    for remat in ("layer", "none"):
        ratio = least(f"ours, {remat}") / least(f"bare, {remat}")
        report.add(figure(f"step_over_bare_jax_remat_{remat}", ratio, unit, SLOWER))
    if "torch" in taken:
        report.add(figure("step_over_torch", least("ours") / least("torch"), unit, None))


def utilisation(arguments: argparse.Namespace, report: Report) -> None:
    """The model's FLOPs a second over the device's, in bfloat16."""
    config = parse_config(QWEN3_1_7B | (TINY if arguments.smoke else {}), "this benchmark")
    most = peak("flops", arguments.peak_flops)
    decoder = Decoder(config, rngs=nnx.Rngs(0), compute_dtype=jnp.bfloat16)
    tokens = batch_tokens(config.vocab_size, arguments.rows, arguments.length)
    forms = {remat: our_form(decoder, remat, tokens) for remat in arguments.remat}
    said = {remat: two_steps(form) for remat, form in forms.items()}
    assert np.isfinite(list(said.values())).all(), said
    works = {remat: partial(one_step, form) for remat, form in forms.items()}
    wall = {remat: s.wall for remat, s in in_turns(works, rounds=arguments.rounds).items()}
    flops = step_flops(config, arguments.rows, arguments.length)
    unit = f"of {most / 1e12:g} TFLOP/s, {arguments.rows} x {arguments.length} tokens, bfloat16"
    report.add(
        figure("step_utilisation", flops / min(wall.values()) / most, unit, UTILISATION, least=True)
        | {"wall_seconds": {remat: round(s, 4) for remat, s in wall.items()}, "step_tflops": flops / 1e12}
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = options(__doc__)
    parser.set_defaults(**SIZES[platform()])
    parser.add_argument("--torch-python", metavar="PATH", help="a Python with torch and transformers")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--remat", nargs="+", choices=("layer", "dots", "none"), default=["layer", "dots"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak-flops", type=float, help="of the accelerator, bfloat16 products a second")
    arguments = parser.parse_args(argv)
    report = Report("step", arguments)
    measurements = {"cpu": beside_peers, "accelerator": utilisation}
    if arguments.smoke:
        vars(arguments).update(SMOKE)
    else:
        measurements = {platform(): measurements[platform()]}
    for measure in measurements.values():
        measure(arguments, report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
