"""Which bytes each vocabulary id stands for, from the raw `tokenizer.json`.

Letters: V vocabulary ids, N tokens.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32, Int64

from jaxdistill.errors import ConfigError

Family = Literal["byte-level", "sentencepiece"]

SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character inside pieces
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_characters() -> dict[str, int]:
    """The inverse of the byte map of byte-level BPE: character -> byte.

    Printable Latin-1 characters stand for their own byte; the other 68 bytes are given, in rising
    order, the characters from U+0100 on (Radford et al. 2019, GPT-2's encoder).
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in own]
    table = {chr(b): b for b in own}
    table.update({chr(0x100 + i): b for i, b in enumerate(rest)})
    return table


def _nested(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """A component of `tokenizer.json` and everything inside its `Sequence`s, flattened."""
    if not part:
        return []
    children = part.get("normalizers") or part.get("pretokenizers") or part.get("decoders") or []
    return [part, *(inner for child in children for inner in _nested(child))]


def component_types(part: Mapping[str, Any] | None) -> set[str]:
    """Type names occurring in a normalizer, pre-tokenizer or decoder of `tokenizer.json`."""
    return {str(p.get("type")) for p in _nested(part)}


def _folding_components(normalizer: Mapping[str, Any] | None) -> list[str]:
    """The parts of a normalizer that make different letters equal, by what they do."""
    found = component_types(normalizer) & {"Lowercase", "StripAccents"}
    for part in _nested(normalizer):
        if part.get("type") == "BertNormalizer":
            lowers = bool(part.get("lowercase"))
            strips = lowers if part.get("strip_accents") is None else bool(part["strip_accents"])
            found |= {name for name, does in (("Lowercase", lowers), ("StripAccents", strips)) if does}
    return sorted(found)


def model_vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    """Piece -> id of the model, for both layouts (`{piece: id}` and Unigram's `[[piece, score]]`)."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, Mapping):
        return dict(vocabulary)
    return {piece: index for index, (piece, _) in enumerate(vocabulary)}


def detect_family(document: Mapping[str, Any], where: str) -> Family:
    """Which rule turns pieces into bytes.

    Raises ConfigError, with the reason, for a tokenizer whose bytes cannot be known.
    """
    model = document["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else "unknown")
    if kind not in ("BPE", "Unigram"):
        raise ConfigError(
            f"{where}: a {kind} tokenizer does not keep the bytes of its text (it drops white space and has "
            "an unknown token), so nothing can be aligned by bytes; use a model with byte-level BPE or "
            "SentencePiece with byte fallback"
        )
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ConfigError(
            f"{where}: pieces carry a word mark (continuing_subword_prefix "
            f"{model.get('continuing_subword_prefix')!r}, "
            f"end_of_word_suffix {model.get('end_of_word_suffix')!r}) that stands for no byte of the text; "
            "expected byte-level BPE or SentencePiece with byte fallback"
        )
    if folding := _folding_components(document.get("normalizer")):
        raise ConfigError(
            f"{where}: the normalizer ({', '.join(folding)}) folds letters: the model has never read a "
            "capital or an accent, so a response that holds them cannot be put to it as it stands; expected "
            "a tokenizer that keeps its input (composition, as by NFC or NFKC, is fine: it is gone round)"
        )
    places = [document.get(key) for key in ("decoder", "pre_tokenizer", "normalizer")]
    if any("ByteLevel" in component_types(place) for place in places):
        return "byte-level"
    held = {int(m[1], 16) for piece in model_vocabulary(model) if (m := _BYTE_PIECE.fullmatch(piece))}
    if model.get("byte_fallback") and len(held) == 256:
        return "sentencepiece"
    raise ConfigError(
        f"{where}: neither byte-level (no ByteLevel component) nor SentencePiece with byte fallback "
        f"(byte_fallback is {bool(model.get('byte_fallback'))}, {len(held)} of 256 <0xNN> pieces): text "
        "outside the vocabulary becomes an unknown token and its bytes are lost; use another tokenizer"
    )


def _piece_bytes(piece: str, family: Family, characters: Mapping[str, int]) -> bytes:
    if family == "byte-level":
        known = [characters.get(c, -1) for c in piece]
        # An added token with a character outside the map was never written in the map: it is plain text.
        return piece.encode("utf-8", "surrogatepass") if -1 in known else bytes(known)
    if match := _BYTE_PIECE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    return piece.replace(SPACE_MARK, " ").encode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class ByteTable:
    """The bytes of every id, laid out so that many ids are joined without a Python loop."""

    family: Family
    pieces: tuple[bytes, ...]
    lengths: Int64[np.ndarray, " V"]
    byte_ids: Int32[np.ndarray, " 256"]  # the token that stands for exactly this byte, -1 where there is none

    @cached_property
    def missing(self) -> bytes:
        """The bytes no token stands for, in rising order; usually none."""
        return bytes(np.flatnonzero(self.byte_ids < 0).astype(np.uint8))

    def join(self, ids: Int32[np.ndarray, " N"]) -> tuple[bytes, Int64[np.ndarray, " N"]]:
        """Bytes of the ids one after another, and the byte offset at which each of them ends."""
        data = b"".join(map(self.pieces.__getitem__, ids.tolist()))
        return data, np.cumsum(self.lengths[ids])

    def byte_tokens(self, data: bytes) -> Int32[np.ndarray, " N"]:
        """One token for each byte; bytes no token stands for are left out."""
        ids = self.byte_ids[np.frombuffer(data, np.uint8)]
        return ids[ids >= 0]


def build_table(
    document: Mapping[str, Any], family: Family, vocab_size: int, empty: Sequence[int] | frozenset[int]
) -> ByteTable:
    """Byte table of `vocab_size` ids; those in `empty` (special tokens) and unknown ids carry no bytes."""
    characters = byte_characters()
    pieces = [b""] * vocab_size
    byte_ids = np.full(256, -1, np.int32)
    added = {entry["content"]: entry["id"] for entry in document.get("added_tokens") or []}
    silent = frozenset(empty)
    for piece, index in {**model_vocabulary(document["model"]), **added}.items():
        if index in silent:
            continue
        pieces[index] = data = _piece_bytes(piece, family, characters)
        # SentencePiece has two tokens for "A" (the piece and <0x41>); the byte piece is never merged away.
        if len(data) == 1 and (byte_ids[data[0]] < 0 or _BYTE_PIECE.fullmatch(piece)):
            byte_ids[data[0]] = index
    lengths = np.fromiter(map(len, pieces), np.int64, vocab_size)
    return ByteTable(family, tuple(pieces), lengths, byte_ids)
