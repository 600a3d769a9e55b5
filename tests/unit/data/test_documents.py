"""What is read of files as people have them: shards that differ, damaged ones, and what lies beside data."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from relora_ds.data.documents import local_files, mend, open_source
from relora_ds.errors import ConfigError


def files(folder: Path, **contents: bytes | str) -> list[Path]:
    """Files by name, with ``__`` for a dot."""
    made = []
    for name, content in contents.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        made.append(path)
    return made


def texts(given: list[Path], column: str = "text") -> list[str | None]:
    return list(open_source("corpus", given, None, "train", column)())


def parquet(folder: Path, name: str, **columns: list[object]) -> Path:
    pq.write_table(pa.table(columns), folder / name)
    return folder / name


def test_shards_may_differ_in_all_but_the_column(tmp_path: Path) -> None:
    given = files(
        tmp_path,
        a__jsonl='{"text": null}\n{"text": null, "n": [1]}\n',
        b__jsonl='{"text": "one", "n": 1}\n\n{"text": "two", "meta": {"url": null}}\n',
        c__jsonl='{"n": "three", "text": "three"}\n{"n": {"deep": 1}}\n',
        d__json='[{"text": "four"},\n {"text": "five", "n": 1.5}]',
        e__json='\ufeff{"text": "six"}',
    )
    assert texts(given) == [None, None, "one", "two", "three", None, "four", "five", "six"]


def test_shards_of_parquet_may_differ_too(tmp_path: Path) -> None:
    given = [
        parquet(tmp_path, "a.parquet", text=[None, None]),
        parquet(tmp_path, "b.parquet", n=[1, 2], text=["one", "two"]),
        parquet(tmp_path, "c.parquet", n=["x"]),
        parquet(tmp_path, "d.parquet", text=["three"], n=[0.5]),
    ]
    assert texts(given) == [None, None, "one", "two", None, "three"]


def test_a_source_is_read_as_often_as_it_is_asked(tmp_path: Path) -> None:
    given = open_source("corpus", files(tmp_path, a__jsonl='{"text": "one"}\n'), None, "train", "text")
    assert list(given()) == list(given()) == ["one"]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
GOOD = b'{"text": "x"}\n'


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("b.jsonl", GOOD + b'{"text": nope}\n', "line 2: "),
        ("b.jsonl", GOOD + b'{"text": "caf\xe9"}\n', "can't decode byte 0xe9"),
        ("b.jsonl", GOOD + b'"text"\n', "line 2 is no object with columns"),
        ("b.json", b'[{"text": "x"}, 3]', "entry 2 is no object with columns"),
        ("b.json", b'[{"text": "x"}', "delimiter"),
        ("b.txt", b"\xff", "can't decode byte 0xff"),
        ("b.jsonl.gz", GOOD, "gzip"),
        ("b.jsonl.gz", gzip.compress(GOOD * 9)[:-9], "end-of-stream"),
        ("b.jsonl.gz", gzip.compress(GOOD * 9)[:20] + b"?" * 20, None),
        ("b.jsonl.zst", GOOD, None),
        ("b.jsonl.zst", zstandard.compress(GOOD * 99)[:-4], "ends in the middle"),
        ("b.parquet", GOOD, "magic|Parquet"),
        ("b.jsonl", POINTER, "is a pointer of Git LFS, not the file itself; fetch it with git lfs pull"),
        ("b.jsonl.zst", POINTER, "Git LFS"),
        ("b.txt.gz", POINTER, "Git LFS"),
        ("b.parquet", POINTER, "Git LFS"),
    ],
)
def test_a_bad_shard_of_several_is_named(tmp_path: Path, name: str, content: bytes, problem: str | None) -> None:
    suffix = name.partition(".")[2]
    good: dict[str, Callable[[], bytes]] = {
        "parquet": lambda: parquet(tmp_path, "a.parquet", text=["x"]).read_bytes(),
        "jsonl.gz": lambda: gzip.compress(GOOD),
        "txt.gz": lambda: gzip.compress(GOOD),
        "jsonl.zst": lambda: zstandard.compress(GOOD),
    }
    first, bad = tmp_path / f"a.{suffix}", tmp_path / name
    first.write_bytes(good.get(suffix, lambda: GOOD)())
    bad.write_bytes(content)
    with pytest.raises(ConfigError, match=problem) as caught:
        texts([first, bad])
    assert caught.value.key == "SOURCE" and caught.value.value == str(bad)
    assert "\n" not in str(caught.value)


def test_several_zstd_frames_are_one_file(tmp_path: Path) -> None:
    """As pzstd and cat leave them."""
    lines = [json.dumps({"text": f"{i}" * 999}) + "\n" for i in range(3)]
    given = files(tmp_path, a__jsonl__zst=b"".join(zstandard.compress(line.encode()) for line in lines))
    assert texts(given) == [f"{i}" * 999 for i in range(3)]


def test_a_column_that_nobody_has_names_those_there_are(tmp_path: Path) -> None:
    given = files(tmp_path, a__jsonl='{"id": 1}\n{"id": 2, "content": "x"}\n')
    with pytest.raises(ConfigError, match=r"^--text-column='text': corpus has no such column; its columns: id, content$"):
        texts(given)
    assert texts(given, "content") == [None, "x"]


def test_what_is_no_data_is_passed_over_in_a_folder_and_told(tmp_path: Path) -> None:
    (tmp_path / ".cache").mkdir()
    files(tmp_path, a__jsonl=GOOD, dataset_infos__json="{}", dataset_info__json="{}", state__json="{}")
    (tmp_path / "._a.jsonl").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / ".cache" / "b.jsonl").write_bytes(GOOD)
    found = local_files(str(tmp_path), lambda _file: False)
    assert found is not None
    data, passed_over = found
    assert [file.name for file in data] == ["a.jsonl"]
    assert sorted(file.name for file in passed_over) == [
        "._a.jsonl",
        "b.jsonl",
        "dataset_info.json",
        "dataset_infos.json",
        "state.json",
    ]
    named = local_files(str(tmp_path / "state.json"), lambda _file: False)
    assert named == ([tmp_path / "state.json"], []), "by name it is meant"


def test_halves_of_surrogate_pairs_are_mended() -> None:
    assert mend(json.loads('"hello \\ud83d world"')) == "hello \ufffd world"
    assert mend(json.loads('"\\ud83d\\ude00"')) == mend("\ud83d\ude00") == "😀"
    for text in ("plain", "naïve 😀", ""):
        assert mend(text) == text
