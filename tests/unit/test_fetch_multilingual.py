"""The script that makes multilingual prompts, as far as it goes without a network: on made-up books."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from jaxdistill.errors import DataError

SCRIPTS = Path(__file__).parents[2] / "scripts"
TRAIN, HELD_OUT = 1, 2  # chapters


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The script as a module; it imports what lies beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield importlib.import_module("fetch_multilingual")


def words(name: str) -> str:
    """A paragraph of one sentence, long enough to be taken."""
    return f"This is the paragraph that is called {name}, " + "and so it goes on " * 4 + "to its end."


def book(*paragraphs: tuple[int, str]) -> str:
    """The plain text of a book with these paragraphs, each in its chapter."""
    return "\n\n".join(f"{chapter}.1. Heading\n\n    {text}" for chapter, text in paragraphs)


def texts(rows: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """Language and text of each row; no two rows may be equal."""
    found = [(row["metadata"]["language"], row["messages"][0]["content"] + row["response"]) for row in rows]
    assert len(set(found)) == len(found)
    return set(found)


def test_a_text_of_both_sides_is_held_out_alone(script: ModuleType) -> None:
    """Twice over: as a whole paragraph, and as the beginning that is taken of two."""
    begins = words("begun")
    english = book(
        (TRAIN, words("both")),
        (HELD_OUT, words("both")),
        (TRAIN, f"{begins} It ends in one way here, {'which is long ' * 9}"),
        (HELD_OUT, f"{begins} It ends in another way there, {'which is long ' * 9}"),
        (TRAIN, words("one")),
    )
    chinese = book(
        *((TRAIN, words(f"zh {i}")) for i in range(3)), *((HELD_OUT, words(f"zh {i}")) for i in (3, 4))
    )
    train, heldout = map(texts, script.rows_of({"zh-cn": chinese, "en": english}))
    assert {text for language, text in heldout if language == "en"} == {words("both"), begins}
    assert {text for language, text in train if language == "en"} == {words("one")}
    assert len(train) == 4 and len(heldout) == 4


def test_what_stands_in_two_books_is_english_and_what_stands_twice_in_one_is_kept(script: ModuleType) -> None:
    german = book((TRAIN, words("untranslated")), (TRAIN, words("zweimal")), (3, words("zweimal")))
    english = book((TRAIN, words("untranslated")), (TRAIN, words("twice")))
    chinese = book(*((TRAIN, words(f"zh {i}")) for i in range(4)))
    train, heldout = script.rows_of({"zh-cn": chinese, "de": german, "en": english})
    assert {one for one in texts(train) if one[0] != "zh-cn"} == {
        ("de", words("zweimal")),
        ("en", words("untranslated")),
        ("en", words("twice")),
    }
    assert not heldout


def test_a_paragraph_without_a_place_to_cut_is_left_out(script: ModuleType) -> None:
    """Its only space comes before two fifths of it."""
    whole = "a" * 50 + " " + "b" * 100
    assert script.taken(whole) == whole and script.cut(whole) is None
    assert script.cut("b" * 100 + " " + "a" * 50) == ("b" * 100, " " + "a" * 50)
    chinese = book(*((TRAIN, words(f"zh {i}")) for i in range(2)))
    english = book((TRAIN, whole), (TRAIN, words("one")))
    train, _ = script.rows_of({"zh-cn": chinese, "en": english})
    assert {text for language, text in texts(train) if language == "en"} == {words("one")}


@pytest.mark.parametrize("left", [[], ["debian-reference-it_1_all.deb", "debian-reference-it_2_all.deb"]])
def test_a_download_of_no_or_two_files_is_said(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, left: list[str]
) -> None:
    def run(*command: str, folder: Path) -> None:
        for name in left:
            (folder / name).touch()

    monkeypatch.setattr(script, "run", run)
    said = "no file" if not left else str(left)
    with pytest.raises(DataError, match=re.escape(f"left {said}, expected one debian-reference-it_*.deb")):
        script.download("it", tmp_path)
