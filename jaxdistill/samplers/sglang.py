"""Sampling on SGLang servers that are given the student's weights after every step.

A prompt's samples go out as one request, so that the server reads the prompt once. What comes back is checked
as a teacher's text is (`teachers.generation`), and it must have been sampled with weights no older than those
pushed last before it was asked for: else that server is given them again, and asked again.

Letters: P prompt tokens, R response tokens.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from jaxdistill.errors import ConfigError, SamplerContractError, SamplerUnavailable
from jaxdistill.parallel import processes
from jaxdistill.records import Prompt, Rollout, Unscored
from jaxdistill.samplers.base import RolloutConfig, render_prompt
from jaxdistill.samplers.config import SGLangSamplerConfig
from jaxdistill.samplers.served_weights import ServedWeights
from jaxdistill.samplers.stops import StopStrings
from jaxdistill.servers import SAMPLER, Policy, Transport, api_key
from jaxdistill.teachers.checks import (
    BYTES_A_ROW,
    BYTES_AN_ENTRY,
    OWN_ONLY,
    ScoringRow,
    largest_reply,
    scoring_request,
)
from jaxdistill.teachers.generation import BYTES_A_NEW_TOKEN, WritingRow, read_written
from jaxdistill.teachers.handshake import longest_rows
from jaxdistill.teachers.replies import LEAST, ROUNDING, read_reply
from jaxdistill.text import Tokenizer

ROUNDS = 4  # times a row is asked for before a server that keeps answering with other weights ends the run


class _Sampled(NamedTuple):
    ids: Int32[np.ndarray, " R"]
    logprobs: Float32[np.ndarray, " R"]
    finished: bool
    version: int


class SGLangSampler:
    """Samples on servers, with the weights pushed last or newer.

    Rows are drawn from (seed, step, prompt index, sample number) where the servers run with
    `--enable-deterministic-inference`; others draw as they please. `write(params, path)` writes weights as
    a Hugging Face folder, in a `folder` that is this run's own; `vocabulary` is how many ids the model has,
    which may be more than its tokenizer has.
    """

    def __init__(
        self,
        config: SGLangSamplerConfig,
        rollout: RolloutConfig,
        tokenizer: Tokenizer,
        write: Callable[[Any, Path], None],
        folder: Path,
        *,
        vocabulary: int,
        seed: int,
    ):
        """Raises `ConfigError` where the API key's variable is not set; no request is made yet."""
        self.config = config
        self.rollout = rollout
        self.tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._seed = seed
        key, hint = api_key(SAMPLER, config.api_key_env)
        self._transport = Transport(SAMPLER, config.endpoints, Policy.of(config), api_key=key, key_hint=hint)
        self._weights = ServedWeights(self._transport, folder, write)

    def check(self) -> None:
        """Ask the servers for what they read. Raises `SamplerUnavailable`, or `ConfigError` where that is
        less than the run's longest row."""
        needed = self.rollout.max_prompt_tokens + self.rollout.max_new_tokens
        for endpoint, longest in longest_rows(SAMPLER, self._transport).items():
            if longest < needed:
                raise ConfigError(
                    f"sampler at {endpoint} reads {longest} tokens, and rows have up to {needed} "
                    "(rollout.max_prompt_tokens + rollout.max_new_tokens); serve it with a longer "
                    "--context-length, or lower them"
                )

    def push(self, params: Any, version: int) -> None:
        """New weights, on every server that answers; see `ServedWeights.push`."""
        self._weights.push(params, version)

    def sample(self, prompts: Sequence[Prompt], step: int, *, samples: int | None = None) -> list[Rollout]:
        """Respond to each prompt of this process's share `samples` times (default: the config's).

        Raises `SamplerUnavailable`, or `SamplerContractError` for replies that must not be believed; then no
        response of the step is returned."""
        samples = self.rollout.samples_per_prompt if samples is None else samples
        numbers = processes.share(len(prompts))
        prompts = [prompts[number] for number in numbers]
        prompt_ids = [render_prompt(self.tokenizer, prompt, self.rollout) for prompt in prompts]
        groups = [
            [
                WritingRow(
                    place * samples + sample,
                    ids,
                    self.rollout.max_new_tokens,
                    self._row_seed(step, number, prompt.index, sample),
                )
                for sample in range(samples)
            ]
            for place, (number, prompt, ids) in enumerate(zip(numbers, prompts, prompt_ids, strict=True))
        ]
        found = self._draw(groups)
        own = self._model_logprobs(groups, found)
        return [
            Rollout(
                prompt=prompt,
                prompt_ids=ids,
                response=self.tokenizer.spans(found[row.number].ids),
                logprobs=found[row.number].logprobs,
                model_logprobs=own.get(row.number),
                finished=found[row.number].finished,
                policy_version=found[row.number].version,
                vocabulary=self.tokenizer.vocab_fingerprint,
            )
            for prompt, ids, group in zip(prompts, prompt_ids, groups, strict=True)
            for row in group
        ]

    def take_counts(self) -> dict[str, int]:
        """What happened since the last call; see `Transport.take_counts`."""
        return self._transport.take_counts()

    def close(self) -> None:
        """Close the connections and remove the pushed weights; calling it again does nothing."""
        self._transport.close()
        self._weights.close()

    def _draw(self, groups: Sequence[Sequence[WritingRow]]) -> dict[int, _Sampled]:
        """Every row by its number, sampled with the weights pushed last before this call, or newer."""
        found: dict[int, _Sampled] = {}
        oldest, why = self._weights.version, ""
        gave_up: SamplerUnavailable | None = None
        missing = [list(group) for group in groups]
        for _ in range(ROUNDS):
            replies = self._transport.post_all(
                "/generate",
                [self._request(group) for group in missing],
                largest_reply=[sum(map(_largest, group)) for group in missing],
            )
            behind: set[str] = set()
            gave_up = None
            for reply, group in zip(replies, missing, strict=True):
                if not isinstance(reply.body, list) or len(reply.body) != len(group):
                    raise SamplerContractError(
                        f"sampler at {reply.endpoint}: got {reply.body!r:.80}, expected a list of "
                        f"{len(group)} results, one for each row; check that the address is an SGLang "
                        "server's"
                    )
                for result, row in zip(reply.body, group, strict=True):
                    try:
                        ids, finished, label = read_written(
                            SAMPLER, result, row, self._vocabulary, reply.endpoint
                        )
                    except SamplerUnavailable as error:  # as a server does that is being ended
                        gave_up = error
                        continue
                    version = self._version(result, label)
                    if version is None or version < oldest:
                        why = f"weight_version {label!r} from {reply.endpoint}, expected version {oldest}"
                        behind.add(reply.endpoint)
                    elif (ids >= self.tokenizer.vocab_size).any():
                        # A padded vocabulary: what no tokenizer can write is drawn anew.
                        why = f"id {ids.max()} from {reply.endpoint}, which the tokenizer has not"
                    else:
                        logprobs = _logprobs(result, row, ids, reply.endpoint)
                        found[row.number] = self._ended(row, ids, logprobs, finished, version)
            missing = [
                rest for group in missing if (rest := [row for row in group if row.number not in found])
            ]
            if not missing:
                return found
            for endpoint in sorted(behind):
                self._weights.push_again(endpoint)
        if gave_up is not None:
            raise gave_up
        raise SamplerContractError(
            f"some rows had no usable sample after {ROUNDS} rounds, the last one: {why}; if another run "
            "pushes its weights to this server, give each run servers of its own"
        )

    def _version(self, result: Any, label: str) -> int | None:
        """The oldest weights that wrote any of a response: servers that take new ones in its middle list
        them all. None where some are not of this run."""
        spans = result["meta_info"].get("weight_versions")
        labels = {label}
        if isinstance(spans, list):
            labels |= {str(span.get("version")) for span in spans if isinstance(span, dict)}
        versions = [self._weights.version_of(one) for one in labels]
        return None if None in versions else min(version for version in versions if version is not None)

    def _request(self, group: Sequence[WritingRow]) -> dict[str, Any]:
        rollout = self.rollout
        common: dict[str, Any] = {
            "temperature": rollout.temperature,
            "max_new_tokens": rollout.max_new_tokens,
            "stop_token_ids": sorted(self.tokenizer.stop_ids),
        }
        if rollout.stop:
            common |= {"stop": list(rollout.stop), "no_stop_trim": True}
        return {
            "input_ids": [row.prompt.tolist() for row in group],
            "sampling_params": [common | {"sampling_seed": row.seed} for row in group],
            "return_logprob": True,
            "logprob_start_len": -1,
        }

    def _ended(
        self,
        row: WritingRow,
        ids: Int32[np.ndarray, " R"],
        logprobs: Float32[np.ndarray, " R"],
        finished: bool,
        version: int,
    ) -> _Sampled:
        """The row up to its stop string, where it has one: the server looks for them in decoded text and may
        see one later, this package in the bytes."""
        if self.rollout.stop:
            end = StopStrings(self.rollout.stop, self.tokenizer)(row.number, ids)
            if end is not None:
                return _Sampled(ids[:end], logprobs[:end], True, version)
        return _Sampled(ids, logprobs, finished, version)

    def _model_logprobs(
        self, groups: Sequence[Sequence[WritingRow]], found: Mapping[int, _Sampled]
    ) -> dict[int, Float32[np.ndarray, " R"]]:
        """What the model gave each token at temperature 1, by row: a second request, where the servers say it
        at another temperature (at 0 they say it at 1)."""
        if self.rollout.temperature in (0.0, 1.0):
            return {}
        asked = [
            [ScoringRow(row.number, row.prompt, found[row.number].ids) for row in group] for group in groups
        ]
        replies = self._transport.post_all(
            "/generate",
            [scoring_request(rows) for rows in asked],
            largest_reply=[largest_reply(rows, OWN_ONLY) for rows in asked],
        )
        own: dict[int, Float32[np.ndarray, " R"]] = {}
        for reply, rows in zip(replies, asked, strict=True):
            scores = read_reply(reply.body, rows, OWN_ONLY, self._vocabulary)
            for row, score in zip(rows, scores, strict=True):
                assert row.number is not None
                if isinstance(score, Unscored):
                    raise SamplerContractError(f"sampler at {reply.endpoint}: {score.detail}")
                if (version := self._weights.version_of(score.weight_version)) != found[row.number].version:
                    raise SamplerContractError(
                        f"sampler at {reply.endpoint}: {row.label} was scored by version {version} and "
                        f"sampled by {found[row.number].version}; with a temperature other than 1 use one "
                        "server, and rollout.max_staleness=0"
                    )
                own[row.number] = score.logprobs
        return own

    def _row_seed(self, *numbers: int) -> int:
        key = ":".join(map(str, (self._seed, *numbers))).encode()
        return int.from_bytes(hashlib.sha256(key).digest()[:4]) >> 1  # 31 bits, which every server takes


def _largest(row: WritingRow) -> int:
    return BYTES_A_ROW + row.new * (BYTES_A_NEW_TOKEN + BYTES_AN_ENTRY)


def _logprobs(
    result: Any, row: WritingRow, ids: Int32[np.ndarray, " R"], endpoint: str
) -> Float32[np.ndarray, " R"]:
    """The log-probabilities of a result's new tokens; raises `SamplerContractError` for what cannot be."""

    def refused(got: str, expected: str) -> SamplerContractError:
        return SamplerContractError(
            f"sampler at {endpoint}: {row.label}: got {got}, expected {expected}; the reply cannot be used"
        )

    entries = result["meta_info"].get("output_token_logprobs")
    if not isinstance(entries, list) or len(entries) != len(ids):
        raise refused(
            f"output_token_logprobs {entries!r:.80}", f"a list of {len(ids)}, one for each new token"
        )
    values = np.zeros(len(ids), np.float32)
    for place, (entry, token) in enumerate(zip(entries, ids.tolist(), strict=True)):
        value = entry[0] if isinstance(entry, list) and len(entry) >= 2 and entry[1] == token else None
        if (type(value) is not float and type(value) is not int) or not LEAST <= value <= ROUNDING:
            raise refused(f"output_token_logprobs[{place}] {entry!r:.80}", f"[log-probability, {token}, ...]")
        values[place] = min(value, 0.0)
    return values
