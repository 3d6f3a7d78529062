"""`python -m jaxdistill.doctor --config FILE [a.b=c ...]`: what a run would meet, said before it starts.

Nothing is written and nothing is trained; every teacher is asked, an embedded one is started for it.
"""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxdistill.align import align
from jaxdistill.align.compare import compare, table
from jaxdistill.align.side import Side
from jaxdistill.align.texts import built_in
from jaxdistill.cli import CommandParser, exit_code_of, overrides
from jaxdistill.config import load
from jaxdistill.errors import JaxDistillError
from jaxdistill.records import Prompt, Rollout
from jaxdistill.teachers import (
    ReplayConfig,
    Routes,
    ServedSettings,
    Teacher,
    TeacherConfig,
    build,
    tokenizer_doubt,
)
from jaxdistill.text import Tokenizer, concatenate

if TYPE_CHECKING:
    from jaxdistill.run_config import RunConfig

QUESTION = Prompt([{"role": "user", "content": "Write something."}], 0, "doctor")


def parser() -> CommandParser:
    """What the command takes."""
    parser = CommandParser("doctor", "Check a run before it starts: its files, its data, its teachers.")
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="the run's YAML file")
    overrides(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Say what was found; the exit code is 0 where a run can start, else that of the first thing in its way
    (2: config or data, 75: a teacher that does not answer, 1: one that must not be believed)."""
    options = parser().read(argv)

    def body() -> None:
        # Imported here, not above: jax takes seconds to import, and `--help` needs none of it.
        from jaxdistill.run_config import RunConfig

        examine(load(options.config, options.overrides, RunConfig))

    return exit_code_of(body, options)


def examine(config: "RunConfig") -> None:
    """Print what is found, part by part. A teacher in trouble does not keep the others from being asked;
    the first trouble is raised at the end, for its exit code."""
    from jaxdistill.assemble import check_start  # as in `main`
    from jaxdistill.inputs import read_inputs

    student = Side.load(config.student.path, config.student.roles, config.student.chat_template)
    say(student.lines("student"))
    inputs = read_inputs(config, shapes_only=True)  # all that a run reads but the weights, with its checks
    say([f"data  {config.data.path}: {len(inputs.rows):,} prompts, {len(inputs.heldout.prompts):,} held out"])
    routes = Routes(config.all_teachers, config.run.seed)
    counts = Counter(routes.choose(row) for row in inputs.rows) if config.all_teachers else Counter()
    troubles: list[JaxDistillError] = []
    for settings in config.all_teachers:
        try:
            examine_teacher(settings, student, counts[settings.name])
        except JaxDistillError as trouble:
            say([f"  TROUBLE  {trouble}"])
            troubles.append(trouble)
    if troubles:
        raise type(troubles[0])(
            f"{len(troubles)} of {len(config.all_teachers)} teachers cannot be used, see above"
        )
    check_start(config, inputs)
    say(["nothing stands in the way of a new run"])


def examine_teacher(settings: TeacherConfig, student: Side, prompts: int) -> None:
    """One teacher: who it is, whether it is believed, how fast it is, and how its tokens fit."""
    side = Side.load(settings.tokenizer_path, settings.roles, settings.chat_template)
    say(["", *side.lines(f"teacher {settings.name}"), f"  scores {prompts:,} of the prompts"])
    begin = time.perf_counter()
    # Its questions are no part of a recording.
    live = settings.model_copy(update={"record": None}) if isinstance(settings, ServedSettings) else settings
    teacher = build(live, side.tokenizer)
    try:
        say([f"  answers, checked in {time.perf_counter() - begin:.1f} s", *_identity_lines(teacher)])
        if not isinstance(settings, ReplayConfig):
            say([_speed_line(teacher, student.tokenizer)])
    finally:
        teacher.close()
    say(["", table(compare(student.tokenizer, side.tokenizer, built_in())), ""])


def _identity_lines(teacher: Teacher) -> list[str]:
    it = teacher.identity
    doubt = tokenizer_doubt(teacher)
    return [
        f"  serves {it.model} ({it.model_type}), weights {it.weight_version!r}, reads {it.longest:,} tokens",
        "  tokenizer is the served model's own" if doubt is None else f"  WARNING  {doubt}",
        f"  canary {np.mean(it.canary):.3f} nats a token over {len(it.canary)} tokens",
    ]


def _speed_line(teacher: Teacher, student: Tokenizer) -> str:
    """Built-in texts as responses, scored twice: the second time nothing is compiled or started any more."""
    contents = [content for texts in built_in().values() for content in texts]
    rollouts = [_as_response(student, content) for content in contents]
    teacher.score(rollouts)
    begin = time.perf_counter()
    scores = teacher.score(rollouts)
    seconds = time.perf_counter() - begin
    tokens = sum(len(s.logprobs) for s in scores)
    logprob = sum(float(s.logprobs.sum()) for s in scores)
    bytes_ = sum(len(s.response.data) for s in scores)
    aligned = sum(
        align(r.response, s.response).coverage * len(r.response.data)
        for r, s in zip(rollouts, scores, strict=True)
    )
    share = aligned / sum(len(r.response.data) for r in rollouts)
    unscored = sum(s.unscored is not None for s in scores)
    return (
        f"  scored {len(scores) - unscored} of {len(scores)} texts: {tokens / seconds:,.0f} of its tokens/s, "
        f"{-logprob / max(bytes_, 1):.3f} nats a byte, {100 * share:.1f} % of the bytes aligned"
    )


def _as_response(student: Tokenizer, content: bytes) -> Rollout:
    spans = concatenate([student.encode(content), student.role_span("end_of_turn")])
    return Rollout(
        prompt=QUESTION,
        prompt_ids=student.render(QUESTION.messages),
        response=spans,
        logprobs=np.zeros(len(spans), np.float32),
        finished=True,
        policy_version=0,
        vocabulary=student.vocab_fingerprint,
    )


def say(lines: Sequence[str]) -> None:
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    sys.exit(main())
