"""Chat messages -> the text a model's own template makes of them."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxdistill.errors import ConfigError, DataError
from jaxdistill.records import Message
from jaxdistill.text import sandbox
from jaxdistill.text.sandbox import Limits, Outcome

logger = logging.getLogger(__name__)

# Two system turns unlike in their words and length, and as long as real ones.
_SYSTEM_TURNS = (
    "You are a helpful assistant who answers in as few words as the question allows.",
    "Reply in verse, whatever the user asks of you, and never speak of the weather or of the time of day.",
)
_SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of one model.

    `variables` are the strings it may refer to, such as `bos_token`; `where` names it in messages;
    `limits` bound each rendering, since a template is a program of whoever published the model.
    """

    where: str
    templates: Mapping[str, str]
    variables: Mapping[str, str]
    limits: Limits = field(default_factory=Limits)
    _drops: dict[str, bool] = field(default_factory=dict, repr=False, compare=False)

    @property
    def source(self) -> str:
        """The template used when no tools are given, or "" without one; part of the fingerprint."""
        return self.templates.get("default", "")

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text. A system turn that the template refuses, or leaves out without a word,
        is folded into the first user turn.

        Raises ConfigError without a template (or with one that is not valid), DataError with the
        template's own message when it refuses the messages, and when it exceeds a limit.
        """
        if not self.templates:
            raise ConfigError(
                f"{self.where}: no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json); give a chat model, or add its template to the folder"
            )
        if not messages:
            raise DataError(f"{self.where}: no messages to render; expected at least one")
        arguments = dict(template_kwargs or {})
        arguments.update(add_generation_prompt=add_generation_prompt, tools=tools, documents=None)
        self._warn_of_tools(messages, tools)
        folded = fold_system_turn(messages)
        if folded is not None and self._drops_system_turn(messages[0]["role"], arguments):
            _say_once(self.where, "leaves a system turn out; it is folded into the first user turn")
            return self._text(folded, self._run(folded, arguments))
        outcome = self._run(messages, arguments)
        if outcome.kind == "refused" and folded is not None:
            second = self._run(folded, arguments)
            if second.kind == "text":
                _say_once(self.where, "refuses a system turn; it is folded into the first user turn")
                return second.text
        return self._text(messages, outcome)

    def probe(self, messages: Sequence[Message]) -> str | None:
        """What the template makes of the messages and a generation prompt, with no system turn folded and
        nothing logged; None where it refuses them."""
        outcome = self._run(messages, {"add_generation_prompt": True, "tools": None, "documents": None})
        return outcome.text if outcome.kind == "text" else None

    def _run(self, messages: Sequence[Message], arguments: Mapping[str, Any]) -> Outcome:
        name = "tool_use" if arguments.get("tools") and "tool_use" in self.templates else "default"
        if name not in self.templates:
            known = sorted(self.templates)
            raise ConfigError(f"{self.where}: no chat template called {name!r}, only {known}; rename one")
        values = {**self.variables, **arguments, "messages": [dict(message) for message in messages]}
        try:
            return sandbox.render(self.templates[name], values, self.limits)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{self.where}: messages, tools and template_kwargs must be JSON values (text, numbers, "
                f"lists, objects), since the template runs in a process of its own: {error}"
            ) from error

    def _drops_system_turn(self, role: str, arguments: Mapping[str, Any]) -> bool:
        """Whether it is all one to the template what a system turn says; asked once.

        Some templates walk over user and assistant turns alone: the model would never see the instructions.
        """
        key = json.dumps(
            [role, {**arguments, "tools": bool(arguments["tools"])}], default=str, sort_keys=True
        )
        if key not in self._drops:
            user = {"role": "user", "content": "Hi"}
            first, second = (
                self._run([{"role": role, "content": text}, user], arguments) for text in _SYSTEM_TURNS
            )
            self._drops[key] = first.kind == "text" and first == second
        return self._drops[key]

    def _warn_of_tools(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> None:
        """Templates older than tool calls leave them out without a word: the model reads another chat."""
        used = {"tools": bool(tools), "tool_calls": any(message.get("tool_calls") for message in messages)}
        for name, is_used in used.items():
            if is_used and not any(name in template for template in self.templates.values()):
                _say_once(self.where, f"has no place for {name}; they are left out")

    def _text(self, messages: Sequence[Message], outcome: Outcome) -> str:
        if outcome.kind == "text":
            return outcome.text
        if outcome.kind == "syntax":
            raise ConfigError(
                f"{self.where}: the chat template is not valid Jinja: {outcome.text}; mend that line, or "
                "name another file as chat_template"
            )
        if outcome.kind == "limit":
            raise DataError(
                f"{self.where}: the chat template was stopped on {len(messages)} messages: it "
                f"{outcome.text}; give shorter messages, or a template that can be trusted"
            )
        roles = [str(message.get("role", "no role")) for message in messages]
        raise DataError(
            f"{self.where}: the chat template refuses messages with roles {roles}: {outcome.text}; "
            "give messages this model's template can render"
        )


_said: set[tuple[str, str]] = set()


def _say_once(where: str, what: str) -> None:
    if (where, what) not in _said:
        _said.add((where, what))
        logger.warning("%s: the template %s", where, what)


def fold_system_turn(messages: Sequence[Message]) -> list[Message] | None:
    """The messages with a leading system turn moved to the head of the first user turn.

    None when there is no leading system turn, or its content is not text.
    """
    first, rest = messages[0], list(messages[1:])
    if first.get("role") not in _SYSTEM_ROLES or not isinstance(first.get("content"), str):
        return None
    if not rest or rest[0].get("role") != "user":
        return [{"role": "user", "content": first["content"]}, *rest]
    content = rest[0].get("content")
    if isinstance(content, str):
        content = f"{first['content']}\n\n{content}"
    else:
        content = [{"type": "text", "text": first["content"]}, *(content or [])]
    return [{**rest[0], "content": content}, *rest[1:]]
