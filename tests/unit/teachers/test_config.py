"""A teacher's section of the configuration, as a file would hold it."""

from pathlib import Path

import pytest
import yaml

from jaxdistill.config import StrictConfig, load
from jaxdistill.errors import ConfigError
from jaxdistill.teachers import EmbeddedConfig, ReplayConfig, SGLangConfig, TeacherConfig

URL = "http://127.0.0.1:30000"


class File(StrictConfig):
    teacher: TeacherConfig


def read(tmp_path: Path, **section) -> TeacherConfig:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"teacher": section}))
    return load(tmp_path / "c.yaml", [], File).teacher


def test_each_kind_has_its_own_settings(tmp_path: Path) -> None:
    assert isinstance(read(tmp_path, kind="sglang", endpoint=URL, tokenizer="t"), SGLangConfig)
    assert isinstance(read(tmp_path, kind="embedded", model="m"), EmbeddedConfig)
    assert isinstance(read(tmp_path, kind="replay", path="p", tokenizer="t"), ReplayConfig)


def test_an_endpoint_may_be_one_url_or_several(tmp_path: Path) -> None:
    one = read(tmp_path, kind="sglang", endpoint=f"{URL}/", tokenizer="t")
    assert isinstance(one, SGLangConfig) and one.endpoints == (URL,)
    two = read(tmp_path, kind="sglang", endpoint=[URL, "https://host/teacher"], tokenizer="t")
    assert isinstance(two, SGLangConfig) and two.endpoints == (URL, "https://host/teacher")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"kind": "sglang", "tokenizer": "t"}, "endpoint"),
        ({"kind": "sglang", "endpoint": [], "tokenizer": "t"}, "endpoint.*is expected"),
        ({"kind": "sglang", "endpoint": [URL, URL + "/"], "tokenizer": "t"}, "listed twice"),
        ({"kind": "sglang", "endpoint": URL, "tokenizer": "t", "model": "m"}, "unknown key.*model"),
        ({"kind": "embedded"}, "model"),
        ({"kind": "embedded", "model": "m", "endpoint": URL}, "unknown key.*endpoint"),
        ({"kind": "embedded", "model": "m", "api_key_env": "K"}, "unknown key.*api_key_env"),
        ({"kind": "replay", "path": "p", "tokenizer": "t", "record": "r"}, "unknown key.*record"),
        ({"kind": "sglang", "endpoint": "localhost:30000", "tokenizer": "t"}, "http://host:30000"),
        ({"kind": "sglang", "endpoint": "http://me:pass@host", "tokenizer": "t"}, "credentials"),
        ({"kind": "sglang", "endpoint": f"{URL}?key=1", "tokenizer": "t"}, "query"),
        ({"kind": "sglang", "endpoint": URL, "tokenizer": "t", "attempts": 0}, "attempts"),
        ({"kind": "sglang", "endpoint": URL, "tokenizer": "t", "name": "a/b"}, "name"),
        ({"kind": "nope"}, "sglang.*embedded.*replay"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path: Path, section: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        read(tmp_path, **section)
    assert "teacher" in str(error.value) and "pass@" not in str(error.value)
