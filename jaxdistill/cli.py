"""What every command line shares: errors become one message and an exit code."""

import sys
from collections.abc import Callable

from jaxdistill.errors import JaxDistillError

INTERRUPTED = 130


def exit_code_of(body: Callable[[], object], *, after_interrupt: str = "") -> int:
    """Run `body`; a deliberate error goes to stderr as one message and gives its exit code.

    0 done, 2 bad config or data, 75 try again later, 130 interrupted (the message ends with
    `after_interrupt`), 1 otherwise. Any other exception is a bug of ours and keeps its traceback.
    """
    try:
        body()
    except JaxDistillError as error:
        print(f"jaxdistill: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"jaxdistill: interrupted{after_interrupt}", file=sys.stderr)
        return INTERRUPTED
    return 0
