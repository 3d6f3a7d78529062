"""`python -m jaxdistill.align`: the table, the page, a run's samples, and one line for each mistake."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from jaxdistill.__main__ import main as dispatch
from jaxdistill.align import align, alignment_rows
from jaxdistill.align.__main__ import main
from jaxdistill.align.compare import compare
from jaxdistill.align.page import MOST_CHUNKS, render_page
from jaxdistill.align.texts import built_in, from_data
from jaxdistill.text import Tokenizer

Browse = Callable[..., tuple[str, list[str]]]
TOY = Path(__file__).parents[3] / "assets" / "toy"
PAIR = ["--student", str(TOY / "student"), "--teacher", str(TOY / "teacher")]


@pytest.fixture(scope="module")
def pair() -> tuple[Tokenizer, Tokenizer]:
    return Tokenizer.load(str(TOY / "student")), Tokenizer.load(str(TOY / "teacher"))


class Page(HTMLParser):
    """Counts the boxes of a page and collects what could load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.boxes: dict[str, int] = {}
        self.tokens: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.titles: list[str] = []
        self._in_token = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        classes = values.get("class", "").split()
        if classes[:1] == ["pair"]:
            self.boxes[classes[1]] = self.boxes.get(classes[1], 0) + 1
        self._in_token = classes == ["t"]
        if self._in_token:
            self.tokens.append("")
            self.titles.append(values["title"])
        self.tags.add(tag)
        self.links += [value for name, value in values.items() if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        if self._in_token:
            self.tokens[-1] += data
            self._in_token = False


def test_the_table_has_every_kind_and_both_sides_roles(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(PAIR) == 0
    out = capsys.readouterr().out
    assert "end_of_turn </turn>" in out and "end_of_turn <|end|>" in out
    for kind in built_in():
        row = next(line for line in out.splitlines() if line.startswith(kind))
        shares = [float(share) for share in re.findall(r"([\d.]+) %", row)]
        assert sum(shares[:3]) == pytest.approx(100, abs=0.15)  # exact, chunk, unaligned, each rounded
        assert shares[3] == 100


def test_the_figures_are_the_alignments(pair: tuple[Tokenizer, Tokenizer]) -> None:
    student, teacher = pair
    content = b"10 + 90 = 100, Tom"
    (row,) = compare(student, teacher, {"mine": [content, content]})
    found = align(student.encode(content), teacher.encode(content))
    assert row.student_tokens == 2 * len(found.student_chunk)
    assert row.exact == pytest.approx(found.exact.sum() / len(found.student_chunk))
    assert row.unaligned == 0 and row.coverage == 1.0 and row.bytes == 2 * len(content)
    assert row.exact + row.chunk == pytest.approx(1.0)
    assert row.mean_chunk[0] == pytest.approx(len(found.student_chunk) / found.num_chunks)
    assert row.longest_chunk == (3, 1)  # "100"
    assert row.tokens_per_second > 0


def test_a_text_may_be_any_bytes_and_may_come_from_stdin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "odd.bin"
    file.write_bytes(b"caf\xc3\xa9 \xff\x00 100\r\n")
    assert main([*PAIR, "--text", str(file)]) == 0
    assert "odd.bin" in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"10 hours")))
    assert main([*PAIR, "--text", "-"]) == 0
    assert "stdin" in capsys.readouterr().out


def test_of_a_runs_data_what_is_said_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = {"type": "image", "text": None}
    parts = [{"type": "text", "text": "10 "}, image, {"type": "text", "text": "h"}]
    rows = [
        {"messages": [{"role": "user", "content": "no"}], "answer": "no", "response": "10 h"},
        {"messages": [{"role": "user", "content": "no"}], "answer": "10 h"},
        {"messages": [{"role": "user", "content": parts}]},
        {
            "messages": [{"role": "user", "content": "no"}, {"role": "assistant", "content": "é"}],
            "source": "b",
        },
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert from_data(file).texts == {"mine": [b"10 h"] * 3, "b": ["é".encode()]}
    assert main([*PAIR, "--data", str(file)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^mine .*\nb ", out, re.MULTILINE) and "the words of 4 of 4 rows" in out
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    # A call of a tool says nothing of its own: the prompt does.
    file.write_text(json.dumps({"messages": [rows[1]["messages"][0], call]}) + "\n")
    assert from_data(file).texts == {"mine": [b"no"]}
    # Many rows are spread over the file.
    many = [{"messages": rows[0]["messages"], "answer": str(n)} for n in range(2500)]
    file.write_text("".join(json.dumps(row) + "\n" for row in many))
    found = from_data(file)
    assert found.texts["mine"] == [str(n).encode() for n in range(0, 2500, 3)]
    assert found.note == "These are the words of 834 of 2,500 rows."
    file.write_text(json.dumps({"messages": [{"role": "user", "content": [{"type": "image"}]}]}) + "\n")
    assert main([*PAIR, "--data", str(file)]) == 2
    assert "no row has text to align" in capsys.readouterr().err


def test_the_word_align_is_the_same_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["align", "--student", "nowhere/at all", "--teacher", "x"]) == 2
    assert "no such folder" in capsys.readouterr().err


def write_run(folder: Path, responses: list[tuple[int, str]], config: object) -> Path:
    folder.mkdir()
    rows = [json.dumps({"step": step, "messages": [], "response": text}) for step, text in responses]
    (folder / "samples.jsonl").write_text("".join(row + "\n" for row in rows))
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


CONFIG = {"student": {"path": PAIR[1]}, "teacher": {"kind": "embedded", "model": PAIR[3]}}


def test_a_runs_samples_by_step_with_its_own_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", [(0, "10 h"), (0, "\ud83d"), (20, "100 \u20ac"), (20, "")], CONFIG)
    assert main(["--run", str(run)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^step 0 ", out, re.MULTILINE) and re.search(r"^step 20 ", out, re.MULTILINE)
    assert "encoded anew" in out and PAIR[1] in out
    assert main(["--run", str(run), "--teacher", PAIR[1]]) == 0  # the same tokenizer on both sides
    assert re.search(r"^step 20 .*100.0 %  +0.0 %  +0.0 %", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--student is missing"),
        (PAIR[:2], "--teacher is missing"),
        ([*PAIR[:2], "--teacher", "/no/such/folder"], "no such folder"),
        ([*PAIR, "--text", "/no/such/file"], "cannot be read"),
        ([*PAIR, "--text", "/dev/null"], "is empty"),
        ([*PAIR, "--data", "/no/such/file.jsonl"], "no data file at"),
        ([*PAIR, "--run", "/no/such/run"], "no such file; expected a run folder"),
        ([*PAIR, "--html", "/dev/null/x.html"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error


@pytest.mark.parametrize(
    ("sample", "config", "words"),
    [
        ('{"step": 1}\n', "", "line 1"),
        ("[]\n", "", "line 1"),
        ('{"step": 1, "response": ""}\n', "", "no response with text"),
        ('{"step": 1, "response": "a"}\n', "a: [", "expected YAML"),
        ('{"step": 1, "response": "a"}\n', "[]", "config.yaml names none"),
    ],
)
def test_a_broken_run_is_one_line_and_exit_2(
    tmp_path: Path, sample: str, config: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "samples.jsonl").write_text(sample)
    (tmp_path / "config.yaml").write_text(config)
    assert main(["--run", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error


def expected_boxes(rows: list, kind: str) -> int:
    return sum(
        row.kind == kind
        for one in rows
        for response in one.responses
        for row in alignment_rows(response.student, response.teacher, response.alignment)
    )


def test_the_page_shows_every_chunk_and_token_and_loads_nothing(pair: tuple[Tokenizer, Tokenizer]) -> None:
    rows = compare(*pair, built_in())
    text = render_page(rows, "<student>", "a & b", ["note <1>"])
    page = Page(text)
    assert page.boxes == {kind: n for kind in ("exact", "chunk", "role") if (n := expected_boxes(rows, kind))}
    assert len(page.tokens) == sum(row.student_tokens + row.teacher_tokens for row in rows)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "form"}
    assert all(link.startswith("#") for link in page.links)
    assert "&lt;student&gt;" in text and "note &lt;1&gt;" in text
    assert all(re.search(r"(student|teacher) id \d+: ", title) for title in page.titles)


def test_what_is_not_aligned_is_shown_and_what_is_not_drawn_is_said(
    pair: tuple[Tokenizer, Tokenizer],
) -> None:
    student, teacher = pair
    (row,) = compare(student, teacher, {"<b>": [b"\xff\x00<script>" + b"a " * (2 * MOST_CHUNKS)]})
    text = render_page([row], "s", "t", [])
    page = Page(text)
    assert sum(page.boxes.values()) == MOST_CHUNKS
    total = expected_boxes([row], "exact") + expected_boxes([row], "chunk")
    assert f"{total - MOST_CHUNKS:,} more chunks are not drawn" in text
    assert "script" not in page.tags and "b" in page.tags  # "b" is the page's own


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_a_browser_opens_the_page_and_finds_every_chunk(
    tmp_path: Path, browse: Browse, pair: tuple[Tokenizer, Tokenizer], scheme: str
) -> None:
    path = tmp_path / "page.html"
    assert main([*PAIR, "--html", str(path)]) == 0
    preferred = f"--blink-settings=preferredColorScheme={('dark', 'light').index(scheme)}"
    log, asked = browse(path, preferred, "--dump-dom")
    assert "CONSOLE" not in log and asked == []
    rows = compare(*pair, built_in())
    assert Page(log).boxes == {kind: n for kind in ("exact", "chunk") if (n := expected_boxes(rows, kind))}


def test_the_command_does_not_load_jax() -> None:
    code = "import sys, jaxdistill.align.__main__; sys.exit(bool({'jax', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
