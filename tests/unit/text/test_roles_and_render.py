"""The end of turn, think marks, stop ids, and chat templates."""

import json
import logging
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tokenizers import Tokenizer as RawTokenizer

from jaxdistill.errors import ConfigError, DataError
from jaxdistill.records import END_OF_TURN
from jaxdistill.text import Tokenizer

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]


def raw(folder: Path) -> RawTokenizer:
    return RawTokenizer.from_file(str(folder / "tokenizer.json"))


def text(tokenizer: Tokenizer, folder: Path, messages: list[Any], **options: Any) -> str:
    return raw(folder).decode(tokenizer.render(messages, **options).tolist(), skip_special_tokens=False)


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("chatml", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
        ("gemma", "<end_of_turn>"),
        ("llama2", "</s>"),
        ("unigram", "</s>"),
    ],
)
def test_end_of_turn_comes_from_the_template(
    tokenizers: dict[str, Tokenizer], folders: dict[str, Path], name: str, end: str
) -> None:
    index = raw(folders[name]).token_to_id(end)
    assert tokenizers[name].roles["end_of_turn"] == index
    assert tokenizers[name].stop_ids == {index}


def test_marks_are_found_by_their_names_and_overridable(folders: dict[str, Path]) -> None:
    path = folders["chatml"]
    tokenizer = Tokenizer.load(str(path))
    assert tokenizer.roles["think_open"] == raw(path).token_to_id("<think>")
    assert tokenizer.roles["think_close"] == raw(path).token_to_id("</think>")
    assert tokenizer.roles["tool_open"] == raw(path).token_to_id("<tool_call>")
    other = Tokenizer.load(str(path), roles={"end_of_turn": "<|endoftext|>", "think_open": "<tool_call>"})
    assert other.roles["end_of_turn"] == raw(path).token_to_id("<|endoftext|>")
    assert other.roles["think_open"] == raw(path).token_to_id("<tool_call>")
    assert "tool_open" not in other.roles


TOOL_MARKS = {
    "qwen": {
        "tool_open": "<tool_call>",
        "tool_close": "</tool_call>",
        "tool_result_open": "<tool_response>",
        "tool_result_close": "</tool_response>",
    },
    "deepseek": {
        "tool_list_open": "<\uff5ctool\u2581calls\u2581begin\uff5c>",
        "tool_list_close": "<\uff5ctool\u2581calls\u2581end\uff5c>",
        "tool_open": "<\uff5ctool\u2581call\u2581begin\uff5c>",
        "tool_close": "<\uff5ctool\u2581call\u2581end\uff5c>",
        "tool_argument": "<\uff5ctool\u2581sep\uff5c>",
        "tool_result_open": "<\uff5ctool\u2581output\u2581begin\uff5c>",
        "tool_result_close": "<\uff5ctool\u2581output\u2581end\uff5c>",
    },
    "llama": {"tool_open": "<|python_tag|>", "end_of_call": "<|eom_id|>"},
    "mistral": {"tool_open": "[TOOL_CALLS]", "tool_argument": "[ARGS]", "think_close": "[/THINK]"},
    "kimi": {"tool_list_open": "<|tool_calls_section_begin|>", "tool_open": "<|tool_call_begin|>"},
}


@pytest.mark.parametrize("family", sorted(TOOL_MARKS))
def test_tool_marks_of_each_family_are_roles(makers: ModuleType, tmp_path: Path, family: str) -> None:
    base = makers.byte_level(tmp_path, digits=False, normalize=False)
    base.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    base.add_tokens(list(TOOL_MARKS[family].values()))
    folder = makers.write(tmp_path, base, makers.CHATML, {})
    tokenizer = Tokenizer.load(str(folder))
    roles = dict(tokenizer.roles)
    end = roles.pop("end_of_turn")
    assert roles == {role: raw(folder).token_to_id(mark) for role, mark in TOOL_MARKS[family].items()}
    stops = {roles[role] for role in roles if role == "end_of_call"}
    assert tokenizer.stop_ids == {end, *stops}


def test_bad_overrides_are_refused(folders: dict[str, Path]) -> None:
    path = str(folders["chatml"])
    with pytest.raises(ConfigError, match=r"unknown role 'eot'.*end_of_turn"):
        Tokenizer.load(path, roles={"eot": "<|im_end|>"})
    with pytest.raises(ConfigError, match="no token of this vocabulary"):
        Tokenizer.load(path, roles={"end_of_turn": "<|nowhere|>"})
    with pytest.raises(ConfigError, match="share one token"):
        Tokenizer.load(path, roles={"end_of_turn": "<think>", "think_open": "<think>"})
    with pytest.raises(ConfigError, match="share one token"):
        Tokenizer.load(path, roles={"think_open": "<|im_end|>"})


def test_a_role_nobody_plays_is_refused(tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(ConfigError, match="think_open"):
        tokenizers["llama3"].role_span("think_open")


def test_stop_ids_include_eos_ids_but_no_text(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(folders["chatml"], tmp_path / "stops")
    eos = raw(folder).token_to_id("<|endoftext|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos]}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 2, "vocab_size": 500}))
    with caplog.at_level(logging.WARNING):
        tokenizer = Tokenizer.load(str(folder))
    assert tokenizer.stop_ids == {eos, tokenizer.roles["end_of_turn"]}
    assert "eos_token_id 2" in caplog.text
    # Whichever of them a model stops with, its turn has ended.
    assert tokenizer.spans(sorted(tokenizer.stop_ids)).roles.tolist() == [END_OF_TURN] * 2


def test_a_template_without_an_end_of_turn_asks_for_one(makers: ModuleType, tmp_path: Path) -> None:
    base = makers.byte_level(tmp_path, digits=False, normalize=False)
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"
    folder = str(makers.write(tmp_path, base, template, {}))
    with pytest.raises(ConfigError, match=r"end of turn is unknown.*roles"):
        Tokenizer.load(folder)
    assert list(Tokenizer.load(folder, roles={"end_of_turn": "\u0120apples"}).roles) == ["end_of_turn"]


def test_without_a_template_only_rendering_is_refused(makers: ModuleType, tmp_path: Path) -> None:
    base = makers.byte_level(tmp_path, digits=False, normalize=False)
    tokenizer = Tokenizer.load(str(makers.write(tmp_path, base, None, {})))
    assert tokenizer.encode("Tom").data == b"Tom"
    with pytest.raises(ConfigError, match="no chat template"):
        tokenizer.render(CHAT)


def test_render_parses_control_strings_and_adds_no_second_bos(
    tokenizers: dict[str, Tokenizer], folders: dict[str, Path]
) -> None:
    rendered = text(tokenizers["llama3"], folders["llama3"], CHAT)
    assert rendered == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHow many?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    ids = tokenizers["llama3"].render(CHAT).tolist()
    assert ids.count(raw(folders["llama3"]).token_to_id("<|begin_of_text|>")) == 1


def test_generation_prompt_can_be_left_out(
    tokenizers: dict[str, Tokenizer], folders: dict[str, Path]
) -> None:
    whole = text(tokenizers["chatml"], folders["chatml"], CHAT)
    without = text(tokenizers["chatml"], folders["chatml"], CHAT, add_generation_prompt=False)
    assert whole == without + "<|im_start|>assistant\n"


def test_a_refused_system_turn_is_folded_and_said_once(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(folders["gemma"], tmp_path / "fold")
    tokenizer = Tokenizer.load(str(folder))
    with caplog.at_level(logging.WARNING):
        first, second = (text(tokenizer, folder, CHAT) for _ in range(2))
    expected = "<start_of_turn>user\nBe brief.\n\nHow many?<end_of_turn>\n<start_of_turn>model\n"
    assert first == second and first.endswith(expected)
    assert sum("refuses a system turn" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize("content", ["Be brief.", "How many?", "i"])
def test_a_system_turn_left_out_without_a_word_is_folded(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    # Content that the user's turn happens to hold too must not hide that the template drops the turn.
    folder = shutil.copytree(folders["chatml"], tmp_path / "dropping")
    template = (
        "{% for m in messages %}{% if m['role'] != 'system' %}"
        "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer.load(str(folder))
    messages = [{"role": "system", "content": content}, {"role": "user", "content": "How many?"}]
    with caplog.at_level(logging.WARNING):
        first, second = (text(tokenizer, folder, messages) for _ in range(2))
    assert first == second == f"<|im_start|>user\n{content}\n\nHow many?<|im_end|>\n"
    assert sum("leaves a system turn out" in r.getMessage() for r in caplog.records) == 1
    assert "system turn" not in text(tokenizer, folder, messages[1:])


@pytest.mark.parametrize(
    "change",
    [
        "m['content'] | upper",
        "m['content'][:20]",
        "m['content'] | replace('e', '3')",
        "m['content'] | length",
    ],
)
def test_a_system_turn_that_is_changed_is_not_folded(
    makers: ModuleType,
    folders: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: str,
) -> None:
    folder = shutil.copytree(folders["chatml"], tmp_path / "changing")
    (folder / "chat_template.jinja").write_text(makers.CHATML.replace("m['content']", change))
    tokenizer = Tokenizer.load(str(folder), roles={"end_of_turn": "<|im_end|>"})
    with caplog.at_level(logging.WARNING):
        assert text(tokenizer, folder, CHAT).startswith("<|im_start|>system\n")
    assert not caplog.records


def test_a_system_turn_that_only_counts_is_folded(folders: dict[str, Path], tmp_path: Path) -> None:
    # With a system turn the user's is no longer the first, so this template makes something else of the chat.
    folder = shutil.copytree(folders["chatml"], tmp_path / "counting")
    template = (
        "{% for m in messages %}{% if m['role'] != 'system' %}{{ loop.index }}. "
        "{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    assert text(Tokenizer.load(str(folder)), folder, CHAT) == "1. Be brief.\n\nHow many?<|im_end|>\n"


def test_the_tokenizers_own_file_names_its_special_tokens(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["chatml"], tmp_path / "named")
    (folder / "chat_template.jinja").write_text("{{ eos_token }}{{ pad_token }}<|im_end|>")
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "<|im_start|>", "pad_token": "!"})
    )
    tokenizer = Tokenizer.load(str(folder), roles={"end_of_turn": "<|im_end|>"})
    assert text(tokenizer, folder, CHAT) == "<|endoftext|>!<|im_end|>"


def test_tools_a_template_has_no_place_for_are_said(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = Tokenizer.load(str(shutil.copytree(folders["llama3"], tmp_path / "toolless")))
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "sum"}}]}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            tokenizer.render([*CHAT, call], tools=[{"name": "sum"}])
    said = [r.getMessage().partition("no place for ")[2] for r in caplog.records]
    assert said == ["tools; they are left out", "tool_calls; they are left out"]


def test_the_templates_own_words_reach_the_user(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["chatml"], tmp_path / "refusing")
    template = (
        "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('tools come later') }}{% endif %}"
        "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer.load(str(folder))
    with pytest.raises(DataError, match="tools come later"):
        tokenizer.render([{"role": "tool", "content": "1"}])
    with pytest.raises(DataError, match=r"roles \['user'\]"):
        tokenizer.render([{"role": "user", "content": None}])
    with pytest.raises(DataError, match="no messages"):
        tokenizer.render([])


def test_messages_that_are_no_text_are_refused(tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(DataError, match="surrogate"):
        tokenizers["chatml"].render([{"role": "user", "content": "a\ud800"}])


def test_template_arguments_reach_the_template(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["chatml"], tmp_path / "arguments")
    template = (
        "{% if tools %}{{ tools[0]['name'] }}{% endif %}{{ mood }}"
        "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer.load(str(folder))
    shown = text(tokenizer, folder, CHAT[1:], tools=[{"name": "sum"}], template_kwargs={"mood": "calm"})
    assert shown == "sumcalmHow many?<|im_end|>"
