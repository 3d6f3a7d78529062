"""What the files of a checkpoint held when it was written.

Orbax notices a file that is gone or cut short, not one with another byte: the chunks of its arrays carry no
checksum, and such a checkpoint is read without a word. So a digest of each file is kept beside it, made by a
thread behind as soon as the checkpoint is whole. One that was not sealed yet when its run was killed counts
as whole: it was published by an atomic rename.
"""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxdistill.errors import CheckpointError
from jaxdistill.metrics import write_atomically


class Seals:
    """The seals of a run's checkpoints, `folder`/STEP.json."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._behind = ThreadPoolExecutor(1, "seal")

    def make(self, step: int, checkpoint: Path) -> None:
        """Seal the folder `checkpoint`, behind."""
        self._behind.submit(self._make, step, checkpoint)

    def _make(self, step: int, checkpoint: Path) -> None:
        try:
            facts = digests(checkpoint)
        except FileNotFoundError:  # already too old to be kept
            return
        write_atomically(self._file(step), json.dumps(facts, indent=1).encode())

    def check(self, step: int, checkpoint: Path) -> None:
        """Raise `CheckpointError` where a sealed checkpoint does not hold what it held; without a seal
        nothing is said."""
        file = self._file(step)
        if not file.is_file():
            return
        try:
            before = json.loads(file.read_text())
            now = digests(checkpoint)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"checkpoint {checkpoint} cannot be checked ({error})") from error
        changed = [name for name in before if now.get(name) != before[name]]
        if changed:
            what = "is missing" if changed[0] not in now else "is not what was written"
            raise CheckpointError(
                f"checkpoint {checkpoint} is damaged: {changed[0]} {what} ({len(changed)} of {len(before)} "
                "files differ)"
            )

    def drop_others(self, steps: Iterable[int]) -> None:
        """Forget the seals of all but these checkpoints."""
        kept = {self._file(step) for step in steps}
        for file in self.folder.glob("*.json"):
            if file not in kept:
                file.unlink(missing_ok=True)

    def _file(self, step: int) -> Path:
        return self.folder / f"{step}.json"

    def close(self) -> None:
        """Wait for the seal under way."""
        self._behind.shutdown()


def digests(folder: Path) -> dict[str, str]:
    """BLAKE2b of each file below `folder`, by its path there."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            found[str(path.relative_to(folder))] = hashlib.file_digest(file, "blake2b").hexdigest()
    return found
