"""Bytes and ids: exact in both directions, for every family."""

import json
import logging
import shutil
import unicodedata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer

from jaxdistill.errors import ConfigError, DataError
from jaxdistill.records import END_OF_TURN, OTHER_SPECIAL
from jaxdistill.text import Tokenizer, concatenate
from jaxdistill.text.content import ORDINARY, SELF_TEST

SHARED = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
CONTROL_STRINGS = (
    "<|im_end|>\n<|im_start|>system",
    "<|endoftext|><|eot_id|><|end_of_text|>",
    "<start_of_turn>model<end_of_turn><eos><bos>",
    "<s>[INST] x [/INST] y</s>",
    "<\uff5cUser\uff5c><\uff5cend\u2581of\u2581sentence\uff5c>",
    "<think>so</think><tool_call>",
    "<0x41><0x0A><unk>",
)
NASTY = (
    *SELF_TEST,
    *CONTROL_STRINGS,
    "literal \u2581 mark\u2581\u2581",
    "   \n\n<h1>three spaces</h1>",
    "\r\n\t\x00\x7f\u200d\ufeff",
    "7" * 300,
)


@pytest.mark.parametrize("text", NASTY)
def test_encode_is_exact_and_free_of_control_tokens(tokenizer: Tokenizer, text: str) -> None:
    spans = tokenizer.encode(text)
    assert spans.data == text.encode()
    assert not spans.roles.any()
    assert b"".join(tokenizer.token_bytes(spans.ids)) == spans.data


@SHARED
@given(content=st.binary(max_size=60) | st.text(max_size=40))
def test_encode_is_total(tokenizer: Tokenizer, content: bytes | str) -> None:
    wanted = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    assert tokenizer.encode(content).data == wanted


@SHARED
@given(contents=st.lists(st.binary(max_size=20), max_size=6))
def test_a_batch_is_its_contents_one_by_one(tokenizer: Tokenizer, contents: list[bytes]) -> None:
    together = tokenizer.encode_batch(contents)
    assert [s.ids.tolist() for s in together] == [tokenizer.encode(c).ids.tolist() for c in contents]


def test_lone_surrogates_become_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a\ud800b").data == b"a\xed\xa0\x80b"


@SHARED
@given(data=st.data())
def test_bytes_of_any_ids_are_the_tokenizers_own_decoding(
    tokenizers: dict[str, Tokenizer], folders: dict[str, Path], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(tokenizers)))
    tokenizer = tokenizers[name]
    raw = RawTokenizer.from_file(str(folders[name] / "tokenizer.json"))
    content_ids = sorted(set(range(raw.get_vocab_size())) - tokenizer.control)
    ids = data.draw(st.lists(st.sampled_from(content_ids), max_size=12))
    joined = b"".join(tokenizer.token_bytes(ids))
    try:
        text = joined.decode()
    except UnicodeDecodeError:
        return  # the tokenizer's own decoding shows U+FFFD there
    if name in ("llama2", "unigram"):  # these two decoders take one leading space off again
        text = text.removeprefix(" ")
    assert raw.decode(ids, skip_special_tokens=True) == text


@SHARED
@given(data=st.data())
def test_spans_keep_sampled_ids(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    spans = tokenizer.spans(ids)
    assert spans.ids.tolist() == ids
    pieces = [spans.data[a:b] for a, b in zip(spans.starts, spans.ends, strict=True)]
    assert pieces == tokenizer.token_bytes(ids)
    assert b"".join(pieces) == spans.data
    assert [bool(role) for role in spans.roles] == [not piece for piece in pieces]


def test_canonical_ids_are_those_of_the_genuine_tokenizer(folders: dict[str, Path]) -> None:
    # Text that the normalizer leaves alone: the plain-content tokenizer must cut it the same way.
    for name in ("chatml", "llama3", "gemma"):
        raw = RawTokenizer.from_file(str(folders[name] / "tokenizer.json"))
        for text in (
            "Tom has 128 apples.\n\n",
            "def add(first,   second):",
            "\u4f60\u597d\uff0c\u4e16\u754c",
        ):
            wanted = raw.encode(text, add_special_tokens=False).ids
            assert Tokenizer.load(str(folders[name])).encode(text).ids.tolist() == wanted


def test_no_space_is_put_before_content(tokenizers: dict[str, Tokenizer]) -> None:
    for name in ("llama2", "unigram"):
        assert tokenizers[name].encode("Tom").data == b"Tom"
        assert tokenizers[name].encode(" Tom").ids.tolist() != tokenizers[name].encode("Tom").ids.tolist()


def test_decomposed_characters_stay_decomposed(tokenizers: dict[str, Tokenizer]) -> None:
    assert tokenizers["chatml"].encode("e\u0301").data == b"e\xcc\x81"


def test_content_added_tokens_are_used(tokenizers: dict[str, Tokenizer]) -> None:
    gemma = tokenizers["gemma"]
    assert len(gemma.encode("\n\n")) == 1
    assert gemma.token_bytes(gemma.encode("<h1>").ids) == [b"<h1>"]


def test_typed_control_strings_are_text_also_in_the_middle(tokenizers: dict[str, Tokenizer]) -> None:
    for tokenizer in tokenizers.values():
        spans = tokenizer.encode("A" + "".join(CONTROL_STRINGS) + "B")
        assert not set(spans.ids.tolist()) & tokenizer.control
        assert spans.data.startswith(b"A<|im_end|>")


def test_a_control_string_the_merges_spell_is_still_text(makers: ModuleType, tmp_path: Path) -> None:
    raw = makers.byte_level(tmp_path, digits=False, normalize=False)
    document = json.loads(raw.to_str())
    size = len(document["model"]["vocab"])
    words = (piece for piece in document["model"]["vocab"] if piece.isascii() and piece.isalpha())
    merged = max(words, key=len)
    folder = makers.write(tmp_path, raw, makers.CHATML.replace("<|im_end|>", merged), {})
    tokenizer = Tokenizer.load(str(folder), roles={"end_of_turn": merged})
    spans = tokenizer.encode(f"a {merged} b{merged}")
    assert tokenizer.vocab_size == size
    assert spans.data == f"a {merged} b{merged}".encode()
    assert tokenizer.roles["end_of_turn"] not in spans.ids


def test_special_tokens_carry_roles_and_no_bytes(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["chatml"]
    raw = tokenizer.spans(sorted(tokenizer.control))
    assert raw.data == b"" and (raw.roles != 0).all()
    assert raw.roles[raw.ids.tolist().index(tokenizer.roles["end_of_turn"])] == END_OF_TURN
    assert (raw.roles == OTHER_SPECIAL).sum() == len(tokenizer.control) - len(tokenizer.roles)


def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer) -> None:
    for bad in ([-1], [0, tokenizer.vocab_size], [2**40]):
        with pytest.raises(DataError, match="outside the vocabulary"):
            tokenizer.spans(bad)


def test_padded_vocabulary_has_ids_without_bytes(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["chatml"], tmp_path / "padded")
    (folder / "config.json").write_text(json.dumps({"vocab_size": 1000}))
    tokenizer = Tokenizer.load(str(folder))
    assert tokenizer.vocab_size == 1000
    assert tokenizer.token_bytes([999]) == [b""]
    assert tokenizer.spans([999]).roles.tolist() == [OTHER_SPECIAL]


def lacking(folders: dict[str, Path], target: Path, *characters: str) -> Path:
    """A byte-level tokenizer without these characters of the byte map, and so without their bytes."""
    folder = shutil.copytree(folders["llama3"], target)
    document = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    for piece in [p for p in vocabulary if set(p) & set(characters)]:
        index = vocabulary.pop(piece)
        vocabulary[f"unused {index}"] = index
    merges = [m for m in document["model"]["merges"] if not set("".join(m)) & set(characters)]
    document["model"]["merges"] = merges
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder


def test_bytes_without_a_token_are_left_out_and_nothing_else(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # SmolLM2's vocabulary lacks 21 bytes. Here it is 0x07 ("\u0107" in the byte map) and 0xF1.
    with caplog.at_level(logging.WARNING):
        tokenizer = Tokenizer.load(str(lacking(folders, tmp_path / "gaps", "\u0107", "\u00f1")))
    assert tokenizer.missing_bytes == b"\x07\xf1"
    assert tokenizer.encode("Tom\U00040000 12\x07 apples\xff").data == b"Tom\x80\x80\x80 12 apples\xc3\xbf"
    said = [record.getMessage().partition("the bytes ")[2] for record in caplog.records]
    assert said == ["07 f1; they are left out"]


def test_ordinary_bytes_are_those_of_all_assigned_characters() -> None:
    categories = {c: unicodedata.category(c) for c in map(chr, range(0x110000))}
    used = (c for c, category in categories.items() if category not in ("Cc", "Cn", "Co", "Cs"))
    assert set(ORDINARY) == set("".join(used).encode()) | set(b"\t\r\n")


@pytest.mark.parametrize(("character", "byte"), [("\u00e2", "0xE2"), ("\u010a", "0x0A"), ("a", "0x61")])
def test_a_vocabulary_that_lacks_a_byte_of_ordinary_text_is_refused(
    folders: dict[str, Path], tmp_path: Path, character: str, byte: str
) -> None:
    with pytest.raises(ConfigError, match=rf"1 of the {len(ORDINARY)} bytes .*the first is {byte}\)"):
        Tokenizer.load(str(lacking(folders, tmp_path / "lacking", character)))


def test_a_tokenizer_without_byte_tokens_is_refused(makers: ModuleType, tmp_path: Path) -> None:
    # Trained without the byte alphabet: it knows the bytes of its corpus alone.
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.train_from_iterator(makers.CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    with pytest.raises(ConfigError, match=r"no token stands for .* expected a token for each"):
        Tokenizer.load(str(makers.write(tmp_path / "bare", raw, None, {})))
    # Byte pieces that are flagged special are control tokens, which carry no bytes.
    raw = makers.sentencepiece(["<s>"])
    with pytest.raises(ConfigError, match="neither flagged special"):
        Tokenizer.load(str(makers.write(tmp_path / "special", raw, None, {})))


def test_a_role_that_takes_a_byte_from_the_text_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"0x21\).*nor given a role"):
        Tokenizer.load(str(folders["chatml"]), roles={"end_of_turn": "!"})


@pytest.mark.parametrize(
    ("hole", "listed", "reason"),
    [
        (0, 20, "'<|end|>' as id 320, but the `tokenizers` library takes it for 300"),
        (20, 20, "'<|end|>' as id 320, but the `tokenizers` library takes it for 300"),
        (20, 0, "id 300 stands for both '.+' and '<|end|>'"),
    ],
)
def test_ids_that_the_library_does_not_use_are_refused(
    makers: ModuleType, tmp_path: Path, hole: int, listed: int, reason: str
) -> None:
    raw = makers.byte_level(tmp_path, digits=False, normalize=False)
    size = 300

    def edit(document: dict[str, Any]) -> None:
        model = document["model"]
        kept = {piece for piece, index in model["vocab"].items() if index < size}
        model["merges"] = [m for m in model["merges"] if {*m, "".join(m)} <= kept]
        model["vocab"] = {p: i + hole * (i >= 270) for p, i in model["vocab"].items() if p in kept}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = {"id": size + listed, "content": "<|end|>", "special": True, **flags}
        document["added_tokens"] = [added]

    folder = makers.write(tmp_path, raw, None, {}, edit)
    with pytest.raises(ConfigError, match=reason.replace("|", r"\|")):
        Tokenizer.load(str(folder))


def test_an_added_word_leaves_the_white_space_beside_it(makers: ModuleType, tmp_path: Path) -> None:
    raw = makers.byte_level(tmp_path, digits=False, normalize=False)
    raw.add_tokens([AddedToken("zebra", lstrip=True, rstrip=True)])
    tokenizer = Tokenizer.load(str(makers.write(tmp_path, raw, None, {})))
    parts = [tokenizer.encode(part) for part in ("a  ", "zebra", "  b")]
    assert len(parts[1]) == 1
    spans = tokenizer.encode("a  zebra  b")
    assert spans.data == b"a  zebra  b"
    assert spans.ids.tolist() == concatenate(parts).ids.tolist()


def test_a_response_is_cut_the_same_way_every_time(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["llama3"], tmp_path / "dropout")
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["dropout"] = 0.9
    (folder / "tokenizer.json").write_text(json.dumps(document))
    text = "Tom has 12 apples and buys 30 more"
    wanted = Tokenizer.load(str(folders["llama3"])).encode(text).ids.tolist()
    assert Tokenizer.load(str(folder)).encode(text).ids.tolist() == wanted


def test_concatenate_joins_bytes_and_ends(tokenizer: Tokenizer) -> None:
    parts = [tokenizer.encode("Tom has"), tokenizer.role_span("end_of_turn"), tokenizer.encode(" 12 \u2248")]
    whole = concatenate(parts)
    assert whole.data == "Tom has 12 \u2248".encode()
    again = tokenizer.spans(whole.ids)
    np.testing.assert_array_equal(whole.ends, again.ends)
    np.testing.assert_array_equal(whole.roles, again.roles)
    assert len(concatenate([])) == 0


def test_wordpiece_is_refused_with_its_reason(makers: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"WordPiece.*white space"):
        Tokenizer.load(str(makers.wordpiece(tmp_path)))


def test_folding_and_lossy_tokenizers_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    def variant(name: str, **changes: object) -> str:
        folder = shutil.copytree(folders["llama3"], tmp_path / name)
        document = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps({**document, **changes}))
        return str(folder)

    with pytest.raises(ConfigError, match=r"Lowercase.*folds letters"):
        Tokenizer.load(variant("lower", normalizer={"type": "Lowercase"}))
    drops = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, {"type": "ByteLevel"}]}
    drops["pretokenizers"][1] |= {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}  # type: ignore
    with pytest.raises(ConfigError, match="does not keep its text"):
        Tokenizer.load(variant("drops", pre_tokenizer=drops))
    with pytest.raises(ConfigError, match="byte fallback"):
        Tokenizer.load(variant("plain", pre_tokenizer=None, decoder=None))


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere/at/all", "no-such-owner/no-such-model"])
def test_a_missing_folder_is_one_clear_error(path: str) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        Tokenizer.load(path)


def test_a_path_the_system_cannot_open_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"no model at a{200} \(no such folder\): expected a folder"):
        Tokenizer.load("a" * 5000)
    with pytest.raises(ConfigError, match="no such folder"):
        Tokenizer.load("~no-such-user/model")


def test_a_folder_without_the_fast_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        Tokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="not readable as JSON"):
        Tokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_bytes(b"\xff{}")
    with pytest.raises(ConfigError, match="not readable as UTF-8"):
        Tokenizer.load(str(tmp_path))


def test_fingerprints_tell_vocabulary_and_template_apart(folders: dict[str, Path], tmp_path: Path) -> None:
    first, same = (Tokenizer.load(str(folders["chatml"])) for _ in range(2))
    assert (first.fingerprint, first.vocab_fingerprint) == (same.fingerprint, same.vocab_fingerprint)
    folder = shutil.copytree(folders["chatml"], tmp_path / "other")
    source = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    (folder / "chat_template.jinja").write_text("{# changed #}" + source)
    other = Tokenizer.load(str(folder))
    assert other.fingerprint != first.fingerprint
    assert other.vocab_fingerprint == first.vocab_fingerprint
    assert Tokenizer.load(str(folders["llama3"])).vocab_fingerprint != first.vocab_fingerprint
