"""Teacher proposals beside a response."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill.align.projection import agree, symbols_of, vocabulary_symbols
from jaxdistill.errors import TeacherContractError
from jaxdistill.records import OTHER_SPECIAL, ROLES, TokenSpans
from jaxdistill.text import Tokenizer, concatenate

TEXT = st.lists(st.sampled_from(["Tom", " has", " 12", "\n", "\u00fc", "\u4f60\u597d"]), max_size=12).map(
    "".join
)


def token_symbols(spans: TokenSpans, index: int) -> list[object]:
    """What one token stands for: its bytes, or who it is."""
    role = int(spans.roles[index])
    if role:
        return [("special", int(spans.ids[index])) if role == OTHER_SPECIAL else ("role", role)]
    return list(spans.data[spans.starts[index] : spans.ends[index]])


@settings(max_examples=40)
@given(data=st.data())
def test_agreement_is_the_longest_common_prefix(
    tokenizers: dict[str, Tokenizer], data: st.DataObject
) -> None:
    teacher = tokenizers[data.draw(st.sampled_from(sorted(tokenizers)))]
    any_id = st.integers(0, teacher.vocab_size - 1)
    text = teacher.encode(data.draw(TEXT)).ids.tolist()
    response = teacher.spans(text + data.draw(st.lists(any_id, max_size=5)))
    usual = st.sampled_from([*response.ids.tolist(), -1]) | any_id
    row, count = st.lists(usual, min_size=3, max_size=3), len(response)
    rows = data.draw(st.lists(row, min_size=count, max_size=count))
    proposed = np.asarray(rows, np.int32).reshape(count, 3)
    found = agree(vocabulary_symbols(teacher), proposed, symbols_of(response))
    whole = [token_symbols(response, index) for index in range(len(response))]
    for j, k in itertools.product(range(len(response)), range(3)):
        rest = list(itertools.chain(*whole[j:]))
        mine = token_symbols(teacher.spans([int(proposed[j, k])]), 0) if proposed[j, k] >= 0 else []
        prefix = sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(mine, rest, strict=False))
        )
        assert found[j, k] == prefix


def test_roles_agree_by_meaning_and_other_special_tokens_with_themselves(
    tokenizers: dict[str, Tokenizer],
) -> None:
    teacher = tokenizers["llama3"]
    end, header = (
        teacher.roles["end_of_turn"],
        next(i for i in teacher.control if i not in teacher.roles.values()),
    )
    response = teacher.spans([end, header])
    proposed = np.asarray([[end, header, -1], [end, header, 5]], np.int32)
    found = agree(vocabulary_symbols(teacher), proposed, symbols_of(response))
    assert found.tolist() == [[1, 0, 0], [0, 1, 0]]
    with pytest.raises(TeacherContractError, match="its vocabulary has"):
        agree(
            vocabulary_symbols(teacher), np.full((2, 1), teacher.vocab_size, np.int32), symbols_of(response)
        )


def test_role_numbers_stay_below_those_of_special_tokens() -> None:
    assert max(ROLES.values()) < OTHER_SPECIAL < 256


@settings(max_examples=40)
@given(data=st.data())
def test_short_contents_are_encoded_as_each_by_itself(
    all_tokenizers: dict[str, Tokenizer], data: st.DataObject
) -> None:
    side = all_tokenizers[data.draw(st.sampled_from(sorted(all_tokenizers)))]
    contents = data.draw(st.lists(TEXT.map(str.encode) | st.binary(max_size=6), max_size=8))
    ids, ends, counts = side.encode_short(contents)
    each = [side.encode(content) for content in contents]
    assert counts.tolist() == [len(one) for one in each]
    assert ids.tolist() == [token for one in each for token in one.ids.tolist()]
    whole = concatenate(each)
    assert ends.tolist() == whole.ends.tolist()
