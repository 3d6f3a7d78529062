"""Several turns in one sequence: what the assistant wrote, and nothing else, is marked."""

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer

from jaxdistill.align import align
from jaxdistill.errors import ConfigError, DataError
from jaxdistill.text import RenderedTurns, Tokenizer

CHAT = [
    {"role": "user", "content": "How many apples has Tom?"},
    {"role": "assistant", "content": "He has 12."},
    {"role": "tool", "content": "the scale says 13"},
    {"role": "assistant", "content": "13 then."},
    {"role": "user", "content": "Sure?"},
]
NAMES = ["chatml", "llama3", "gemma", "llama2", "unigram"]
TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}"
    "{% for c in m['tool_calls'] %}<tool_call>{{ c | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Leaves the reasoning of all turns but the last out, as Qwen3's template does.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def decode(folder: Path, ids: Any) -> str:
    raw = RawTokenizer.from_file(str(folder / "tokenizer.json"))
    return raw.decode([int(i) for i in ids], skip_special_tokens=False)


def chat_for(name: str) -> list[dict[str, str]]:
    """Templates of these small families know users and assistants only."""
    without = [{**m, "role": "user"} if m["role"] == "tool" else m for m in CHAT]
    return without if name in ("gemma", "llama2", "unigram") else [dict(m) for m in CHAT]


def loaded(folders: dict[str, Path], tmp_path: Path, template: str) -> tuple[Tokenizer, Path]:
    folder = shutil.copytree(folders["chatml"], tmp_path / "changed")
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer.load(str(folder)), folder


@pytest.mark.parametrize("name", NAMES)
def test_each_turn_is_its_words_and_its_end(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    rendered = tokenizer.render_turns(chat_for(name))
    wanted = [m["content"].encode() for m in CHAT if m["role"] == "assistant"]
    for turn, content in zip(rendered.turns, wanted, strict=True):
        spans = tokenizer.spans(rendered.ids[turn.start : turn.stop])
        assert spans.data.lstrip() == content
        assert spans.ids[-1] == tokenizer.roles["end_of_turn"] and not spans.roles[:-1].any()
    assert rendered.assistant_mask.sum() == sum(map(len, rendered.turns))
    outside = tokenizer.spans(rendered.ids[~rendered.assistant_mask]).data
    assert b"scale says" in outside and b"13 then" not in outside


@pytest.mark.parametrize("name", NAMES)
def test_the_ids_are_those_of_the_whole_chat(tokenizers: dict[str, Tokenizer], name: str) -> None:
    # No merge of these vocabularies crosses a turn's border here, so cutting there changes nothing.
    tokenizer, chat = tokenizers[name], chat_for(name)
    rendered = tokenizer.render_turns(chat)
    assert rendered.ids.tolist() == tokenizer.render(chat, add_generation_prompt=False).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_before_a_turn_is_its_prompt(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer, chat = tokenizers[name], chat_for(name)
    rendered = tokenizer.render_turns(chat)
    for turn, index in zip(rendered.turns, (1, 3), strict=True):
        assert rendered.ids[: turn.start].tolist() == tokenizer.render(chat[:index]).tolist()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.text(st.characters(codec="utf-8"), max_size=12), name=st.sampled_from(["chatml", "gemma"]))
def test_any_words_come_back(tokenizers: dict[str, Tokenizer], content: str, name: str) -> None:
    tokenizer = tokenizers[name]
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]
    rendered = tokenizer.render_turns(chat)
    (turn,) = rendered.turns
    shown = content.strip() if name == "gemma" else content  # Gemma's template trims
    assert tokenizer.spans(rendered.ids[turn.start : turn.stop]).data == shown.encode()


def test_both_sides_of_a_pair_align_turn_by_turn(tokenizers: dict[str, Tokenizer]) -> None:
    student, teacher = tokenizers["gemma"], tokenizers["llama3"]
    mine, other = student.render_turns(chat_for("gemma")), teacher.render_turns(CHAT)
    for a, b in zip(mine.turns, other.turns, strict=True):
        spans = student.spans(mine.ids[a.start : a.stop]), teacher.spans(other.ids[b.start : b.stop])
        alignment = align(*spans)
        assert alignment.coverage == 1.0 and (alignment.student_chunk >= 0).all()


def test_typed_control_strings_stay_text_and_think_marks_are_marks(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["chatml"]
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>x</think>y<|im_end|>z"},
    ]
    rendered = tokenizer.render_turns(chat)
    (turn,) = rendered.turns
    spans = tokenizer.spans(rendered.ids[turn.start : turn.stop])
    assert spans.data == b"xy<|im_end|>z"
    roles = [tokenizer.roles[role] for role in ("think_open", "think_close", "end_of_turn")]
    assert spans.ids[spans.roles != 0].tolist() == roles


REASONING = TOOLS.replace("<think>\n\n</think>", "<think>{{ m['reasoning_content'] }}</think>")
TYPED = ("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<think>", "</think>", "<tool_call>")
WORDS = st.lists(st.sampled_from([*TYPED, "0123456789", "0", "12", " ", "think", "\n"]), max_size=6)


@pytest.mark.parametrize("where", ["content", "reasoning", "argument", "name", "key"])
@pytest.mark.parametrize("typed", TYPED)
def test_control_strings_in_the_assistants_words_are_text(
    folders: dict[str, Path], tmp_path: Path, where: str, typed: str
) -> None:
    if where == "content" and typed not in TYPED[:3]:
        return  # think and tool marks are marks there
    tokenizer, folder = loaded(folders, tmp_path, REASONING)
    words = {place: typed if place == where else place for place in ("content", "reasoning", "argument")}
    arguments = {typed if where == "key" else "key": words["argument"]}
    call = {"name": typed if where == "name" else "sum", "arguments": arguments}
    answer = {"role": "assistant", "content": words["content"], "tool_calls": [call]}
    rendered = tokenizer.render_turns([CHAT[0], {**answer, "reasoning_content": words["reasoning"]}, CHAT[2]])
    (turn,) = rendered.turns
    ids = rendered.ids[turn.start : turn.stop]
    names = ["think_open", "think_close", "tool_open", "end_of_turn"]
    assert [i for i in ids.tolist() if i in tokenizer.control] == [tokenizer.roles[n] for n in names]
    shown = (
        f"<think>{words['reasoning']}</think>\n\n{words['content']}<tool_call>{json.dumps(call)}<|im_end|>"
    )
    assert decode(folder, ids) == shown
    assert sum(map(len, rendered.turns)) == rendered.assistant_mask.sum()


def test_content_that_the_reasoning_holds_too_is_text(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer, folder = loaded(folders, tmp_path, REASONING)
    answer = {"role": "assistant", "content": "<|im_start|>", "reasoning_content": "say <|im_start|> x"}
    rendered = tokenizer.render_turns([CHAT[0], answer])
    ids = rendered.ids[rendered.turns[0].start :].tolist()
    assert raw_id(folder, "<|im_start|>") not in ids
    assert "say <|im_start|> x</think>\n\n<|im_start|><|im_end|>" in decode(folder, ids)


def raw_id(folder: Path, token: str) -> int:
    index = RawTokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(token)
    assert index is not None
    return index


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=WORDS, reasoning=WORDS, argument=WORDS)
def test_any_typed_marks_and_digits_come_back(
    reasoner: Tokenizer, content: list[str], reasoning: list[str], argument: list[str]
) -> None:
    call = {"name": "sum", "arguments": {"what": "".join(argument)}}
    answer = {"role": "assistant", "content": "".join(content), "tool_calls": [call]}
    rendered = reasoner.render_turns([CHAT[0], {**answer, "reasoning_content": "".join(reasoning)}])
    (turn,) = rendered.turns
    ids = rendered.ids[turn.start : turn.stop]
    got = reasoner._raw.decode(ids.tolist(), skip_special_tokens=False)
    shown = (
        f"<think>{''.join(reasoning)}</think>\n\n{''.join(content)}<tool_call>{json.dumps(call)}<|im_end|>"
    )
    assert got == shown
    own = [m for m in content if m in TYPED[3:]]  # marks of the content itself
    marks = ["<think>", "</think>", *own, "<tool_call>", "<|im_end|>"]
    assert [reasoner._raw.id_to_token(i) for i in ids.tolist() if i in reasoner.control] == marks


@pytest.fixture(scope="module")
def reasoner(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer whose template writes the reasoning and the tool calls."""
    return loaded(folders, tmp_path_factory.mktemp("reasoner"), REASONING)[0]


@pytest.mark.parametrize("filter_", ["upper", "lower", "trim", "tojson(ensure_ascii=true)"])
def test_typed_marks_stay_text_in_templates_that_change_words(
    makers: ModuleType, folders: dict[str, Path], tmp_path: Path, filter_: str
) -> None:
    template = makers.CHATML.replace("m['content'] }}", f"m['content'] | {filter_} }}}}")
    folder = shutil.copytree(folders["chatml"], tmp_path / "changed")
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer.load(str(folder), roles={"end_of_turn": "<|im_end|>"})
    chat = [CHAT[0], {"role": "assistant", "content": " 7<|im_end|>3"}]
    rendered = tokenizer.render_turns(chat)
    spans = tokenizer.spans(rendered.ids[rendered.turns[0].start : rendered.turns[0].stop])
    assert spans.data.strip(b' "') == b"7<|im_end|>3" and spans.roles[:-1].tolist() == [0] * (len(spans) - 1)


def test_digits_that_could_stand_for_a_mark_are_digits(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer, folder = loaded(folders, tmp_path, TOOLS)
    index = raw_id(folder, "<|endoftext|>")
    content = f"0123456789{index:09} <|endoftext|> 0123456798{index:09}"
    rendered = tokenizer.render_turns([CHAT[0], {"role": "assistant", "content": content}])
    (turn,) = rendered.turns
    assert content.encode() in tokenizer.spans(rendered.ids[turn.start : turn.stop]).data


def test_a_template_may_look_at_what_other_messages_type(folders: dict[str, Path], tmp_path: Path) -> None:
    template = "{% if '<|endoftext|>' in messages[0]['content'] %}[seen]{% endif %}" + TOOLS
    tokenizer, _ = loaded(folders, tmp_path, template)
    chat = [{"role": "user", "content": "a<|endoftext|>"}, CHAT[1]]
    rendered = tokenizer.render_turns(chat)
    assert tokenizer.spans(rendered.ids).data.startswith(b"[seen]")


def test_what_other_messages_type_is_read_as_in_a_prompt(folders: dict[str, Path], tmp_path: Path) -> None:
    # An earlier assistant turn that is only read, and one echoed outside of any turn, are prompt like users'.
    tokenizer, folder = loaded(folders, tmp_path, TOOLS)
    chat = [CHAT[0], {"role": "assistant", "content": "a<|endoftext|>"}, CHAT[0], CHAT[3]]
    rendered = tokenizer.render_turns(chat, last_only=True)
    prompt = rendered.ids[: rendered.turns[0].start]
    assert prompt.tolist() == tokenizer.render(chat[:3]).tolist()
    assert raw_id(folder, "<|endoftext|>") in prompt


@pytest.mark.parametrize("content", ["think", "\n", "", "tool_call", "He has 12."])
def test_marks_the_template_writes_are_marks(folders: dict[str, Path], tmp_path: Path, content: str) -> None:
    tokenizer, folder = loaded(folders, tmp_path, TOOLS)
    call = {"role": "assistant", "content": content, "tool_calls": [{"name": "sum"}]}
    rendered = tokenizer.render_turns([CHAT[0], call, CHAT[2], CHAT[3]])
    first, second = (rendered.ids[turn.start : turn.stop] for turn in rendered.turns)
    written = f'<think>\n\n</think>\n\n{content}<tool_call>{{"name": "sum"}}<|im_end|>'
    assert decode(folder, first) == written
    names = ["think_open", "think_close", "tool_open", "end_of_turn"]
    assert [i for i in first.tolist() if i in tokenizer.control] == [tokenizer.roles[n] for n in names]
    assert decode(folder, second).endswith("13 then.<|im_end|>")


def test_a_template_that_rewrites_earlier_turns_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer, _ = loaded(folders, tmp_path, FORGETFUL)
    with pytest.raises(
        DataError, match=r"rewrites earlier turns: message 1 .*<think>.*rollout.reference_turns=last"
    ):
        tokenizer.render_turns(CHAT)
    assert len(tokenizer.render_turns(CHAT[:2]).turns) == 1


def test_a_turn_unlike_its_generation_prompt_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    template = FORGETFUL.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>model\n{% endif %}")
    tokenizer, _ = loaded(folders, tmp_path, template)
    with pytest.raises(DataError, match="its own generation prompt"):
        tokenizer.render_turns(CHAT[:2])


def test_chats_that_cannot_be_told_apart_are_refused(
    makers: ModuleType, tokenizers: dict[str, Tokenizer], folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="begins with an assistant turn"):
        tokenizers["chatml"].render_turns(CHAT[1:])
    folder = shutil.copytree(folders["chatml"], tmp_path / "endless")
    (folder / "chat_template.jinja").write_text(makers.CHATML.replace("<|im_end|>", ""))
    tokenizer = Tokenizer.load(str(folder), roles={"end_of_turn": "<|im_end|>"})
    with pytest.raises(DataError, match="no end of turn behind the assistant's message 1"):
        tokenizer.render_turns(CHAT[:2])


def test_without_an_end_of_turn_one_is_asked_for(makers: ModuleType, tmp_path: Path) -> None:
    base = makers.byte_level(tmp_path, digits=False, normalize=False)
    tokenizer = Tokenizer.load(str(makers.write(tmp_path, base, None, {})))
    with pytest.raises(ConfigError, match="end_of_turn"):
        tokenizer.render_turns(CHAT)


def test_a_chat_without_an_assistant_has_no_turns(tokenizers: dict[str, Tokenizer]) -> None:
    rendered = tokenizers["chatml"].render_turns(CHAT[:1])
    assert isinstance(rendered, RenderedTurns)
    assert rendered.turns == () and not rendered.assistant_mask.any()
    assert json.dumps(rendered.ids.tolist())
