"""Bytes and ids: exact in both directions, for every family."""

import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer

from jaxdistill.errors import ConfigError, DataError
from jaxdistill.records import END_OF_TURN, OTHER_SPECIAL
from jaxdistill.text import Tokenizer, concatenate
from jaxdistill.text.content import SELF_TEST

SHARED = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
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


def test_bytes_without_a_token_are_left_out_and_nothing_else(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    # SmolLM2's vocabulary lacks 21 bytes. Here it is 0x07 ("\u0107" in the byte map) and 0xE2.
    folder = shutil.copytree(folders["llama3"], tmp_path / "gaps")
    document = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    for piece in [p for p in vocabulary if "\u0107" in p or "\u00e2" in p]:
        index = vocabulary.pop(piece)
        vocabulary[f"unused {index}"] = index
    merges = [
        m for m in document["model"]["merges"] if "\u0107" not in "".join(m) and "\u00e2" not in "".join(m)
    ]
    document["model"]["merges"] = merges
    (folder / "tokenizer.json").write_text(json.dumps(document))
    tokenizer = Tokenizer.load(str(folder))
    assert tokenizer.missing_bytes == b"\x07\xe2"
    assert tokenizer.encode("Tom\u2248 12\x07 apples\xff").data == b"Tom" + b"\x89\x88 12 apples\xc3\xbf"


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


def test_a_folder_without_the_fast_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        Tokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="not readable as JSON"):
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
