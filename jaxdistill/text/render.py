"""Chat messages -> the text a model's own template makes of them."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from jaxdistill.errors import ConfigError, DataError
from jaxdistill.records import Message

logger = logging.getLogger(__name__)

# What a template's own arithmetic can raise on messages it was not written for.
_TEMPLATE_FAILURES = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of one model.

    `variables` are the strings it may refer to, such as `bos_token`; `where` names it in messages.
    """

    where: str
    templates: Mapping[str, str]
    variables: Mapping[str, str]

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
        """The conversation as text. A system turn the template refuses is folded into the first user turn.

        Raises ConfigError without a template (or with one that is not valid), DataError with the
        template's own message when it refuses the messages.
        """
        if not self.templates:
            raise ConfigError(
                f"{self.where}: no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json); give a chat model, or add its template to the folder"
            )
        if not messages:
            raise DataError(f"{self.where}: no messages to render; expected at least one")
        arguments = dict(template_kwargs or {})
        arguments.update(add_generation_prompt=add_generation_prompt, tools=tools)
        try:
            text = self._run(messages, arguments)
        except _TEMPLATE_FAILURES as error:
            if isinstance(error, TemplateSyntaxError):
                raise ConfigError(f"{self.where}: the chat template is not valid Jinja: {error}") from error
            folded = fold_system_turn(messages)
            if folded is None:
                raise self._refusal(messages, error) from error
            try:
                text = self._run(folded, arguments)
            except _TEMPLATE_FAILURES:
                raise self._refusal(messages, error) from error
            _say_once(self.where)
        return text

    def _run(self, messages: Sequence[Message], arguments: Mapping[str, Any]) -> str:
        # Imported late: transformers takes a second to load, and says on stderr that it has no torch.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers.utils.chat_template_utils import render_jinja_template

        name = "tool_use" if arguments.get("tools") and "tool_use" in self.templates else "default"
        if name not in self.templates:
            known = sorted(self.templates)
            raise ConfigError(f"{self.where}: no chat template called {name!r}, only {known}; rename one")
        chat = [[dict(message) for message in messages]]
        values = {**self.variables, **arguments}
        rendered, _ = render_jinja_template(chat, chat_template=self.templates[name], **values)
        return rendered[0]

    def _refusal(self, messages: Sequence[Message], error: Exception) -> DataError:
        roles = [str(message.get("role", "no role")) for message in messages]
        return DataError(
            f"{self.where}: the chat template refuses messages with roles {roles}: {error}; "
            "give messages this model's template can render"
        )


_said: set[str] = set()


def _say_once(where: str) -> None:
    if where not in _said:
        _said.add(where)
        logger.warning("%s: the template refuses a system turn; it is folded into the first user turn", where)


def fold_system_turn(messages: Sequence[Message]) -> list[Message] | None:
    """The messages with a leading system turn moved to the head of the first user turn.

    None when there is no leading system turn, or its content is not text.
    """
    first, rest = messages[0], list(messages[1:])
    if first.get("role") not in ("system", "developer") or not isinstance(first.get("content"), str):
        return None
    if not rest or rest[0].get("role") != "user":
        return [{"role": "user", "content": first["content"]}, *rest]
    content = rest[0].get("content")
    if isinstance(content, str):
        content = f"{first['content']}\n\n{content}"
    else:
        content = [{"type": "text", "text": first["content"]}, *(content or [])]
    return [{**rest[0], "content": content}, *rest[1:]]
