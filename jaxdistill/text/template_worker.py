"""Runs as a process of its own: chat templates in, text out, one JSON line each.

A template is a program by whoever uploaded the model. Jinja's sandbox keeps it from the file system, not
from running or growing for ever; a process can be killed. This file imports nothing of the package and is
started by its path, so that it is ready in a tenth of a second and holds nothing worth stealing.

Request: {"template", "values", "seconds", "characters"}; reply: {"kind", "text"}, see `sandbox.Outcome`.
"""

import json
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# What a template's own arithmetic can raise on messages it was not written for.
_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names messages carry their reasoning under


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what a model wrote, for training scripts; the text is the same without."""

    tags = {"generation"}  # noqa: RUF012 - jinja reads the attribute of the class

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The block's own content."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which no chat model was trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def environment() -> ImmutableSandboxedEnvironment:
    """What chat templates expect to find: transformers' settings, filters and functions."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    return environment().from_string(source)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under the names templates read it by."""
    found = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if found is None:
        return message
    return {"thinking": found, **message, "reasoning_content": found}


def render(template: str, values: dict[str, Any], characters: int) -> dict[str, str]:
    """The reply to one request, without a limit on its time."""
    try:
        messages = [_with_reasoning(message) for message in values["messages"]]
        parts: list[str] = []
        length = 0
        # Piece by piece: a text that is too long is noticed before it fills the memory.
        for part in _compiled(template).generate(**{**values, "messages": messages}):
            parts.append(part)
            length += len(part)
            if length > characters:
                return {"kind": "limit", "text": f"wrote more than {characters} characters"}
        return {"kind": "text", "text": "".join(parts)}
    except MemoryError:
        return {"kind": "limit", "text": "needed more memory than it is given"}
    except jinja2.TemplateSyntaxError as error:
        return {"kind": "syntax", "text": f"{error.message} (line {error.lineno})"}
    except _FAILURES as error:
        return {"kind": "refused", "text": str(error)}


def main() -> None:
    """Serve requests until the standard input closes; `sys.argv[1]` is the address space in bytes."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = int(sys.argv[1])
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    print("{}", flush=True)  # ready
    for line in sys.stdin:
        request = json.loads(line)
        # Whoever asked kills this process when its time is up; the alarm does it where nobody is left to.
        signal.setitimer(signal.ITIMER_REAL, 2 * request["seconds"] + 1)
        reply = render(request["template"], request["values"], request["characters"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
