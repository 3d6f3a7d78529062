"""Which tokens are marks that steer a model, and which of them ends a turn: the template tells."""

import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from tokenizers import Tokenizer as RawTokenizer

from jaxdistill.errors import ConfigError
from jaxdistill.text import Tokenizer


def raw(folder: Path) -> RawTokenizer:
    return RawTokenizer.from_file(str(folder / "tokenizer.json"))


def test_a_token_merely_called_call_ends_no_turn(makers: ModuleType, tmp_path: Path) -> None:
    base = makers.byte_level(tmp_path, digits=False, normalize=False)
    base.add_special_tokens(["<|im_end|>", "<call>", "[call]"])
    tokenizer = Tokenizer.load(str(makers.write(tmp_path / "a", base, makers.CHATML, {})))
    assert list(tokenizer.roles) == ["end_of_turn"] and len(tokenizer.stop_ids) == 1
    base.add_special_tokens(["<|call|>"])
    folder = makers.write(tmp_path / "b", base, makers.CHATML, {})
    assert Tokenizer.load(str(folder)).roles["end_of_call"] == raw(folder).token_to_id("<|call|>")


# Gemma's HTML tags are added tokens that nobody flagged, and its vocabulary holds them as it holds words.
HTML = {
    "a comment": "{# answer with <h1> #}",
    "a default instruction": "{{ 'Answer with <h1>.\n' }}",
    "a word it looks for": "{% if '<h1>' in messages[0]['content'] %}{% endif %}",
}


@pytest.mark.parametrize("name", sorted(HTML))
def test_a_mark_the_template_only_speaks_of_is_text(
    makers: ModuleType, folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(folders["gemma"], tmp_path / "speaks")
    (folder / "chat_template.jinja").write_text(HTML[name] + makers.GEMMA)
    spans = Tokenizer.load(str(folder)).encode("<h1>")
    assert spans.ids.tolist() == [raw(folder).token_to_id("<h1>")] and spans.data == b"<h1>"


@pytest.mark.parametrize(
    "written",
    [
        ("<start_of_turn>", "<h1><start_of_turn>"),
        (
            "{{ m['content'] | trim }}",
            "{{ m['content'] }}{% for c in m['tool_calls'] %}<h1>{{ c }}{% endfor %}",
        ),
        ("{{ m['content'] | trim }}", "{{ m['content'] }}{% if m['role'] == 'tool' %}<h1>{% endif %}"),
        ("{{ m['content'] | trim }}", "{{ m['reasoning_content'] }}{{ '<h' ~ 1 ~ '>' }}{{ m['content'] }}"),
    ],
)
def test_a_mark_the_template_writes_between_messages_is_control(
    makers: ModuleType, folders: dict[str, Path], tmp_path: Path, written: tuple[str, str]
) -> None:
    folder = shutil.copytree(folders["gemma"], tmp_path / "writes")
    (folder / "chat_template.jinja").write_text(makers.GEMMA.replace(*written))
    assert raw(folder).token_to_id("<h1>") in Tokenizer.load(str(folder)).control


def test_a_template_for_tools_alone_leaves_tags_text(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["gemma"], tmp_path / "tools")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tool_use", "template": config["chat_template"]}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(str(folder), roles={"end_of_turn": "<end_of_turn>"})
    assert len(tokenizer.encode("<h1>")) == 1


SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
# Each is a template, the tokens it uses, the end of turn ("" for none), and named tokens.
ENDS_OF_TURN: dict[str, tuple[str, list[str], str, dict[str, str]]] = {
    "opens the next turn": (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}<|assistant|>",
        ["<|user|>", "<|assistant|>", "<|eos|>"],
        "",
        {"eos_token": "<|eos|>"},
    ),
    "opens the next turn as any other": (
        "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"
        "<|start|>assistant\n",
        ["<|start|>", "<s>"],
        "",
        {"bos_token": "<s>"},
    ),
    "ends the user's turns too, behind a default system turn": (
        SYSTEM
        + "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}",
        ["<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
        {},
    ),
    "ends and opens turns": (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>",
        ["<|user|>", "<|assistant|>", "<|end|>"],
        "<|end|>",
        {},
    ),
    "a mark between messages alone": (
        "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}",
        ["<|eos|>"],
        "<|eos|>",
        {"eos_token": "<|eos|>"},
    ),
    "begins as it ends": (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{{ eos_token }}{% endfor %}",
        ["<|endoftext|>"],
        "<|endoftext|>",
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    ),
    "ends the last turn otherwise": (
        "{% for m in messages %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}"
        "{{ '<|return|>' if loop.last else '<|end|>' }}{% endfor %}",
        ["<|start|>", "<|message|>", "<|end|>", "<|return|>"],
        "<|return|>",
        {},
    ),
    "knows no third message": (
        "{% if messages | length > 2 %}{{ raise_exception('one turn only') }}{% endif %}"
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}",
        ["<|end|>"],
        "<|end|>",
        {},
    ),
}


@pytest.mark.parametrize("name", sorted(ENDS_OF_TURN))
def test_a_mark_that_opens_turns_is_no_end(makers: ModuleType, tmp_path: Path, name: str) -> None:
    template, tokens, end, config = ENDS_OF_TURN[name]
    base = makers.byte_level(tmp_path, digits=False, normalize=False)
    base.add_special_tokens(tokens)
    folder = makers.write(tmp_path, base, template, config)
    if end:
        assert Tokenizer.load(str(folder)).roles["end_of_turn"] == raw(folder).token_to_id(end)
        return
    with pytest.raises(ConfigError, match=r"begins with a token that opens turns.*name it .*roles"):
        Tokenizer.load(str(folder))
