"""Where else a run's values go: TensorBoard, Weights & Biases, trackio; each behind the same four calls.

The services' packages are extras: they are imported when a run has asked for them.
"""

import contextlib
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tensorboardX import SummaryWriter

from jaxdistill import logs
from jaxdistill.errors import ConfigError
from jaxdistill.metrics.rows import write_atomically

SERVICES = ("wandb", "trackio")  # as they are called in `run`, in pyproject's extras, and by Python


@runtime_checkable
class Tracker(Protocol):
    """Something that shows a run's values."""

    def resume_at(self, step: int) -> None:
        """The run goes on at `step`: as itself, or at step 0 as a new one. Comes before any value."""
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Values of a step; more of the same step may follow."""
        ...

    def flush(self) -> None:
        """The step's row is whole and on disk."""
        ...

    def close(self) -> None:
        """Let go; calling it again does nothing."""
        ...


def check_installed(projects: Mapping[str, str | None]) -> None:
    """Raise `ConfigError` where a service that has a project here is not installed."""
    for service, project in projects.items():
        if project is not None and find_spec(service) is None:
            raise ConfigError(
                f"run.{service}={project} needs the package {service}, which is not installed; "
                f"pip install 'jaxdistill[{service}]', or leave run.{service} out"
            )


def make_trackers(
    folder: Path | None, config: Mapping[str, Any], *, tensorboard: bool, projects: Mapping[str, str | None]
) -> list[Tracker]:
    """What the run in `folder` is shown by: `projects` are those of `SERVICES` by name, None where it is not
    wanted. `config` is the run's, as plain values. Without a folder nothing shows it: that is for a process
    whose values another one writes. Services must have passed `check_installed`."""
    if folder is None:
        return []
    classes: Mapping[str, type[WandB | Trackio]] = {"wandb": WandB, "trackio": Trackio}
    wanted = [(classes[name], project) for name, project in projects.items() if project is not None]
    own: list[Tracker] = [TensorBoard(folder)] if tensorboard else []
    return [*own, *(make(folder, project, config) for make, project in wanted)]


class TensorBoard:
    """Event files under `tb/`; a resumed run's say from which step on they take the place of earlier ones."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tb"
        self._writer: SummaryWriter | None = None

    def resume_at(self, step: int) -> None:
        self.close()
        if self._folder.exists():
            self._open(purge_step=step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        writer = self._writer or self._open(purge_step=None)
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self, purge_step: int | None) -> SummaryWriter:
        # Event files are named by the second: two of one second would overwrite each other, and
        # TensorBoard reads them in the order of their names.
        suffix = f".{len(list(self._folder.glob('*'))):04d}"
        self._writer = SummaryWriter(str(self._folder), purge_step=purge_step, filename_suffix=suffix)
        return self._writer


class _Service:
    """What the services have alike: a run of theirs in a `project`, which sends by itself."""

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any]) -> None:
        self._folder, self._project, self._config = folder, project, config
        self._run: Any = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """It sends by itself."""


class WandB(_Service):
    """A run of Weights & Biases, its files under `wandb/`. WANDB_MODE=offline keeps it on this machine.

    W&B takes no step that lies before its last one, so that the steps a resumed run repeats stay as they
    were first logged."""

    def resume_at(self, step: int) -> None:
        import wandb  # an extra

        self.close()
        entity, _, project = self._project.rpartition("/")
        settings = wandb.Settings(console="off", silent=logs.quiet() or logs.as_json())
        identity = _identity(self._folder, "wandb", fresh=step == 0)
        try:
            self._run = wandb.init(
                entity=entity or None,
                project=project,
                dir=self._folder,
                id=identity,
                name=self._folder.resolve().name,
                config=dict(self._config),
                resume="allow",
                settings=settings,
            )
        except wandb.Error as error:
            raise ConfigError(
                f"run.wandb={self._project}: wandb could not begin the run ({' '.join(str(error).split())}); "
                "log in with `wandb login`, set WANDB_MODE=offline, or leave run.wandb out"
            ) from error

    def close(self) -> None:
        if self._run is not None:
            # Closed on the way out of an error or a stop, the run is shown as one that failed.
            self._run.finish(exit_code=int(sys.exception() is not None))
            self._run = None


class Trackio(_Service):
    """A run of trackio, in its own database (TRACKIO_DIR) or where its environment variables say. The steps
    a resumed run repeats stand there twice."""

    def resume_at(self, step: int) -> None:
        import trackio  # an extra

        self.close()
        name = f"{self._folder.resolve().name}-{_identity(self._folder, 'trackio', fresh=step == 0)}"
        try:
            with _said_on_stderr():
                self._run = trackio.init(
                    self._project,
                    name=name,
                    config=dict(self._config),
                    resume="allow",
                    embed=False,
                    auto_log_gpu=False,
                    auto_log_cpu=False,
                )
        except Exception as error:  # it has none of its own: whatever its clients raise comes through
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ConfigError(
                f"run.trackio={self._project}: trackio could not begin the run ({said:.300}); check "
                "TRACKIO_SPACE_ID and the like, or leave run.trackio out"
            ) from error

    def close(self) -> None:
        if self._run is not None:
            import trackio  # an extra

            with _said_on_stderr():
                trackio.finish()  # the run's own method would be called once more when Python ends
            self._run = None


def _identity(folder: Path, service: str, *, fresh: bool) -> str:
    """What a service knows the run in `folder` by; with `fresh` something new, else what it was."""
    path = folder / f"{service}_run"
    if fresh or not path.is_file():
        write_atomically(path, secrets.token_hex(4).encode())
    return path.read_text().strip()


@contextlib.contextmanager
def _said_on_stderr() -> Iterator[None]:
    """What a library prints is no result of the command; nobody hears it where that is not wanted."""
    silent = logs.quiet() or logs.as_json()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if silent else sys.stderr):
        yield
