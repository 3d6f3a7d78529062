"""What every command line shares: errors become one message and an exit code."""

import sys
from collections.abc import Callable

from jaxdistill.errors import JaxDistillError
from jaxdistill.stopping import Stopped

INTERRUPTED = 130


def exit_code_of(body: Callable[[], object], *, after_stop: str = "") -> int:
    """Run `body`; a deliberate error goes to stderr as one message and gives its exit code.

    0 done, 2 bad config or data, 75 try again later (of a run that was `Stopped` the message ends with
    `after_stop`), 130 interrupted, 1 otherwise. Any other exception is a bug of ours and keeps its traceback.
    """
    try:
        body()
    except JaxDistillError as error:
        print(f"jaxdistill: {error}", file=sys.stderr)
        return error.exit_code
    except Stopped as stopped:
        print(f"jaxdistill: {stopped}{after_stop}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("jaxdistill: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0
