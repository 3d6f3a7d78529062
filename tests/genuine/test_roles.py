"""The roles of genuine tokenizers and their templates, without any configuration."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jaxdistill.errors import DataError
from jaxdistill.text import Tokenizer

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]
END_OF_TURN = {
    "qwen3": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma3": "<end_of_turn>",
    "deepseek_v3": "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "smollm2": "<|im_end|>",
    "toy_student": "</turn>",
    "toy_teacher": "<|end|>",
}
MARKS = {
    "qwen3": {
        "think_open": "<think>",
        "think_close": "</think>",
        "tool_open": "<tool_call>",
        "tool_close": "</tool_call>",
        "tool_result_open": "<tool_response>",
        "tool_result_close": "</tool_response>",
    },
    "deepseek_v3": {
        "tool_list_open": "<\uff5ctool\u2581calls\u2581begin\uff5c>",
        "tool_list_close": "<\uff5ctool\u2581calls\u2581end\uff5c>",
        "tool_open": "<\uff5ctool\u2581call\u2581begin\uff5c>",
        "tool_close": "<\uff5ctool\u2581call\u2581end\uff5c>",
        "tool_argument": "<\uff5ctool\u2581sep\uff5c>",
        "tool_result_open": "<\uff5ctool\u2581output\u2581begin\uff5c>",
        "tool_result_close": "<\uff5ctool\u2581output\u2581end\uff5c>",
    },
    "gptoss": {"end_of_call": "<|call|>"},
    "tekken": {
        "tool_open": "[TOOL_CALLS]",
        "tool_result_open": "[TOOL_RESULTS]",
        "tool_result_close": "[/TOOL_RESULTS]",
    },
}


def test_roles_are_found_without_configuration(genuine: Any, name: str) -> None:
    tokenizer: Tokenizer = genuine[name]
    wanted = dict(MARKS.get(name, {}))
    if name in END_OF_TURN:
        wanted["end_of_turn"] = END_OF_TURN[name]
    assert {role: tokenizer._raw.id_to_token(i) for role, i in tokenizer.roles.items()} == wanted
    assert {tokenizer.roles[role] for role in wanted if role.startswith("end_of")} <= tokenizer.stop_ids


@pytest.mark.parametrize("family", sorted(END_OF_TURN))
def test_templates_render_as_transformers_renders_them(genuine: Any, family: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    tokenizer: Tokenizer = genuine[family]
    config = json.loads((genuine.folder(family) / "tokenizer_config.json").read_text(encoding="utf-8"))
    variables = {key: v.get("content") if isinstance(v, dict) else v for key, v in config.items()}
    variables = {key: value for key, value in variables.items() if key.endswith("_token")}
    for messages in (CHAT, CHAT[1:], [*CHAT, {"role": "assistant", "content": " Two. "}, CHAT[1]]):
        for prompted in (True, False):
            (wanted,), _ = render_jinja_template(
                [messages],
                chat_template=config["chat_template"],
                add_generation_prompt=prompted,
                **variables,
            )
            assert tokenizer._template.render(messages, add_generation_prompt=prompted) == wanted


@pytest.mark.parametrize("family", sorted(END_OF_TURN))
def test_turns_are_marked_or_refused(genuine: Any, family: str) -> None:
    tokenizer: Tokenizer = genuine[family]
    chat = [*CHAT, {"role": "assistant", "content": "Two."}, CHAT[1], {"role": "assistant", "content": "2"}]
    if family == "qwen3":  # leaves the empty reasoning of earlier turns out
        with pytest.raises(DataError, match="rewrites earlier turns"):
            tokenizer.render_turns(chat)
        chat = chat[:3]
    rendered = tokenizer.render_turns(chat)
    wanted = [m["content"].encode() for m in chat if m["role"] == "assistant"]
    for turn, content in zip(rendered.turns, wanted, strict=True):
        spans = tokenizer.spans(rendered.ids[turn.start : turn.stop])
        assert spans.data.strip() == content
        assert spans.ids[-1] == tokenizer.roles["end_of_turn"]
    before = rendered.ids[: rendered.turns[0].start].tolist()
    assert before == tokenizer.render(chat[:2]).tolist()


def test_qwens_tool_turns_with_reasoning_are_marked(genuine: Any) -> None:
    tokenizer: Tokenizer = genuine["qwen3"]
    call = {"type": "function", "function": {"name": "count", "arguments": {"what": "apples"}}}
    chat = [
        CHAT[1],
        {"role": "assistant", "content": "", "reasoning_content": "Count them.", "tool_calls": [call]},
        {"role": "tool", "content": "12 <tool_call>"},
        {"role": "assistant", "content": "Twelve.", "reasoning_content": "So 12."},
    ]
    rendered = tokenizer.render_turns(chat, tools=[call])
    first, second = (tokenizer.spans(rendered.ids[turn.start : turn.stop]) for turn in rendered.turns)
    names = {index: role for role, index in tokenizer.roles.items()}
    marks = ["think_open", "think_close", "tool_open", "tool_close", "end_of_turn"]
    assert [names[i] for i in first.ids[first.roles != 0].tolist()] == marks
    assert b"Count them." in first.data and b'"what": "apples"' in first.data
    assert second.data.endswith(b"Twelve.")
    outside = tokenizer.spans(rendered.ids[~rendered.assistant_mask]).data
    assert b"12 " in outside and b"Twelve" not in outside


def test_qwens_own_words_hold_no_control_tokens(genuine: Any) -> None:
    tokenizer: Tokenizer = genuine["qwen3"]
    typed = "I write <|im_start|> and <|endoftext|> now"
    call = {"type": "function", "function": {"name": "count", "arguments": {"x": "<|im_end|>"}}}
    answer = {
        "role": "assistant",
        "content": "<|im_start|>",
        "reasoning_content": typed,
        "tool_calls": [call],
    }
    (turn,) = (rendered := tokenizer.render_turns([CHAT[1], answer])).turns
    spans = tokenizer.spans(rendered.ids[turn.start : turn.stop])
    marks = ("think_open", "think_close", "tool_open", "tool_close", "end_of_turn")
    assert spans.ids[spans.roles != 0].tolist() == [tokenizer.roles[role] for role in marks]
    assert (
        typed.encode() in spans.data and b"\n<|im_start|>\n" in spans.data and b'"<|im_end|>"' in spans.data
    )


def test_gemmas_tags_stay_text_when_its_template_speaks_of_them(genuine: Any, tmp_path: Path) -> None:
    source = genuine.folder("gemma3")
    shutil.copy(source / "tokenizer.json", tmp_path)
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["chat_template"] += "{# answer in <b>bold</b> #}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(str(tmp_path))
    assert tokenizer.control == genuine["gemma3"].control
    assert tokenizer.encode("<b>bold</b>").data == b"<b>bold</b>" and len(tokenizer.encode("<b>")) == 1
