"""The student's weights on the servers that sample for it.

Every version is written as a folder in Hugging Face format, which the servers are told to load
(`/update_weights_from_disk`); from then on their replies carry its label. A label is the run's own: where two
runs push to one server, each finds the other's replies to be none of its own.
"""

import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from jaxdistill.errors import SamplerContractError, SamplerUnavailable
from jaxdistill.parallel import processes
from jaxdistill.servers import Transport

logger = logging.getLogger(__name__)

UPDATE = "/update_weights_from_disk"


class ServedWeights:
    """Writes weights below `folder`, which is its own, by `write(params, path)`, and has the servers behind
    `transport` load them. Processes of one run write one folder: each calls `push`, the first tells the
    servers."""

    def __init__(self, transport: Transport, folder: Path, write: Callable[[Any, Path], None]):
        self.version = -1
        self._transport = transport
        self._write = write
        self._run = ""
        self._folder = folder.expanduser().absolute()

    def push(self, params: Any, version: int) -> None:
        """Have all servers sample with `params` from now on.

        A server that does not answer is left behind while another one takes them: its replies, once it is
        back, say that it did (`push_again`). Raises `SamplerUnavailable` where none answers,
        `SamplerContractError` where one refuses, `ConfigError` where the folder cannot be written."""
        if not self._run:
            self._run = processes.gather("the label of the pushed weights", uuid4().hex[:8])[0]
        if processes.leads():
            self._make_room()
        with processes.watched(f"the writing of the weights of version {version}"):
            self._write(params, self._path(version))
        loading = f"the loading of the weights of version {version} by the servers"
        with processes.together(loading, longer_s=self._transport.policy.start_timeout_s):
            if processes.leads():
                self._tell(version)
        self.version = version

    def push_again(self, endpoint: str) -> None:
        """Have one server that is behind, or was restarted, load the newest version."""
        logger.warning("sampler at %s has other weights than version %d: they are pushed again",
                       endpoint, self.version)  # fmt: skip
        try:
            reply = self._transport.post(UPDATE, self._order(self.version), endpoint=endpoint)
        except SamplerUnavailable as error:  # gone again: the others go on
            if len(self._transport.endpoints) == 1:
                raise
            logger.warning("%s (it is left behind)", error)
        else:
            self._check(endpoint, reply.body)

    def version_of(self, label: str) -> int | None:
        """The version a reply's `weight_version` stands for; None for weights that are not of this run."""
        run, _, version = label.partition(".")
        return int(version) if run == self._run and version.isdigit() else None

    def close(self) -> None:
        """Remove the folder; the servers keep what they have loaded."""
        if processes.leads():
            shutil.rmtree(self._folder, ignore_errors=True)

    def _make_room(self) -> None:
        """Remove what a killed run has left, and all but the last version, which a server that is behind may
        still be loading. What cannot be removed stays: the other processes wait in the writing."""
        with suppress(OSError):
            for old in self._folder.iterdir():
                if old != self._path(self.version):
                    shutil.rmtree(old, ignore_errors=True)

    def _tell(self, version: int) -> None:
        answers = self._transport.post_everywhere(UPDATE, self._order(version))
        silent = [error for error in answers.values() if isinstance(error, SamplerUnavailable)]
        if len(silent) == len(answers):
            raise silent[0]
        for endpoint, answer in answers.items():
            if isinstance(answer, SamplerUnavailable):
                logger.warning("%s (it is left behind at version %d)", answer, version)
            elif isinstance(answer, Exception):
                raise self._refused(endpoint, str(answer), version) from answer
            else:
                self._check(endpoint, answer.body)

    def _order(self, version: int) -> dict[str, Any]:
        # The cache holds keys and values of the weights before.
        return {
            "model_path": str(self._path(version)),
            "weight_version": f"{self._run}.{version}",
            "flush_cache": True,
        }

    def _check(self, endpoint: str, body: Any) -> None:
        if not isinstance(body, dict) or body.get("success") is not True:
            raise self._refused(endpoint, repr(body)[:300], self.version)

    def _refused(self, endpoint: str, said: str, version: int) -> SamplerContractError:
        return SamplerContractError(
            f"sampler at {endpoint}: the weights in {self._path(version)} were not loaded ({said}); check "
            "that the server sees sampler.weights under the same path, and serves the student's own model"
        )

    def _path(self, version: int) -> Path:
        return self._folder / f"version-{version}"
