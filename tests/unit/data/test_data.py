"""Reading prompts, and a stream whose position can be saved."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxdistill.data import DataConfig, PromptStream, read_prompts
from jaxdistill.errors import ConfigError, DataError

ROWS = [{"messages": [{"role": "user", "content": f"Frage {i} é"}], "answer": str(i)} for i in range(10)]


def write(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def stream(path: Path, seed: int = 3) -> PromptStream:
    return PromptStream(read_prompts(path), DataConfig(path=path, prompts_per_step=3), seed=seed)


def test_jsonl_and_parquet_read_the_same(tmp_path):
    lines = read_prompts(write(tmp_path / "a.jsonl", ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    table = read_prompts(tmp_path / "a.parquet")
    assert lines == table
    assert [p.index for p in lines] == list(range(10))
    assert (
        lines[4].messages[0]["content"] == "Frage 4 é" and lines[4].answer == "4" and lines[4].source == "a"
    )


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "hi"}, r"has no 'messages' list \(it has 'prompt'\)"),
        ({"messages": []}, "has no 'messages' list"),
        ([1, 2], "has no 'messages' list"),
        ({"messages": ["hi"]}, "expected an object with 'content' and a 'role' of system"),
        (
            {"messages": [{"role": "wizard", "content": "x"}]},
            "expected an object with 'content' and a 'role'",
        ),
        ({"messages": [{"role": "user"}]}, "the content of a user message is None; expected a string"),
        ({"messages": [{"role": "user", "content": 42}]}, "the content of a user message is 42"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "the content of a user message is"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "nothing but an assistant's turn"),
        (
            {"messages": [*ROWS[0]["messages"], {"role": "assistant", "content": "x"}], "response": "y"},
            "ends with the assistant's turn and has a 'response' too",
        ),
        ({"messages": ROWS[0]["messages"], "tools": "{"}, "'tools' is text that is not JSON"),
        ({"messages": ROWS[0]["messages"], "tools": {"name": "f"}}, "expected a list of tool descriptions"),
        ({"messages": ROWS[0]["messages"], "answer": 3}, "'answer' is 3; expected a string"),
        ({"messages": ROWS[0]["messages"], "metadata": [1]}, r"'metadata' is \[1\]; expected an object"),
        ({"messages": ROWS[0]["messages"], "metadata": "{"}, "'metadata' is text that is not JSON"),
        ("{nonsense", "is not JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, says):
    path = write(tmp_path / "bad.jsonl", [ROWS[0], ROWS[1], row])
    with pytest.raises(DataError, match=says) as error:
        read_prompts(path)
    assert "bad.jsonl line 3" in str(error.value)


def test_a_chat_that_ends_with_the_assistant_is_a_prompt_and_its_reference(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": turns}, {"messages": turns[:1], "response": "b"}]
    chat, split = read_prompts(write(tmp_path / "a.jsonl", rows))
    assert chat.messages == split.messages == turns[:1] and chat.response == split.response == turns[1]
    assert read_prompts(write(tmp_path / "b.jsonl", ROWS))[0].response is None


def test_tools_and_tool_calls_survive_a_parquet_file(tmp_path):
    # Each tool's parameters have their own shape, so they are text there; absent keys of a message come
    # back absent and not as None.
    tools = [{"name": "f", "parameters": {"x": 1}}, {"name": "g", "parameters": {"y": [2]}}]
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    messages = [{"role": "user", "content": "a"}, call, {"role": "tool", "content": "1"}]
    (line,) = read_prompts(write(tmp_path / "a.jsonl", [{"messages": messages, "tools": tools}]))
    table = pa.Table.from_pylist([{"messages": messages, "tools": json.dumps(tools), "source": "a"}])
    pq.write_table(table, tmp_path / "t.parquet")
    assert read_prompts(tmp_path / "t.parquet") == [line]
    assert line.messages == messages and line.tools == tools


def test_missing_empty_and_unknown_files(tmp_path):
    with pytest.raises(ConfigError, match="no data file"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="has no rows"):
        read_prompts(write(tmp_path / "empty.jsonl", []))
    with pytest.raises(ConfigError, match=r"unknown kind of data file '\.csv'"):
        read_prompts(write(tmp_path / "a.csv", ROWS))
    (tmp_path / "broken.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_prompts(tmp_path / "broken.parquet")


def test_the_stream_sees_every_row_each_epoch_in_a_new_order(tmp_path):
    prompts = stream(write(tmp_path / "a.jsonl", ROWS))
    seen = [p.index for _ in range(10) for p in next(prompts)]
    epochs = [seen[:10], seen[10:20], seen[20:30]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_restored_position_continues_with_the_same_groups(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    prompts = stream(path)
    for _ in range(4):
        next(prompts)
    state = json.loads(json.dumps(prompts.state()))
    expected = [[p.index for p in next(prompts)] for _ in range(5)]
    again = stream(path)
    again.restore(state)
    assert [[p.index for p in next(again)] for _ in range(5)] == expected


def test_fewer_rows_than_a_step_needs(tmp_path):
    with pytest.raises(ConfigError, match=r"prompts_per_step=3, but .* has only 2 rows"):
        stream(write(tmp_path / "a.jsonl", ROWS[:2]))


def test_a_key_that_is_nearly_one_of_ours_is_said_once(tmp_path, caplog):
    chat = {"messages": [{"role": "user", "content": "x"}]}
    both = {"answer": "3", "answers": ["3", "three"]}
    rows = [{**chat, **both, "resources": 1}, {**chat, "anwser": "3"}, {**chat, "anwser": "4"}]
    assert len(read_prompts(write(tmp_path / "rows.jsonl", rows))) == 3
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/rows.jsonl line 2 has 'anwser', which is not read, and no 'answer'; did you mean that?"
    ]
