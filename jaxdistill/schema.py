"""`python -m jaxdistill.schema`: the JSON schema of a run's YAML file, for editors."""

import json
import sys
from collections.abc import Sequence

from jaxdistill.cli import CommandParser, exit_code_of


def parser() -> CommandParser:
    """What the command takes."""
    return CommandParser(
        "schema",
        "Print the JSON schema of a run's YAML file. An editor with a YAML language server checks and "
        "completes a file that begins with the line `# yaml-language-server: $schema=FILE`; it lies in "
        "configs/schema.json too.",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the schema; the exit code (see `cli.exit_code_of`)."""
    return exit_code_of(lambda: print(schema_text(), end=""), parser().read(argv))


def schema_text() -> str:
    """The schema of `RunConfig` as JSON text."""
    # Imported here, not above: it takes seconds, and `--help` needs none of it.
    from jaxdistill.config import json_schema
    from jaxdistill.run_config import RunConfig

    return json.dumps(json_schema(RunConfig), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.exit(main())
