"""Scores on disk: recorded beside a live teacher, and replayed without one.

A folder holds the scores of one teacher as Parquet files, one a scored batch. A score is found again by
what the teacher read: the ids of its prompt and of the response. So a run with the same seed replays
from start to end, and whatever a dead run was scored with can be looked at.

Letters: P prompt tokens, S response tokens, K top-k.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int32

from jaxdistill.errors import ConfigError, DataError
from jaxdistill.records import Prompt, Rollout, TeacherScores, Unscored
from jaxdistill.teachers.base import View, teacher_views
from jaxdistill.teachers.config import ReplayConfig
from jaxdistill.teachers.generation import Written
from jaxdistill.teachers.identity import TeacherIdentity
from jaxdistill.text import Tokenizer

_TEACHER = b"jaxdistill.teacher"  # schema metadata: the teacher's identity as JSON
_TOLERANCE = b"jaxdistill.canary_tolerance"  # and how far its canary may have moved since the first file
_OPEN_PARTS = 4  # files held in memory: a run asks for one batch after the other
_SCHEMA = pa.schema(
    {
        "key": pa.binary(32),
        "prompt": pa.list_(pa.int32()),
        "response": pa.list_(pa.int32()),
        "logprobs": pa.list_(pa.float32()),
        "top_k": pa.int32(),
        "topk_ids": pa.list_(pa.int32()),  # [S, K] row by row
        "topk_logprobs": pa.list_(pa.float32()),
        "end_logprobs": pa.list_(pa.float32()),
        "weight_version": pa.string(),
    }
)


class ScoreRecorder:
    """Writes every scored batch into `folder`, whole or not at all."""

    def __init__(self, folder: Path, identity: TeacherIdentity, *, tolerance: float):
        """The folder is made with the first batch. Raises `ConfigError` where it holds another teacher's
        scores."""
        self.folder = folder
        self._schema = _SCHEMA.with_metadata(
            {_TEACHER: json.dumps(identity.to_json()).encode(), _TOLERANCE: str(tolerance).encode()}
        )
        parts = _parts(folder)
        if parts and (other := _identity(parts[0])[0].difference(identity, tolerance)):
            raise ConfigError(
                f"teacher.record={folder} holds another teacher's scores ({other}); choose another folder"
            )
        self._next = 1 + max((int(part.stem.partition("-")[2]) for part in parts), default=-1)

    def write(self, views: Sequence[View], scores: Sequence[TeacherScores]) -> None:
        """Add the scores of one batch; `views` are what the teacher was to read, in the same order.

        Rows without scores are left out. Raises `DataError` where the folder cannot be written."""
        rows = [_row(view, s) for view, s in zip(views, scores, strict=True) if len(s.response)]
        if not rows:
            return
        path = self.folder / f"part-{self._next:06d}.parquet"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows, schema=self._schema), temporary, compression="zstd")
            os.link(temporary, path)  # fails where another process wrote this part meanwhile
        except OSError as error:
            raise DataError(
                f"{path}: the scores cannot be written ({error.strerror or error}); make room, see that no "
                "other process records there, or leave out teacher.record"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        self._next += 1


class ReplayTeacher:
    """Scores rollouts from a recording; a rollout that is not in it is `Unscored`."""

    def __init__(self, config: ReplayConfig, tokenizer: Tokenizer):
        """Reads the recording. Raises `ConfigError` where there is none, where it was made with another
        tokenizer, or where it lacks what the config asks for."""
        self.name = config.name
        self.config = config
        self.tokenizer = tokenizer
        parts = _parts(config.path)
        if not parts:
            raise ConfigError(
                f"teacher.path={config.path} holds no recorded scores (part-*.parquet); record some with "
                "teacher.record in a run with a live teacher"
            )
        self.identity, tolerance = _identity(parts[0])
        if self.identity.tokenizer != self.tokenizer.fingerprint:
            raise ConfigError(
                f"teacher.path={config.path} was recorded with tokenizer {self.identity.tokenizer[:12]}, but "
                f"teacher.tokenizer={config.tokenizer} is {self.tokenizer.fingerprint[:12]}; name that one"
            )
        # Where each score lies: file and row. One recorded twice was asked twice, by a resumed run or another
        # epoch; the last one stands.
        self._places: dict[bytes, tuple[Path, int]] = {}
        for part in parts:
            if other := self.identity.difference(_identity(part)[0], tolerance):
                raise ConfigError(f"{part} holds the scores of another teacher than {parts[0].name}: {other}")
            self._index(part)
        # A recording can be larger than the memory, and is asked for in the order it was made.
        self._open = lru_cache(_OPEN_PARTS)(partial(_read, columns=self._columns))
        self._missing = 0

    def check(self) -> TeacherIdentity:
        """The recorded teacher's identity; nothing has to be reached."""
        return self.identity

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        """The recorded scores of each rollout, in the order given."""
        views = teacher_views(self.tokenizer, rollouts, self.config.template_kwargs)
        return [self._score(rollout, view) for rollout, view in zip(rollouts, views, strict=True)]

    def generate(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
    ) -> list[Written | Unscored]:
        """Raises `ConfigError`: a recording holds scores, and writes nothing."""
        raise ConfigError(
            f"teacher {self.name!r} replays recorded scores and cannot write responses; name a live teacher, "
            "or give rollout.origins.teacher no share"
        )

    def take_counts(self) -> dict[str, int]:
        """Rollouts the recording did not hold, since the last call."""
        missing, self._missing = self._missing, 0
        return {"not_recorded": missing}

    def close(self) -> None:
        """Nothing is held open."""

    def _score(self, rollout: Rollout, view: View) -> TeacherScores:
        prompt, response = view
        place = self._places.get(_key(view))
        if place is None and len(response):
            self._missing += 1
            why = Unscored(
                "not_recorded",
                f"{self.config.path} has no scores for this response to {rollout.prompt.where} "
                f"({len(prompt)} prompt and {len(response)} response tokens)",
            )
            return TeacherScores(response.head(0), np.zeros(0, np.float32), self.name, "", unscored=why)
        if place is None:
            return TeacherScores(response, np.zeros(0, np.float32), self.name, "")

        part, row = place
        table = self._open(part)

        def column(name: str) -> np.ndarray:
            return table[name][row].values.to_numpy(zero_copy_only=False)

        logprobs = column("logprobs")
        k = self.config.top_k
        shape = (len(logprobs), -1)
        return TeacherScores(
            response=response.head(len(logprobs)),
            logprobs=logprobs,
            teacher=self.name,
            weight_version=table["weight_version"][row].as_py(),
            topk_ids=column("topk_ids").reshape(shape)[:, :k] if k else None,
            topk_logprobs=column("topk_logprobs").reshape(shape)[:, :k] if k else None,
            end_logprobs=column("end_logprobs") if self.config.end_logprobs else None,
        )

    @property
    def _columns(self) -> list[str]:
        """What has to be read of a file to answer."""
        extras = ["topk_ids", "topk_logprobs"] if self.config.top_k else []
        return [
            "logprobs",
            "weight_version",
            *extras,
            *(["end_logprobs"] if self.config.end_logprobs else []),
        ]

    def _index(self, part: Path) -> None:
        """Note where the scores of one file lie. Raises `ConfigError` where they lack what is asked for."""
        table = _read(part, ["key", "top_k", *(["end_logprobs"] if self.config.end_logprobs else [])])
        fewest = min(table["top_k"].to_pylist())
        if fewest < self.config.top_k:
            raise ConfigError(
                f"teacher.top_k={self.config.top_k}, but {part} was recorded with {fewest}; ask for no more "
                "than that"
            )
        if self.config.end_logprobs and table["end_logprobs"].null_count:
            raise ConfigError(
                f"teacher.end_logprobs=true, but {part} was recorded without them; leave it out"
            )
        for row, key in enumerate(table["key"].to_pylist()):
            self._places[key] = (part, row)


def _key(view: View) -> bytes:
    """What a score is found by: the ids of both parts, told apart by the prompt's length."""
    prompt, response = view
    head = len(prompt).to_bytes(8, "little")
    return hashlib.sha256(head + _bytes(prompt) + _bytes(response.ids)).digest()


def _bytes(ids: Int32[np.ndarray, " N"]) -> bytes:
    return np.ascontiguousarray(ids, "<i4").tobytes()


def _row(view: View, scores: TeacherScores) -> Mapping[str, Any]:
    prompt, response = view
    k = 0 if scores.topk_ids is None else scores.topk_ids.shape[1]
    flat = {
        name: None if value is None else value.reshape(-1)
        for name, value in (
            ("topk_ids", scores.topk_ids),
            ("topk_logprobs", scores.topk_logprobs),
            ("end_logprobs", scores.end_logprobs),
        )
    }
    return {
        "key": _key(view),
        "prompt": prompt,
        "response": response.ids,
        "logprobs": scores.logprobs,
        "top_k": k,
        "weight_version": scores.weight_version,
        **flat,
    }


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def _read(part: Path, columns: Sequence[str]) -> pa.Table:
    try:
        return pq.read_table(part, columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{part} cannot be read as recorded scores ({error}); remove it") from error


def _identity(part: Path) -> tuple[TeacherIdentity, float]:
    """Whose scores a file holds, and by how many nats a token its canary may differ from the others'."""
    try:
        metadata = pq.read_schema(part).metadata or {}
        return TeacherIdentity.from_json(json.loads(metadata[_TEACHER])), float(metadata[_TOLERANCE])
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"{part} does not say whose scores it holds ({error!r}); expected a file written by "
            "teacher.record, remove it"
        ) from error
