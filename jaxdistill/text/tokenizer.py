"""A model's tokenizer as bytes: sampled ids -> bytes, bytes -> ids, messages -> prompt ids.

Letters: N tokens, C contents, P prompt tokens, V vocabulary ids.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64
from tokenizers import Tokenizer as RawTokenizer

from jaxdistill.errors import ConfigError, DataError
from jaxdistill.records import OTHER_SPECIAL, ROLES, Message, TokenSpans
from jaxdistill.text.byte_table import build_table, detect_family, model_vocabulary
from jaxdistill.text.content import ContentEncoder
from jaxdistill.text.files import TokenizerFiles, read_files, special_strings
from jaxdistill.text.render import ChatTemplate
from jaxdistill.text.roles import ENDS, assign_roles, control_ids, find_stop_ids
from jaxdistill.text.turns import RenderedTurns, TurnEncoder, end_strings, find_turns


def _open_raw(files: TokenizerFiles) -> RawTokenizer:
    try:
        raw = RawTokenizer.from_str(files.source)
    except Exception as error:
        if type(error) is not Exception:  # the library raises plain Exception for a file it cannot read
            raise
        raise ConfigError(
            f"{files.where}: the `tokenizers` library refuses tokenizer.json ({error}); fetch it again, or "
            "write it anew with save_pretrained()"
        ) from error
    raw.no_truncation()
    raw.no_padding()
    return raw


def _check_ids(files: TokenizerFiles, raw: RawTokenizer) -> None:
    """Raises ConfigError where the file and the library differ about an id, or two tokens share one.

    The library reads the model's pieces as they are listed but numbers added tokens itself, and then renders
    prompts with other ids than the tables here are made of.
    """
    added = {entry["content"]: entry["id"] for entry in files.document.get("added_tokens") or []}
    remedy = "write the file anew with save_pretrained() of the tokenizer that the model was trained with"
    for content, listed in added.items():
        used = raw.token_to_id(content)
        if used != listed:
            raise ConfigError(
                f"{files.where}: tokenizer.json lists the added token {content!r} as id {listed}, but the "
                f"`tokenizers` library takes it for {used}; {remedy}"
            )
    ids = {**model_vocabulary(files.document["model"]), **added}
    if len(set(ids.values())) == len(ids):
        return
    seen: dict[int, str] = {}
    for piece, index in ids.items():
        if index in seen:
            raise ConfigError(
                f"{files.where}: id {index} stands for both {seen[index]!r} and {piece!r} in tokenizer.json; "
                f"{remedy}"
            )
        seen[index] = piece


def _vocabulary_size(files: TokenizerFiles) -> int:
    """One more than the highest id; a model's vocabulary may be padded beyond its tokenizer's."""
    added = [entry["id"] for entry in files.document.get("added_tokens") or []]
    highest = max([*model_vocabulary(files.document["model"]).values(), *added], default=-1)
    text_model = files.model.get("text_config") or {}
    padded = files.model.get("vocab_size") or text_model.get("vocab_size") or 0
    return max(highest + 1, int(padded))


class Tokenizer:
    """One model's tokenizer. Made by `Tokenizer.load`; immutable afterwards.

    `vocab_size` counts ids, padding of the model's vocabulary included. `roles` maps a role's name (of
    `records.ROLES`) to its id. `stop_ids` end a generation. `control` holds
    the ids that carry no bytes because they steer the model: special tokens, roles and marks.
    """

    def __init__(self, files: TokenizerFiles, roles: Mapping[str, str] | None = None) -> None:
        """Builds the tables and runs the self-test; raises ConfigError where the bytes cannot be known."""
        self.where = files.where
        self._files = files
        family = detect_family(files.document, files.where)
        self._raw = _open_raw(files)
        _check_ids(files, self._raw)
        template = ChatTemplate(files.template_where, files.templates, special_strings(files.config))
        self._template = template
        control = control_ids(files.document, template)
        self.roles: Mapping[str, int] = assign_roles(self._raw, template, control, roles)
        self.control: frozenset[int] = control | frozenset(self.roles.values())
        self.stop_ids: frozenset[int] = find_stop_ids(
            self.roles, files.generation, files.model, self.control, files.where
        )
        self.vocab_size: int = _vocabulary_size(files)
        self._table = build_table(files.document, family, self.vocab_size, self.control)
        # An id without bytes says nothing about the text: it must not be taken for content.
        self._role_of_id = np.where(self._table.lengths == 0, OTHER_SPECIAL, 0).astype(np.int8)
        # Whichever id a model stops with (many have two), it ends the turn: the teacher's token for that
        # role answers it, else stopping by the other id would cost nothing.
        self._role_of_id[list(self.stop_ids)] = ROLES["end_of_turn"]
        for role, index in self.roles.items():
            self._role_of_id[index] = ROLES[role]
        self._content = ContentEncoder(files.document, self._table, self._role_of_id != 0, files.where)

    @classmethod
    def load(
        cls,
        path: str,
        *,
        roles: Mapping[str, str] | None = None,
        chat_template: str | Path | None = None,
    ) -> "Tokenizer":
        """Loads from a folder with tokenizer.json, or from a hub id. Never runs code from there.

        `roles` overrides which token (by its string) plays a role, `chat_template` (a Jinja file) what the
        folder says of chats. Raises ConfigError for a missing
        folder, an unknown role or token, or a tokenizer whose bytes cannot be known.
        """
        return cls(read_files(str(path), chat_template), roles)

    @property
    def family(self) -> str:
        """The rule by which pieces stand for bytes: "byte-level" or "sentencepiece"."""
        return self._table.family

    @property
    def missing_bytes(self) -> bytes:
        """Bytes no token of this vocabulary stands for; `encode` has to leave them out. Usually none, and
        never one that ordinary text needs: such a tokenizer is refused."""
        return self._table.missing

    def token_bytes(self, ids: Sequence[int] | Int32[np.ndarray, " N"]) -> list[bytes]:
        """Content bytes of each id; b"" for control tokens and for ids the vocabulary has no entry for.

        Raises DataError for an id outside [0, vocab_size).
        """
        return [self._table.pieces[i] for i in self._checked(ids).tolist()]

    def spans(self, ids: Sequence[int] | Int32[np.ndarray, " N"]) -> TokenSpans:
        """Sampled ids beside their bytes. Nothing is re-encoded: any ids are fine, canonical or not.

        Raises DataError for an id outside [0, vocab_size).
        """
        checked = self._checked(ids)
        data, ends = self._table.join(checked)
        return TokenSpans(checked, data, ends, self._role_of_id[checked])

    def encode(self, content: bytes | str) -> TokenSpans:
        """Plain content: control strings in it stay text, nothing is normalised, no prefix is put before.

        Total on any bytes; `.data` equals the content, but for bytes no token of the vocabulary stands for.
        """
        return self.encode_batch([content])[0]

    def encode_batch(self, contents: Sequence[bytes | str]) -> list[TokenSpans]:
        """`encode` of many contents in one threaded call."""
        raw = [c.encode("utf-8", "surrogatepass") if isinstance(c, str) else c for c in contents]
        return [self.spans(ids) for ids in self._content.encode_batch(raw)]

    def encode_short(
        self, contents: Sequence[bytes]
    ) -> tuple[Int32[np.ndarray, " N"], Int64[np.ndarray, " N"], Int64[np.ndarray, " C"]]:
        """`encode` of very many short contents without a record for each: all ids in one row, the byte at
        which each ends in the tokens' bytes one after another, and how many ids are each content's."""
        ids, counts = self._content.encode_short(contents)
        return ids, np.cumsum(self._table.lengths[ids]), counts

    def role_span(self, role: str) -> TokenSpans:
        """One token that plays `role`. Raises ConfigError when this tokenizer has none."""
        if role not in self.roles:
            raise ConfigError(
                f"{self.where}: no token plays the role {role!r} here (known: {sorted(self.roles)}); "
                "name one under roles in the configuration"
            )
        return self.spans(np.asarray([self.roles[role]], np.int32))

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Int32[np.ndarray, " P"]:
        """Prompt ids: the chat template's text with its control strings parsed, no second BOS added.

        Raises ConfigError without a template, DataError when the template refuses the messages or they
        hold half a surrogate pair, which is no text.
        """
        text = self._template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            template_kwargs=template_kwargs,
        )
        return np.asarray(self._prompt_ids(text), np.int32)

    def render_turns(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        last_only: bool = False,
    ) -> RenderedTurns:
        """A whole chat, and which of its ids each assistant turn (with `last_only`: the last one) generates,
        its end of turn with it.

        Each turn's text is encoded apart from what stands before it. Tool output, like every other message,
        belongs to no turn. `spans(ids[turn])` of two tokenizers can be aligned turn by turn.

        Raises DataError for a template that writes an asked-for turn anew once others follow (it then needs a
        prompt of its own), ConfigError without an end of turn; otherwise as `render`.
        """

        def text(part: Sequence[Message], add_generation_prompt: bool) -> str:
            rendered = self._template.render(
                part,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                template_kwargs=template_kwargs,
            )
            return self._checked_text(rendered)

        ends = end_strings(self.control_strings, [self.roles[r] for r in ENDS if r in self.roles], self.where)
        quoted, typed = self._turn_encoder.set_aside(messages)
        whole, turns = find_turns(quoted, text, ends, self.where, last_only=last_only)
        return self._turn_encoder.encode(whole, turns, typed)

    @cached_property
    def control_strings(self) -> dict[str, int]:
        """The string of each control token, as templates write it, and its id."""
        return {piece: index for index in sorted(self.control) if (piece := self._raw.id_to_token(index))}

    @cached_property
    def _turn_encoder(self) -> TurnEncoder:
        marks = {index for role, index in self.roles.items() if role not in ENDS}
        return TurnEncoder(
            self._prompt_ids,
            lambda text: self.encode(text).ids.tolist(),
            self.control_strings,
            frozenset(piece for piece, index in self.control_strings.items() if index in marks),
        )

    def _prompt_ids(self, text: str) -> list[int]:
        return self._raw.encode(self._checked_text(text), add_special_tokens=False).ids

    def _checked_text(self, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{self.where}: the rendered messages hold {text[error.start]!a}, half a surrogate pair, at "
                f"character {error.start}; give messages that are valid Unicode"
            ) from error
        return text

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of vocabulary, merges, added tokens and chat template."""
        return _digest([*self._identity, self._template.source])

    @property
    def template_fingerprint(self) -> str:
        """sha256 of the chat templates in use, whichever file they come from."""
        return _digest(dict(self._template.templates))

    @cached_property
    def vocab_fingerprint(self) -> str:
        """sha256 of all that decides how text becomes ids, and of which id ends a turn; equal means that one
        model can read the other's ids as they are. (A base model that ends with `<|endoftext|>` has another
        one than the chat model of the same vocabulary: there its end is mapped by role.)"""
        document = self._files.document
        parts = [document.get("normalizer"), document.get("pre_tokenizer"), self.roles.get("end_of_turn")]
        return _digest([*self._identity, *parts])

    @property
    def _identity(self) -> list[Any]:
        model = self._files.document["model"]
        # Merges are written as "a b" or as ["a", "b"], depending on the library's version.
        merges = [m.split(" ") if isinstance(m, str) else list(m) for m in model.get("merges") or []]
        added = sorted(self._files.document.get("added_tokens") or [], key=lambda entry: entry["id"])
        return [model["vocab"], merges, added]

    def _checked(self, ids: Sequence[int] | Int32[np.ndarray, " N"]) -> Int32[np.ndarray, " N"]:
        array = np.asarray(ids, np.int64).reshape(-1)
        if array.size and (array.min() < 0 or array.max() >= self.vocab_size):
            bad = array[(array < 0) | (array >= self.vocab_size)]
            raise DataError(
                f"{self.where}: {bad.size} of {array.size} token ids are outside the vocabulary of "
                f"{self.vocab_size} (first: {bad[0]}); were they sampled with another model?"
            )
        return array.astype(np.int32)


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def concatenate(parts: Sequence[TokenSpans]) -> TokenSpans:
    """The tokens of all parts one after another, as one sequence."""
    if not parts:
        return TokenSpans(np.zeros(0, np.int32), b"", np.zeros(0, np.int64), np.zeros(0, np.int8))
    before = np.cumsum([0, *(len(part.data) for part in parts[:-1])])
    return TokenSpans(
        np.concatenate([part.ids for part in parts]),
        b"".join(part.data for part in parts),
        np.concatenate([part.ends + offset for part, offset in zip(parts, before, strict=True)]),
        np.concatenate([part.roles for part in parts]),
    )
