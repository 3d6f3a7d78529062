"""Which ids play a role (end of a turn, think and tool marks), and which tokens are control marks at all."""

import logging
import re
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as RawTokenizer

from jaxdistill.errors import ConfigError, DataError
from jaxdistill.records import ROLES
from jaxdistill.text.byte_table import SPACE_MARK, model_vocabulary
from jaxdistill.text.render import ChatTemplate

logger = logging.getLogger(__name__)

# What a mark is called inside its brackets and bars, most usual first; see `_mark_name`. Families agree on
# the words where they differ in the punctuation: Qwen <think>, Mistral [THINK]. A whole token stands where
# the word alone could mean anything.
_MARKS: Mapping[str, tuple[str, ...]] = {
    "think_open": ("think",),
    "think_close": ("/think",),
    "tool_open": ("tool_call", "tool_call_begin", "python_tag", "tool_calls"),
    "tool_close": ("/tool_call", "tool_call_end"),
    "tool_list_open": ("tool_calls_begin", "tool_calls_section_begin"),
    "tool_list_close": ("tool_calls_end", "tool_calls_section_end"),
    "tool_argument": ("tool_sep", "tool_call_argument_begin", "args"),
    "tool_result_open": ("tool_response", "tool_output_begin", "tool_results"),
    "tool_result_close": ("/tool_response", "tool_output_end", "/tool_results"),
    "end_of_call": ("eom_id", "<|call|>"),
}
_FENCED = re.compile(r"<[|\uff5c].*[|\uff5c]>", re.DOTALL)  # <|x|>, and with full-width bars as in DeepSeek
_BRACKETED = re.compile(r"[<\[]/?[^\s<>\[\]]*[A-Za-z][^\s<>\[\]]*[>\]]")
_FENCE = re.compile(r"(?:<[|\uff5c]|<|\[)(/?)([^|\uff5c<>\[\]]+)(?:[|\uff5c]>|>|\])")
ENDS = ("end_of_turn", "end_of_call")  # the roles that end an assistant's turn
_SENTINEL = "7183940526"  # found again also where a template changes the case
_USER = {"role": "user", "content": "Hi"}
_ASSISTANT = {"role": "assistant", "content": _SENTINEL}
_CALL = {
    "type": "function",
    "id": "a1b2c3d4e",
    "function": {"name": "count", "arguments": {"what": "apples"}},
}
# Chats that begin with the sentinel and show what a template writes between messages.
_SHOWN_BETWEEN = (
    [{**_USER, "content": _SENTINEL}, {**_ASSISTANT, "content": "Hello"}, _USER],
    [
        {**_USER, "content": _SENTINEL},
        {"role": "assistant", "content": "", "reasoning_content": "So", "tool_calls": [_CALL]},
        {"role": "tool", "content": "12", "name": "count", "tool_call_id": _CALL["id"]},
    ],
)


def control_ids(document: Mapping[str, Any], template: ChatTemplate) -> frozenset[int]:
    """Added tokens that steer a model and are no text: special ones, and marks nobody flagged as special.

    Qwen's `<tool_call>` and DeepSeek's user mark are not flagged special, Gemma's space runs and HTML
    tags are not either. A mark is fenced (`<|x|>`), or bracketed and either put outside the model's own
    vocabulary or written by the chat template between messages. What the template says elsewhere (comments,
    instructions before the chat) may well be words: `answer in <b>bold</b>`.
    """
    vocabulary = model_vocabulary(document["model"])
    control: set[int] = set()
    unsure: dict[str, int] = {}
    for entry in document.get("added_tokens") or []:
        content, index = entry["content"], entry["id"]
        bracketed = _BRACKETED.fullmatch(content)
        if entry.get("special") or _FENCED.fullmatch(content) or (bracketed and content not in vocabulary):
            control.add(index)
        elif bracketed:
            unsure[content] = index
    if unsure and template.source:
        shown = [template.probe(chat) or "" for chat in _SHOWN_BETWEEN]
        between = "\n".join(text.partition(_SENTINEL)[2] for text in shown)
        control |= {index for content, index in unsure.items() if content in between}
    return frozenset(control)


def _mark_name(token: str) -> str:
    """A control token's name without its fence: <|x|>, <x>, [X]; "/x" for a closing one."""
    match = _FENCE.fullmatch(token)
    return (match[1] + match[2]).replace(SPACE_MARK, "_").lower() if match else ""


def assign_roles(
    raw: RawTokenizer, template: ChatTemplate, control: frozenset[int], overrides: Mapping[str, str] | None
) -> dict[str, int]:
    """Role -> id: from the overrides (role -> token string), else the end of turn from the template and the
    marks from the control tokens' names.

    Raises ConfigError for an unknown role or token, for two roles on one token, and for a chat template
    behind whose assistant turn no control token stands.
    """
    roles: dict[str, int] = {}
    for role, token in (overrides or {}).items():
        if role not in ROLES:
            known = sorted(ROLES)
            raise ConfigError(f"{template.where}: unknown role {role!r} in roles; expected one of {known}")
        index = raw.token_to_id(token)
        if index is None:
            raise ConfigError(
                f"{template.where}: roles.{role} names {token!r}, which is no token of this vocabulary; "
                "give a token's exact string"
            )
        roles[role] = index
    tokens = {raw.id_to_token(index) or "": index for index in sorted(control, reverse=True)}
    named = {**{_mark_name(token): index for token, index in tokens.items()}, **tokens}
    for role, names in _MARKS.items():
        # A token that the overrides give another role is not also what its name says.
        found = [named[name] for name in names if name in named and named[name] not in roles.values()]
        if role not in roles and found:
            roles[role] = found[0]
    if "end_of_turn" not in roles and template.templates:
        roles["end_of_turn"] = find_end_of_turn(raw, template, control)
    if len(set(roles.values())) < len(roles):
        raise ConfigError(f"{template.where}: two roles share one token: {roles}; give each its own in roles")
    return roles


def find_end_of_turn(raw: RawTokenizer, template: ChatTemplate, control: frozenset[int]) -> int:
    """The control token the chat template puts right behind an assistant's message.

    The template is the only witness: `eos_token` often names the end of a document, not of a turn.

    Raises ConfigError where there is none, or where it opens the next turn.
    """
    remedy = 'name it in the configuration: roles: {"end_of_turn": "<token>"}'
    try:
        text = template.render([_USER, _ASSISTANT], add_generation_prompt=False)
    except DataError as error:
        raise ConfigError(f"the end of turn cannot be derived; {remedy}. {error}") from error
    before, found, after = text.rpartition(_SENTINEL)
    ids = raw.encode(after.lstrip(), add_special_tokens=False).ids if found else []
    # A dummy prefix puts a space of its own before a mark that is matched after normalisation.
    first = next((index for index in ids if raw.id_to_token(index) != SPACE_MARK), None)
    if first is None or first not in control:
        reason = "does not begin with a control token"
    elif _opens_turns(raw.id_to_token(first) or "", before, template):
        reason = "begins with a token that opens turns, as before the assistant's message"
    else:
        return first
    raise ConfigError(
        f"{template.where}: behind an assistant message the chat template puts {after[:40]!r}, which "
        f"{reason}, so the end of turn is unknown; {remedy}"
    )


def _opens_turns(mark: str, before: str, template: ChatTemplate) -> bool:
    """Whether a mark found behind the assistant's message opens turns, in a template that opens the next one
    whether asked to or not: it begins the chat (behind the BOS); or it stands before the message too, and
    no longer behind it once a user's turn follows.
    """
    if before.removeprefix(template.variables.get("bos_token", "")).startswith(mark):
        return True
    longer = template.probe([_USER, _ASSISTANT, _USER]) if mark in before else None
    return longer is not None and not longer.rpartition(_SENTINEL)[2].lstrip().startswith(mark)


def find_stop_ids(
    roles: Mapping[str, int],
    generation: Mapping[str, Any],
    model: Mapping[str, Any],
    control: frozenset[int],
    where: str,
) -> frozenset[int]:
    """What ends a turn, and the eos ids of generation_config.json and config.json.

    An eos id that is ordinary text is left out with a warning: configs carry stale defaults, and such a
    stop would cut responses in the middle of a sentence.
    """
    stops = {roles[role] for role in ENDS if role in roles}
    text_model = model.get("text_config") or {}
    for entry in (generation.get("eos_token_id"), model.get("eos_token_id"), text_model.get("eos_token_id")):
        for index in entry if isinstance(entry, list) else [entry]:
            if index is None or index in stops:
                continue
            if index in control:
                stops.add(index)
            else:
                logger.warning("%s: eos_token_id %s is no control token there; ignored", where, index)
    return frozenset(stops)
