"""`jaxdistill <word>`: the words, and what is said of others."""

import importlib.util

import pytest

from jaxdistill.__main__ import main


@pytest.mark.parametrize("word", ["train", "evaluate", "serve", "export"])
def test_each_word_has_its_module(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert importlib.util.find_spec(f"jaxdistill.{word}") is not None
    with pytest.raises(SystemExit) as caught:
        main([word, "--help"])
    assert caught.value.code == 0
    assert "--" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no command given, expected one of train, evaluate, serve, export, report, doctor, align"),
        (
            ["trian"],
            "unknown command 'trian', expected one of train, evaluate, serve, export, report, doctor, align; "
            "did you mean 'train'?",
        ),
        (
            ["zzz", "--config", "x"],
            "unknown command 'zzz', expected one of train, evaluate, serve, export, report, doctor, align",
        ),
    ],
)
def test_other_words_are_one_line_and_exit_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr() == ("", f"jaxdistill: {said}\n")


def test_help_names_every_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {word} " in said for word in ("train", "evaluate", "serve", "export"))
