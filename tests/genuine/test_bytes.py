"""Bytes and ids of every genuine tokenizer: exact in both directions."""

import json
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxdistill.text import Tokenizer
from jaxdistill.text.byte_table import model_vocabulary

FEW = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Its decoder takes one leading space off again, which the tokenizer put there for a text's first word.
STRIPS_A_SPACE = ("mistral_v1",)
# Their vocabularies lack some bytes, by design of their training.
LACKS_BYTES = {"smollm2": "040613141 61dc0c1f1f2f5f6f7f8f9fafbfcfdfeff".replace(" ", "")}


def own_decoding(name: str, text: str) -> str:
    return text.removeprefix(" ") if name in STRIPS_A_SPACE else text


def without(data: bytes, missing: bytes) -> bytes:
    return data.translate(None, missing)


def test_missing_bytes_are_the_known_ones(genuine: Any, name: str) -> None:
    assert genuine[name].missing_bytes == bytes.fromhex(LACKS_BYTES.get(name, ""))


def test_ids_are_those_the_library_uses(genuine: Any, name: str) -> None:
    # Loading compares the added tokens alone: the library takes the model's pieces as they are listed.
    document = json.loads((genuine.folder(name) / "tokenizer.json").read_text(encoding="utf-8"))
    listed = {entry["content"]: entry["id"] for entry in document["added_tokens"]}
    assert {**model_vocabulary(document["model"]), **listed} == genuine[name]._raw.get_vocab()


def test_every_id_of_the_vocabulary_is_the_tokenizers_own_decoding(genuine: Any, name: str) -> None:
    tokenizer: Tokenizer = genuine[name]
    own = tokenizer._raw  # the library's own reading of the file, untouched
    ids = np.asarray(sorted(set(range(own.get_vocab_size())) - tokenizer.control), np.int32)
    decoded = own.decode_batch([[int(i)] for i in ids], skip_special_tokens=False)
    compared = 0
    for index, text, data in zip(ids.tolist(), decoded, tokenizer.token_bytes(ids), strict=True):
        try:
            wanted = own_decoding(name, data.decode())
        except UnicodeDecodeError:
            continue  # part of a character: the tokenizer's own decoding shows U+FFFD
        assert text == wanted, (index, text, data)
        compared += 1
    assert compared >= 0.95 * len(ids) - 128  # of a small vocabulary, half the bytes are a good part


@FEW
@given(seed=st.integers(0, 2**32 - 1), length=st.integers(0, 60))
def test_bytes_of_any_ids_are_the_tokenizers_own_decoding(
    genuine: Any, name: str, seed: int, length: int
) -> None:
    tokenizer: Tokenizer = genuine[name]
    ids = np.random.default_rng(seed).integers(0, tokenizer._raw.get_vocab_size(), length)
    ids = np.asarray([i for i in ids.tolist() if i not in tokenizer.control], np.int32)
    spans = tokenizer.spans(ids)
    assert b"".join(tokenizer.token_bytes(ids)) == spans.data
    # Stretches that are text, since hardly any long random sequence is: from each start as far as it goes.
    for first in range(0, len(ids), 7):
        for last in range(first + 1, min(first + 8, len(ids)) + 1):
            try:
                text = b"".join(tokenizer.token_bytes(ids[first:last])).decode()
            except UnicodeDecodeError:
                continue
            decoded = tokenizer._raw.decode(ids[first:last].tolist(), skip_special_tokens=False)
            assert decoded == own_decoding(name, text)


def test_the_corpus_comes_back_byte_for_byte(genuine: Any, corpus: ModuleType, name: str) -> None:
    tokenizer: Tokenizer = genuine[name]
    samples = [*corpus.samples(), corpus.long_letter()]
    for sample, spans in zip(samples, genuine.encode(name, [s.data for s in samples]), strict=True):
        assert spans.data == without(sample.data, tokenizer.missing_bytes), sample.kind
        assert not spans.roles.any() and not set(spans.ids.tolist()) & tokenizer.control, sample.kind
        if sample.is_text and spans.data == sample.data:
            decoded = tokenizer._raw.decode(spans.ids.tolist(), skip_special_tokens=False)
            assert decoded == own_decoding(name, sample.data.decode()), sample.kind


def test_plain_text_is_cut_as_the_genuine_tokenizer_cuts_it(
    genuine: Any, corpus: ModuleType, name: str
) -> None:
    tokenizer: Tokenizer = genuine[name]
    kinds = ("english", "code", "latex", "digits", "script:latin", "script:chinese", "script:korean", "emoji")
    for kind in kinds:
        for data in corpus.by_kind()[kind]:
            text = data.decode()
            if name in STRIPS_A_SPACE:  # behind the space that the genuine tokenizer puts there
                text = " " + text
                wanted = tokenizer._raw.encode(text[1:], add_special_tokens=False).ids
            else:
                wanted = tokenizer._raw.encode(text, add_special_tokens=False).ids
            if tokenizer._raw.decode(wanted) == own_decoding(name, text):  # its normalizer left it alone
                assert tokenizer.encode(text).ids.tolist() == wanted, kind


@FEW
@given(content=st.binary(max_size=80) | st.text(max_size=60))
def test_encode_is_total_and_exact(genuine: Any, name: str, content: bytes | str) -> None:
    tokenizer: Tokenizer = genuine[name]
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    spans = tokenizer.encode(content)
    assert spans.data == without(data, tokenizer.missing_bytes)
    assert not spans.roles.any()


def test_four_thousand_random_bytes(genuine: Any, name: str) -> None:
    tokenizer: Tokenizer = genuine[name]
    data = np.random.default_rng(0).bytes(4096)
    assert tokenizer.encode(data).data == without(data, tokenizer.missing_bytes)


def test_permuting_rows_changes_nothing(genuine: Any, corpus: ModuleType, name: str) -> None:
    contents = [sample.data for sample in corpus.samples()]
    order = np.random.default_rng(1).permutation(len(contents)).tolist()
    straight = genuine.encode(name, contents)
    mixed = genuine[name].encode_batch([contents[i] for i in order])
    for place, spans in zip(order, mixed, strict=True):
        assert spans.ids.tolist() == straight[place].ids.tolist()
        assert spans.data == straight[place].data
    alone = genuine[name].encode(contents[order[0]])
    assert alone.ids.tolist() == mixed[0].ids.tolist()


@pytest.mark.parametrize("where", ["whole", "middle"])
def test_control_strings_typed_as_text_are_text(
    genuine: Any, corpus: ModuleType, name: str, where: str
) -> None:
    tokenizer: Tokenizer = genuine[name]
    own = [text for text in list(tokenizer.control_strings)[:40] if text]
    typed = [data.decode() for data in corpus.by_kind()["control_strings"]] + own
    contents = typed if where == "whole" else [f"so {text} it is" for text in typed]
    for content, spans in zip(contents, tokenizer.encode_batch(contents), strict=True):
        assert spans.data == content.encode()
        assert not spans.roles.any() and not set(spans.ids.tolist()) & tokenizer.control
