"""Text in every supported form -> the same tokens on disk, also when the preparation is interrupted."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from relora_ds.data import prepare as module
from relora_ds.data.prepare import held_out, train_tokenizer
from relora_ds.data.token_dataset import read_index, verify
from relora_ds.data.tokenizer import load
from relora_ds.errors import ConfigError
from relora_ds.run.lock import RunLock

DOCUMENTS = [f"Document {i}: naïve café — tab\there\nsecond line {i * i}\n" + "word " * (i % 5) for i in range(23)]
OUTPUTS = ("train.bin", "validation.bin", "tokenizer.json", "tokenizer_config.json", "index.json")


def jsonl(documents: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents)).encode()


def prepare(source: Path | str, out: Path, **settings: Any) -> dict[str, Any]:
    return module.prepare(str(source), out, **({"vocab_size": 300, "progress": False} | settings))


def read_documents(out: Path, split: str) -> list[str]:
    """The texts of a split, decoded: every document must end with EOS."""
    index = read_index(out)
    ids = np.fromfile(out / f"{split}.bin", dtype=index.dtype)
    ends = np.flatnonzero(ids == index.eos_id)
    assert not len(ids) or ends[-1] == len(ids) - 1
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    starts = [0, *(ends + 1)]
    return [tokenizer.decode(ids[a:b].tolist(), skip_special_tokens=False) for a, b in zip(starts, ends, strict=False)]


def expected(documents: list[str], split: str, seed: int = 0, holdout: float = 0.01) -> list[str]:
    held = held_out(np.arange(len(documents)), seed, holdout)
    return [text for text, out in zip(documents, held, strict=True) if out == (split == "validation")]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(jsonl(DOCUMENTS))
    return path


def write_source(kind: str, folder: Path) -> Path:
    """``DOCUMENTS`` as ``kind``; returns the path to prepare."""
    folder.mkdir()
    path = folder / f"corpus.{kind}"
    if kind == "json":
        path.write_text(json.dumps([{"text": text} for text in DOCUMENTS]))
    elif kind == "parquet":
        pq.write_table(pa.table({"n": range(len(DOCUMENTS)), "text": DOCUMENTS}), path, row_group_size=5)
    elif kind.startswith("txt"):
        for i, text in enumerate(DOCUMENTS):
            nested = folder / f"{i // 10}"
            nested.mkdir(exist_ok=True)
            data = text.encode()
            # Brackets are pattern characters; inside an archive's name the library takes them for an address of the network.
            name = f"{i:03}.{kind}" if kind.endswith("gz") else f"[{i:03}].{kind}"
            (nested / name).write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
        (folder / "README.md").write_text("not a supported format, so it is left alone")
        return folder
    else:
        data = jsonl(DOCUMENTS)
        packed = {"jsonl": data, "jsonl.gz": gzip.compress(data), "jsonl.zst": zstandard.ZstdCompressor().compress(data)}
        path.write_bytes(packed[kind])
    return path


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "json", "jsonl.gz", "jsonl.zst", "parquet"])
def test_every_format_keeps_every_document(tmp_path: Path, kind: str) -> None:
    index = prepare(write_source(kind, tmp_path / "in"), tmp_path / "out", holdout=0.2)
    for split in ("train", "validation"):
        documents = expected(DOCUMENTS, split, holdout=0.2)
        assert read_documents(tmp_path / "out", split) == documents
        assert index["splits"][split]["documents"] == len(documents)
    verify(tmp_path / "out")


def test_glob_reads_files_in_sorted_order(tmp_path: Path) -> None:
    for name, texts in (("b", DOCUMENTS[5:]), ("a", DOCUMENTS[:5])):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl(texts))
    prepare(f"{tmp_path}/*.jsonl", tmp_path / "out")
    assert read_documents(tmp_path / "out", "train") == expected(DOCUMENTS, "train")


def test_output_inside_the_source_is_not_read(source: Path) -> None:
    # The output holds .json files: read again, they would be other documents, and another preparation.
    index = prepare(source.parent, source.parent / "out")
    assert prepare(source.parent, source.parent / "out") == index


def test_token_files_of_others_are_not_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(b"precious")
    with pytest.raises(ConfigError, match="no record of a preparation"):
        prepare(source, tmp_path)
    assert (tmp_path / "train.bin").read_bytes() == b"precious"


def test_index_describes_the_files(source: Path, tmp_path: Path) -> None:
    index = prepare(source, tmp_path / "out", seed=4, holdout=0.3)
    assert json.loads((tmp_path / "out" / "index.json").read_text()) == index
    assert (index["format"], index["source"], index["text_column"]) == (1, str(source), "text")
    assert (index["dtype"], index["seed"], index["holdout"]) == ("uint16", 4, 0.3)
    digest = hashlib.sha256((tmp_path / "out" / "tokenizer.json").read_bytes()).hexdigest()
    assert index["tokenizer"] == {"file": "tokenizer.json", "sha256": digest, "vocab_size": 300, "encoder_size": 300, "eos_id": 0}
    for split, entry in index["splits"].items():
        data = (tmp_path / "out" / f"{split}.bin").read_bytes()
        assert (entry["tokens"], entry["sha256"]) == (len(data) // 2, hashlib.sha256(data).hexdigest())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(OUTPUTS)


def test_trained_bpe_is_lossless() -> None:
    tokenizer = train_tokenizer(DOCUMENTS, 280)
    assert tokenizer.get_vocab_size() == 280
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    everything = "".join(chr(c) for c in range(0x500)) + " \n\n  x\r\n\t\u2028日本語🙂\u0301\ufeff "
    for text in (everything, " leading", "trailing  "):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_trained_bpe_reads_only_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRAINING_CHARACTERS", 10)
    assert list(module._head(["abcdef", "ghijkl", "mn"], 9, 10)) == ["abcdef", "ghij"]
    assert list(module._head(["a", "b", "c"], 2, 10)) == ["a", "b"]
    vocabulary = train_tokenizer(["ab " * 3, "zz" * 50], 260).get_vocab()
    assert "ab" in vocabulary
    assert "zzz" not in "".join(vocabulary)


def test_transformers_loads_the_output(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.eos_token_id, tokenizer.eos_token, len(tokenizer)) == (0, "<|endoftext|>", 300)
    assert tokenizer.decode(tokenizer(DOCUMENTS[3]).input_ids) == DOCUMENTS[3]


def test_special_token_in_the_text_is_text(tmp_path: Path) -> None:
    documents = ["plain <|endoftext|> text", "second", "third"]
    (tmp_path / "a.jsonl").write_bytes(jsonl(documents))
    prepare(tmp_path / "a.jsonl", tmp_path / "out", holdout=0)
    assert read_documents(tmp_path / "out", "train") == documents


def test_null_and_empty_documents_are_left_out(tmp_path: Path) -> None:
    rows = [{"text": None}, {"text": ""}, {"text": "one"}, {"text": ""}, {"text": "two"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    prepare(tmp_path / "a.jsonl", tmp_path / "out")
    assert read_documents(tmp_path / "out", "train") == ["one"]
    assert read_documents(tmp_path / "out", "validation") == ["two"]


LEFT_OUT = [{"text": None}, {"text": ""}, {"text": "one"}, {"notext": 1}, {"text": ""}, {"text": "two"}, {"notext": 2}]


@pytest.mark.parametrize("cut", [None, 2, 3, 4])
def test_rows_that_gave_no_document_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cut: int | None
) -> None:
    """Also over an interruption, whether it comes before or after a batch of them."""
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in LEFT_OUT))
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 2)
    if cut is not None:
        with monkeypatch.context() as patch:
            kill_at_write(patch, cut, before=cut == 3)
            with pytest.raises(Killed):
                prepare(tmp_path / "a.jsonl", tmp_path / "out")
    index = prepare(tmp_path / "a.jsonl", tmp_path / "out", progress=True)
    assert index["left_out"] == {"without_text": 3, "empty": 2}
    assert "left out: 3 without text (null, or no such column), 2 empty" in " ".join(capsys.readouterr().err.split())
    assert read_index(tmp_path / "out").splits["train"].documents == 1


def test_counts_of_what_was_left_out_are_told_only_where_they_are_known(source: Path, tmp_path: Path) -> None:
    index = prepare(source, tmp_path / "out")
    assert index["left_out"] == {"without_text": 0, "empty": 0} and module.tell_left_out(index) == ""
    del index["left_out"]  # as versions before wrote it
    (tmp_path / "out" / "index.json").write_text(json.dumps(index))
    assert read_index(tmp_path / "out").vocab_size == 300
    assert prepare(source, tmp_path / "out") == index and module.tell_left_out(index) == ""


def test_an_interrupted_preparation_of_an_earlier_version_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in LEFT_OUT))
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 2)
    with monkeypatch.context() as patch:
        kill_at_write(patch, 2, before=False)
        with pytest.raises(Killed):
            prepare(tmp_path / "a.jsonl", tmp_path / "out")
    path = tmp_path / "out" / "progress.json"
    state = json.loads(path.read_text())
    del state["left_out"]
    path.write_text(json.dumps(state))
    assert prepare(tmp_path / "a.jsonl", tmp_path / "out")["left_out"] == {"without_text": 2, "empty": 3}, "five in all"


def test_max_documents(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "out", max_documents=4, holdout=0)
    assert read_documents(tmp_path / "out", "train") == DOCUMENTS[:4]


def test_holdout_rule() -> None:
    numbers = np.arange(100_000)
    held = held_out(numbers, 0, 0.1)
    assert 0.095 < held.mean() < 0.105
    # A function of the number alone: a part of the documents answers as all of them do.
    assert np.array_equal(held_out(numbers[777:999], 0, 0.1), held[777:999])
    assert not np.array_equal(held_out(numbers, 1, 0.1), held)
    # More held out with the same seed keeps those that were.
    assert (held_out(numbers, 0, 0.5) | ~held).all()
    for seed in range(50):
        assert held_out(np.arange(2), seed, 0.01).tolist() == [False, True]
        assert held_out(np.arange(2), seed, 0.5).tolist() == [False, True]
    assert not held_out(numbers, 0, 0.0).any()


def test_holdout_rule_is_fixed_for_ever() -> None:
    assert np.flatnonzero(held_out(np.arange(60), 7, 0.1)).tolist() == [1, 19, 30, 41]


class Killed(BaseException):
    """What a signal would do to the process."""


def kill_at_write(monkeypatch: pytest.MonkeyPatch, number: int, before: bool) -> None:
    """Interrupts ``prepare`` at its ``number``-th record: ``before`` it (tokens are on disk that no record knows of) or after."""
    original, count = module.write_json, 0

    def write_json(path: Path, value: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        if count == number and before:
            raise Killed
        original(path, value)
        if count == number:
            raise Killed

    monkeypatch.setattr(module, "write_json", write_json)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("number", [2, 5, 7])
def test_resumption_is_byte_identical(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, before: bool
) -> None:
    # Empty documents count as rows that were read, but not as documents that the holdout rule numbers.
    source.write_bytes(jsonl([text if i % 4 else "" for i, text in enumerate(DOCUMENTS)]))
    prepare(source, tmp_path / "whole", holdout=0.3)
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 5)  # 23 documents: records 1 (nothing yet), 2 to 6 (batches), 7 (the index)
    with monkeypatch.context() as patch:
        kill_at_write(patch, number, before)
        with pytest.raises(Killed):
            prepare(source, tmp_path / "cut", holdout=0.3)
    recorded = json.loads((tmp_path / "cut" / "progress.json").read_text())
    assert recorded["rows"] == min(5 * (number - 1 - before), len(DOCUMENTS))
    # The tokenizer is not trained again, and documents that are done are not encoded again.
    monkeypatch.setattr(module, "train_tokenizer", None)
    prepare(source, tmp_path / "cut", holdout=0.3)
    for name in OUTPUTS:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not (tmp_path / "cut" / "progress.json").exists()


def test_batches_end_at_characters_too(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(source, tmp_path / "whole")
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 100)
    assert [len(rows) for rows in module._batches(["x" * 60, None, "x" * 60, "x"])] == [3, 1]
    prepare(source, tmp_path / "small")
    assert (tmp_path / "small" / "train.bin").read_bytes() == (tmp_path / "whole" / "train.bin").read_bytes()


def test_finished_preparation_is_returned_at_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index = prepare(source, tmp_path / "out")
    monkeypatch.setattr(module, "open_source", None)
    assert prepare(source, tmp_path / "out", progress=True) == index
    assert "nothing to do" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("change", [{"seed": 1}, {"holdout": 0.2}, {"vocab_size": 301}, {"max_documents": 9}, {"corpus": True}])
@pytest.mark.parametrize("finished", [True, False])
def test_other_preparation_in_the_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], finished: bool
) -> None:
    with monkeypatch.context() as patch:
        if not finished:
            kill_at_write(patch, 2, before=False)
        with contextlib.suppress(Killed):
            prepare(source, tmp_path / "out")
    if change == {"corpus": True}:
        source.write_bytes(jsonl([*DOCUMENTS, "one more"]))
        change = {}
    with pytest.raises(ConfigError, match="another preparation.*delete that folder") as caught:
        prepare(source, tmp_path / "out", **change)
    assert caught.value.key == "OUT"


@pytest.mark.parametrize("file", ["train.bin", "tokenizer.json"])
def test_interrupted_folder_that_was_changed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    with monkeypatch.context() as patch:
        kill_at_write(patch, 2, before=False)
        with pytest.raises(Killed):
            prepare(source, tmp_path / "out")
    data = (tmp_path / "out" / file).read_bytes()
    (tmp_path / "out" / file).write_bytes(data[:-2] + b"  }"[: len(data) % 2])
    with pytest.raises(ConfigError, match="lost its end|has changed"):
        prepare(source, tmp_path / "out")


def wrong_source(kind: str, folder: Path) -> str:
    """A source that must be refused."""
    contents = {
        "empty": {"a.jsonl": ""},
        "only empty documents": {"a.jsonl": '{"text": ""}\n'},
        "mixed": {"a.jsonl": '{"text": "x"}\n', "b.txt": "x"},
        "unsupported": {"a.csv": "text\nx\n"},
        "damaged": {"a.jsonl": '{"text": "x"}\n{"text": nope\n'},
        "not UTF-8": {"a.txt": "\udcff"},
        "missing": {},
    }[kind]
    for name, text in contents.items():
        (folder / name).write_text(text, errors="surrogateescape")
    return str(folder / "missing.jsonl" if kind == "missing" else folder)


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("empty", "no documents"),
        ("only empty documents", "no documents"),
        ("mixed", "mixes the formats json and text"),
        ("unsupported", "no file in a supported format"),
        ("damaged", "cannot be read|damaged"),
        ("not UTF-8", "can't decode byte 0xff"),
        ("missing", "no such file"),
    ],
)
def test_source_that_cannot_be_used(tmp_path: Path, kind: str, problem: str) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(ConfigError, match=problem) as caught:
        prepare(wrong_source(kind, tmp_path / "in"), tmp_path / "out")
    assert caught.value.key == "SOURCE"


def test_wrong_column_names_the_columns(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="its columns: id, text") as caught:
        prepare(source, tmp_path / "out", text_column="txt")
    assert caught.value.key == "--text-column"
    with pytest.raises(ConfigError, match="int values, not text"):
        prepare(source, tmp_path / "out", text_column="id")


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"holdout": 0.51}, "--holdout"),
        ({"holdout": -0.1}, "--holdout"),
        ({"max_documents": 0}, "--max-documents"),
        ({"vocab_size": 256}, "--vocab-size"),
        ({"tokenizer": "./nowhere"}, "--tokenizer"),
    ],
)
def test_settings_out_of_range(source: Path, tmp_path: Path, settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(source, tmp_path / "out", **settings)
    assert caught.value.key == key
    assert not (tmp_path / "out").exists()


def save_tokenizer(folder: Path, eos: str | None, extra: int = 0) -> Path:
    """A tokenizer folder whose ``tokenizer.json`` also says to cut, to pad, and to begin every text with a special token."""
    tokenizer = train_tokenizer(DOCUMENTS, 280)
    tokenizer.add_tokens([f"<extra {i}>" for i in range(extra)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=999, pad_token="<|endoftext|>")
    if eos is not None:
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos).save_pretrained(folder)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("form", ["file", "folder"])
def test_given_tokenizer(source: Path, tmp_path: Path, form: str) -> None:
    folder = save_tokenizer(tmp_path / "tok", None)
    index = prepare(
        source, tmp_path / "out", tokenizer=str(folder / "tokenizer.json" if form == "file" else folder), vocab_size=9
    )
    assert (index["tokenizer"]["vocab_size"], index["tokenizer"]["eos_id"]) == (280, 0)
    assert read_documents(tmp_path / "out", "train") == expected(DOCUMENTS, "train")


def test_eos_that_the_tokenizer_names_comes_first(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "tok", "<extra 0>", extra=1)
    assert load(str(folder)).eos == "<extra 0>"
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<extra 0>"}}')
    assert load(str(folder)).eos == "<extra 0>"
    (folder / "tokenizer_config.json").unlink()
    assert load(str(folder)).eos == "<|endoftext|>"


def test_tokenizer_without_eos(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(train_tokenizer(DOCUMENTS, 280).to_str().replace("<|endoftext|>", "<|unusual|>"))
    with pytest.raises(ConfigError, match="no token that ends a document") as caught:
        load(str(tmp_path))
    assert caught.value.key == "--tokenizer"


def test_file_that_is_no_tokenizer(source: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load(str(source))


def test_large_vocabulary_takes_four_bytes(source: Path, tmp_path: Path) -> None:
    for extra, dtype in ((65_536 - 280, "uint16"), (65_537 - 280, "uint32")):
        folder = save_tokenizer(tmp_path / f"tok-{dtype}", None, extra)
        index = prepare(source, tmp_path / dtype, tokenizer=str(folder))
        assert (index["dtype"], index["tokenizer"]["vocab_size"]) == (dtype, 280 + extra)
        assert read_documents(tmp_path / dtype, "train") == expected(DOCUMENTS, "train")


def test_of_a_single_document_the_end_is_held_out(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(200))
    (tmp_path / "book.txt").write_text(text)
    index = prepare(tmp_path / "book.txt", tmp_path / "out", holdout=0.1)
    parts = [read_documents(tmp_path / "out", split) for split in ("train", "validation")]
    assert [len(part) for part in parts] == [1, 1] and parts[0][0] + parts[1][0] == text
    tokens = [index["splits"][split]["tokens"] - 1 for split in ("train", "validation")]
    assert tokens[1] == -(-sum(tokens) // 10)
    index = prepare(tmp_path / "book.txt", tmp_path / "whole", holdout=0.0)
    assert index["splits"]["validation"]["tokens"] == 0 and read_documents(tmp_path / "whole", "train") == [text]


def test_halves_of_surrogate_pairs_are_replaced_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "hello \\ud83d world"}\n{"text": "two"}\n{"text": "three"}\n')
    index = prepare(tmp_path / "a.jsonl", tmp_path / "out", progress=True)
    assert index["mended"] == 1 and "mended: 1 document(s)" in " ".join(capsys.readouterr().err.split())
    assert read_documents(tmp_path / "out", "train") == ["hello \ufffd world", "three"]


def test_two_preparations_of_one_folder(source: Path, tmp_path: Path) -> None:
    """Both would append to the same files."""
    out = tmp_path / "out"
    out.mkdir()
    with RunLock(out), pytest.raises(ConfigError, match=r"^OUT=.*: in use by process .*; wait for that preparation or stop it"):
        prepare(source, out)
    assert list(out.iterdir()) == []
    prepare(tmp_path, out)  # a source in which it lies
    assert not (out / "lock.json").exists() and module.is_written(out / "lock.json", out)
