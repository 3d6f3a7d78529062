"""What a tokenizer does to text before it cuts it: gone round where it can be, refused where it cannot."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as RawTokenizer

from jaxdistill.align import align
from jaxdistill.errors import ConfigError
from jaxdistill.text import Tokenizer, concatenate

# Every line is changed by at least one of the normalizers below.
TEXTS = (
    "cafe\u0301 \u1e9b\u0323 \u212b",
    "\ufb01ne \u00bd \uff21\uff22 \u2460 x\u00b2",
    "  two  leading, many   inside, trailing  ",
    "\u1100\u1161\u11a8 \uac01 \u0928\u093c",
    "tab\tnewline\r\n\u00a0\u3000\u200b",
)
REPLACE_RUNS = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
NORMALIZERS: dict[str, dict[str, Any]] = {
    "NFC": {"type": "NFC"},
    "NFD": {"type": "NFD"},
    "NFKC": {"type": "NFKC"},
    "NFKD": {"type": "NFKD"},
    "Nmt": {"type": "Nmt"},
    "Strip": {"type": "Strip", "strip_left": True, "strip_right": True},
    "runs of spaces": REPLACE_RUNS,
    "several": {"type": "Sequence", "normalizers": [{"type": "Nmt"}, {"type": "NFKC"}, REPLACE_RUNS]},
    "control characters": {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": False,
        "lowercase": False,
    },
}
FOLDING: dict[str, dict[str, Any]] = {
    "Lowercase": {"type": "Lowercase"},
    "StripAccents": {"type": "StripAccents"},
    "Lowercase, StripAccents": {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
    },
}


def with_normalizer(folder: Path, target: Path, normalizer: dict[str, Any]) -> Path:
    """A copy of the tokenizer with `normalizer` put before its own."""
    shutil.copytree(folder, target)
    file = target / "tokenizer.json"
    document = json.loads(file.read_text())
    own = [document["normalizer"]] if document["normalizer"] else []
    document["normalizer"] = {"type": "Sequence", "normalizers": [normalizer, *own]}
    file.write_text(json.dumps(document))
    return target


@pytest.mark.parametrize("family", ["llama3", "gemma", "llama2", "unigram"])
@pytest.mark.parametrize("name", sorted(NORMALIZERS))
def test_content_goes_round_the_normalizer(
    folders: dict[str, Path], tmp_path: Path, family: str, name: str
) -> None:
    folder = with_normalizer(folders[family], tmp_path / "changed", NORMALIZERS[name])
    tokenizer, plain = Tokenizer.load(str(folder)), Tokenizer.load(str(folders[family]))
    for text in TEXTS:
        spans = tokenizer.encode(text)
        assert spans.data == text.encode()
        assert spans.ids.tolist() == plain.encode(text).ids.tolist()
        alignment = align(spans, plain.encode(text))
        assert alignment.coverage == 1.0 and alignment.exact.all()


@pytest.mark.parametrize("name", ["NFC", "NFKC", "runs of spaces"])
def test_the_texts_are_changed_by_the_genuine_tokenizer(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    folder = with_normalizer(folders["llama3"], tmp_path / "changed", NORMALIZERS[name])
    raw = RawTokenizer.from_file(str(folder / "tokenizer.json"))
    assert any(raw.decode(raw.encode(text, add_special_tokens=False).ids) != text for text in TEXTS)


@pytest.mark.parametrize("name", sorted(FOLDING))
@pytest.mark.parametrize("family", ["llama3", "unigram"])
def test_folding_letters_is_refused_with_the_reason(
    folders: dict[str, Path], tmp_path: Path, family: str, name: str
) -> None:
    folder = with_normalizer(folders[family], tmp_path / "folding", FOLDING[name])
    with pytest.raises(ConfigError, match=rf"\({name}\) folds letters: the model has never read a capital"):
        Tokenizer.load(str(folder))


def test_a_space_put_in_front_by_a_byte_level_cut_is_gone(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["llama3"], tmp_path / "prefix")
    file = folder / "tokenizer.json"
    document = json.loads(file.read_text())
    document["pre_tokenizer"]["pretokenizers"][-1]["add_prefix_space"] = True
    file.write_text(json.dumps(document))
    tokenizer, plain = Tokenizer.load(str(folder)), Tokenizer.load(str(folders["llama3"]))
    for text in ("Tom has", " Tom", "\u4f60\u597d", ""):
        assert tokenizer.encode(text).ids.tolist() == plain.encode(text).ids.tolist()


@pytest.mark.parametrize("text", ["<unk>", "<s>", "<0x41>", "</s><s>", "a<0x0A>b", "\u2581", "<0x4", "< s >"])
def test_unigram_pieces_typed_as_text_are_text(tokenizers: dict[str, Tokenizer], text: str) -> None:
    # A Unigram model takes the likeliest pieces, and a control piece's score would win.
    spans = tokenizers["unigram"].encode(text)
    assert spans.data == text.encode() and not spans.roles.any()


def test_text_beside_a_typed_unigram_piece_keeps_its_own_pieces(tokenizers: dict[str, Tokenizer]) -> None:
    # Were the control piece found first and mended after, all of its letters would become byte tokens.
    tokenizer = tokenizers["unigram"]
    parts = [tokenizer.encode(part) for part in ("<", "s", ">")]
    assert tokenizer.encode("<s>").ids.tolist() == concatenate(parts).ids.tolist()


def test_unigram_weighs_unknown_characters_as_the_genuine_model(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    # One unknown character and a likely piece, against two unlikely pieces and nothing unknown.
    folder = shutil.copytree(folders["unigram"], tmp_path / "unlikely")
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["vocab"] += [["QW", -40.0], ["XZ", -40.0], ["WXZ", -1.0]]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    raw = RawTokenizer.from_file(str(folder / "tokenizer.json"))
    wanted = raw.encode("QWXZ", add_special_tokens=False)
    assert wanted.tokens == ["\u2581", "<0x51>", "WXZ"]
    assert Tokenizer.load(str(folder)).encode(" QWXZ").ids.tolist() == wanted.ids


def test_unigram_writes_unknown_characters_as_bytes(tokenizers: dict[str, Tokenizer]) -> None:
    spans = tokenizers["unigram"].encode("a\U0001f9ffb\x80".encode() + b"\xff")
    assert spans.data == "a\U0001f9ffb\x80".encode() + b"\xff"
    assert (spans.ids != 0).all()
