"""Arbitrary bytes -> ids that carry exactly those bytes: the plain-content half of a tokenizer.

The genuine tokenizer does three things that must not happen to a response: it parses control strings
into control tokens, it normalises Unicode, and it may put a space in front. A second tokenizer is built
from the same file with these three removed. Whatever still comes back altered is replaced by byte tokens.

Letters: V vocabulary ids, N tokens, C contents.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64
from tokenizers import Tokenizer as RawTokenizer

from jaxdistill.errors import ConfigError
from jaxdistill.text.byte_table import SPACE_MARK, ByteTable

logger = logging.getLogger(__name__)

# What UTF-8 writes text with: tab, line ends, and every character that Unicode assigns. No other control
# characters, no bytes that only unassigned or private characters begin with (0xEE, 0xF1, 0xF2, 0xF4), and
# none that UTF-8 never holds.
ORDINARY = bytes([9, 10, 13, *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xEE), 0xEF, 0xF0, 0xF3])
# One piece of everything that has broken a tokenizer: every line is encoded at load and must come back.
SELF_TEST = (
    "Hello world, it's 12345 + 67890 = 80235.",
    "  two spaces\n\n\n\ttabs\t\tand 40 spaces:" + " " * 40 + "end \r\n",
    "cafe\u0301 caf\u00e9 \u212b \ufb01 \u00bd \uff21",  # NFD, NFC, and characters NFKC would replace
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u4f60\u597d\uff0c\u4e16\u754c \u3053\u3093",
    "\u0645\u0631\u062d\u0628\u0627 \u2248\u221a\u00f7 \u200b\u202e\u00a0\ufeff",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd",
    "x = [i**2 for i in range(10)]  # \\frac{a}{b}\n",
    "nul \x00 and bell \x07",
    " ",
    "a",
)
_NOT_TEXT = {"byte-level": "\udc80-\udcff", "sentencepiece": "\udc80-\udcff" + SPACE_MARK}


def _strip_normalizer(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """Only what turns characters into the vocabulary's alphabet stays: the space mark and the byte map."""
    if part is None:
        return None
    if part["type"] == "Sequence":
        kept = [inner for child in part["normalizers"] if (inner := _strip_normalizer(child))]
        return {"type": "Sequence", "normalizers": kept} if kept else None
    marks_space = part["type"] == "Replace" and part["pattern"] == {"String": " "}
    return part if part["type"] == "ByteLevel" or (marks_space and part["content"] == SPACE_MARK) else None


def _strip_pre_tokenizer(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """The same cuts without a space put in front."""
    if part is None:
        return None
    part = dict(part)
    if part["type"] == "Sequence":
        part["pretokenizers"] = [_strip_pre_tokenizer(child) for child in part["pretokenizers"]]
    elif part["type"] == "ByteLevel":
        part["add_prefix_space"] = False
    elif part["type"] == "Metaspace":
        part.pop("add_prefix_space", None)
        part["prepend_scheme"] = "never"
    return part


def _quiet_model(model: dict[str, Any], control: frozenset[int]) -> dict[str, Any]:
    """The model without chance, and without control pieces that typed text could be taken for."""
    if model.get("type") != "Unigram":
        return {**model, "dropout": None}
    # It takes the likeliest pieces, and special ones would win. They are given a name that no text holds and
    # keep their scores: an unknown character costs ten more than the least of all scores.
    vocabulary = [
        [f"\uffff{piece}\uffff" if index in control else piece, score]
        for index, (piece, score) in enumerate(model["vocab"])
    ]
    return {**model, "vocab": vocabulary}


def content_document(document: Mapping[str, Any], control: frozenset[int]) -> dict[str, Any]:
    """`tokenizer.json` for plain content: control tokens, normalisation and dummy prefix removed."""
    plain: dict[str, Any] = {"version": document.get("version"), "decoder": document.get("decoder")}
    plain["normalizer"] = _strip_normalizer(document.get("normalizer"))
    plain["pre_tokenizer"] = _strip_pre_tokenizer(document.get("pre_tokenizer"))
    plain.update(truncation=None, padding=None, post_processor=None)
    plain["model"] = _quiet_model(dict(document["model"]), control)
    # A token that swallows the white space beside it would lose bytes.
    plain["added_tokens"] = [
        {**entry, "lstrip": False, "rstrip": False}
        for entry in document.get("added_tokens") or []
        if entry["id"] not in control
    ]
    return plain


def _check_missing(missing: bytes, where: str) -> None:
    """Says which bytes no token stands for; they are left out, and the aligner marks the places.

    Raises ConfigError when ordinary text needs one of them: a student's words would be lost.
    """
    if lost := [byte for byte in missing if byte in ORDINARY]:
        raise ConfigError(
            f"{where}: no token stands for {len(lost)} of the {len(ORDINARY)} bytes that ordinary text is "
            f"made of (the first is 0x{lost[0]:02X}), and they would be lost from it; expected a token for "
            "each: byte-level BPE trained with the whole byte alphabet, or <0xNN> pieces, that are "
            "neither flagged special nor given a role"
        )
    if missing:
        logger.warning("%s: no token stands for the bytes %s; they are left out", where, missing.hex(" "))


class ContentEncoder:
    """Total on any bytes: valid text through the tokenizer, the rest as byte tokens."""

    def __init__(
        self, document: Mapping[str, Any], table: ByteTable, control: Bool[np.ndarray, " V"], where: str
    ) -> None:
        """`control[id]` marks tokens that content must never contain.

        Raises ConfigError if bytes of ordinary text have no token, or the self-test fails.
        """
        self._table = table
        _check_missing(table.missing, where)
        self._control = control
        plain = content_document(document, frozenset(np.flatnonzero(control).tolist()))
        self._raw = RawTokenizer.from_str(json.dumps(plain))
        self._ids = self._original_ids(plain, len(control))
        self._stretches = re.compile("[{0}]+|[^{0}]+".format(_NOT_TEXT[table.family]))
        self._odd = re.compile("[" + _NOT_TEXT[table.family] + "]")
        self._self_test(where)

    def _original_ids(self, plain: Mapping[str, Any], vocab_size: int) -> Int32[np.ndarray, " V2"]:
        """Without the control tokens the remaining added tokens move down; this moves them back."""
        ids = np.arange(max(vocab_size, self._raw.get_vocab_size(with_added_tokens=True)), dtype=np.int32)
        for entry in plain["added_tokens"]:
            if (moved := self._raw.token_to_id(entry["content"])) is not None:
                ids[moved] = entry["id"]
        return ids

    def _self_test(self, where: str) -> None:
        for text in SELF_TEST:
            wanted = text.encode()
            if any(byte in self._table.missing for byte in wanted):
                continue  # a control character that is left out, see `_check_missing`
            ids = self._plain_ids([text])[0]
            if self._control[ids].any():
                continue  # a role given to an ordinary piece: such text is mended, see `_mend`
            got, _ = self._table.join(ids)
            if got != wanted:
                raise ConfigError(
                    f"{where}: the tokenizer does not keep its text: {wanted!r} comes back as {got!r}; its "
                    "bytes cannot be known, so it cannot be aligned. Use another tokenizer"
                )

    def _plain_ids(self, texts: list[str]) -> list[Int32[np.ndarray, " _"]]:
        encodings = self._raw.encode_batch_fast(texts, add_special_tokens=False)
        return [self._ids[np.asarray(encoding.ids, np.int64)] for encoding in encodings]

    def encode_batch(self, contents: Sequence[bytes]) -> list[Int32[np.ndarray, " _"]]:
        """Ids of each content, all of them in one threaded call.

        `join(ids)` equals the content, but for bytes that no token of the vocabulary stands for.
        """
        pieces = [self._split(content) for content in contents]
        texts = [piece for row in pieces for piece in row if isinstance(piece, str)]
        encoded = iter(self._plain_ids(texts))
        rows = []
        for content, row in zip(contents, pieces, strict=True):
            parts = [next(encoded) if isinstance(p, str) else self._table.byte_tokens(p) for p in row]
            ids = np.concatenate(parts) if parts else np.zeros(0, np.int32)
            if self._table.join(ids)[0] != content or self._control[ids].any():
                parts = [self._mend(p) if isinstance(p, str) else self._table.byte_tokens(p) for p in row]
                ids = np.concatenate(parts) if parts else ids
            rows.append(ids)
        return rows

    def encode_short(
        self, contents: Sequence[bytes]
    ) -> tuple[Int32[np.ndarray, " N"], Int64[np.ndarray, " C"]]:
        """`encode_batch` of very many short contents: their ids in one row, and how many are each one's."""
        texts = [content.decode("utf-8", "surrogateescape") for content in contents]
        odd = np.asarray([self._odd.search(text) is not None for text in texts], bool)
        plain = ["" if is_odd else text for text, is_odd in zip(texts, odd.tolist(), strict=True)]
        rows = [encoding.ids for encoding in self._raw.encode_batch_fast(plain, add_special_tokens=False)]
        counts = np.fromiter(map(len, rows), np.int64, len(rows))
        ids = self._ids[np.fromiter(chain.from_iterable(rows), np.int64, int(counts.sum()))]
        row = np.repeat(np.arange(len(rows)), counts)
        # What `encode_batch` would mend: bytes that come back otherwise, and control tokens.
        sizes = np.bincount(row, weights=self._table.lengths[ids], minlength=len(rows))
        odd |= sizes != np.fromiter(map(len, contents), np.int64, len(rows))
        odd[row[self._control[ids]]] = True
        kept = [b"" if is_odd else content for content, is_odd in zip(contents, odd.tolist(), strict=True)]
        if self._table.join(ids[~odd[row]])[0] != b"".join(kept):
            odd[:] = True
        slow = np.flatnonzero(odd)
        if not len(slow):
            return ids, counts
        mended, plain = self.encode_batch([contents[index] for index in slow.tolist()]), ~odd[row]
        counts[slow] = [len(own) for own in mended]
        order = np.argsort(np.concatenate([row[plain], np.repeat(slow, counts[slow])]), kind="stable")
        return np.concatenate([ids[plain], *mended])[order], counts

    def _split(self, content: bytes) -> list[str | bytes]:
        """Stretches of text (str) and of bytes that only byte tokens can carry (bytes)."""
        # One linear pass: invalid bytes become lone surrogates, which valid UTF-8 can never hold.
        text = content.decode("utf-8", "surrogateescape")
        if not self._odd.search(text):
            return [text] if text else []
        return [
            stretch.encode("utf-8", "surrogateescape") if self._odd.match(stretch) else stretch
            for stretch in self._stretches.findall(text)
        ]

    def _mend(self, text: str) -> Int32[np.ndarray, " _"]:
        """Ids of a text the tokenizer alters: what matches is kept, the rest becomes byte tokens.

        Happens for a control string spelled by the merges themselves, and for vocabularies without a
        token for every byte. Linear, but one token at a time.
        """
        wanted = text.encode()
        at_character = np.zeros(len(text) + 1, np.int64)  # byte offset of each character
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        widths = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
        np.cumsum(widths, out=at_character[1:])
        encoding = self._raw.encode(text, add_special_tokens=False)
        out: list[int] = []
        position = 0
        for moved, (first, last) in zip(encoding.ids, encoding.offsets, strict=True):
            token = int(self._ids[moved])
            start, end = int(at_character[first]), int(at_character[last])
            if start > position:  # characters the tokenizer dropped
                out += self._table.byte_tokens(wanted[position:start]).tolist()
                position = start
            data = self._table.pieces[token]
            if data and not self._control[token] and wanted.startswith(data, position):
                out.append(token)
                position += len(data)
            elif end > position:
                out += self._table.byte_tokens(wanted[position:end]).tolist()
                position = end
        out += self._table.byte_tokens(wanted[position:]).tolist()
        return np.asarray(out, np.int32)
