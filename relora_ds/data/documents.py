"""The documents that ``relora-ds prepare`` reads: the texts of one column, row by row, from local files or a data set of the hub.

Of local files that one column is read and nothing else, so that shards may differ in what else they hold. Whatever cannot be read is
refused with the file and the line.
"""

from __future__ import annotations

import glob
import gzip
import io
import itertools
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from relora_ds.errors import ConfigError
from relora_ds.text import json_text

Texts = Iterator[str | None]
FORMATS = {"txt": "text", "json": "json", "jsonl": "json", "parquet": "parquet"}
SUPPORTED = re.compile(r"\.(?:(txt|jsonl?)(?:\.gz|\.zst)?|(parquet))$")
SUPPORTED_TEXT = ".txt, .json and .jsonl (also with .gz or .zst), .parquet"
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""What tools leave beside data."""
LFS_POINTER = b"version https://git-lfs"
ROWS_WITHOUT_COLUMN = 1000
"""A source is said to lack a column that none of so many rows at its head has."""


def format_of(file: Path) -> str | None:
    """``text``, ``json`` or ``parquet``; None when the name says of no supported format."""
    match = SUPPORTED.search(file.name)
    return FORMATS[match[1] or match[2]] if match else None


def local_files(source: str, is_output: Callable[[Path], bool]) -> tuple[list[Path], list[Path]] | None:
    """The files that ``source`` names, sorted, and those beside them that are no data; None for the name of a hub data set.

    Args:
        source: a file, a folder (read recursively) or a glob pattern. In a folder, hidden files and metadata are passed over.
        is_output: whether a file was written by the preparation itself, whose folder may lie inside the source.

    Raises:
        ConfigError: a path or pattern that names no file in a supported format, or files in several formats.
    """
    path = Path(source)
    passed_over: list[Path] = []
    if path.is_file():
        candidates = [path]
    elif path.is_dir():
        candidates = []
        for file in path.rglob("*"):
            if file.is_file() and format_of(file) and not is_output(file):
                is_data = file.name not in METADATA and not _is_hidden(file.relative_to(path))
                (candidates if is_data else passed_over).append(file)
    elif glob.has_magic(source):
        candidates = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
    elif _looks_like_a_path(source):
        raise ConfigError("SOURCE", source, "there is no such file or folder", "name a file, a folder, a glob or a hub data set")
    else:
        return None
    files = sorted((file for file in candidates if format_of(file) and not is_output(file)), key=lambda file: file.as_posix())
    if not files:
        raise ConfigError("SOURCE", source, "it names no file in a supported format", f"supported: {SUPPORTED_TEXT}")
    formats = sorted({str(format_of(file)) for file in files})
    if len(formats) > 1:
        mixed = f"it mixes the formats {' and '.join(formats)}"
        raise ConfigError("SOURCE", source, mixed, "name the files of one format, e.g. 'folder/**/*.jsonl'")
    return files, passed_over


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _looks_like_a_path(name: str) -> bool:
    """Whether a name that is no local file was still meant as one, so that no hub is asked for it."""
    return name.startswith((".", "/", "~")) or name.endswith("/") or SUPPORTED.search(name) is not None


def open_source(source: str, files: list[Path] | None, config_name: str | None, split: str, column: str) -> Callable[[], Texts]:
    """Gives the texts of the local ``files``, or of the hub data set ``source`` when ``files`` is None, as often as it is called.

    A text is None where it is null or the row has no such column.

    Raises:
        ConfigError: the source cannot be opened, or nothing at its head has the column. Reading raises it for a row that cannot be
            decoded, or whose text is not text.
    """
    if files is None:
        return _of_hub(source, config_name, split, column)
    _refuse_without(column, source, itertools.islice(_rows(files, None), ROWS_WITHOUT_COLUMN))
    return lambda: (_text(row, column, str(file)) for file in files for row in _rows([file], column))


def _refuse_without(column: str, source: str, head: Iterable[dict[str, Any]]) -> None:
    """Raises ConfigError where no row of ``head`` has the column; reads no further than to the first that has."""
    columns: dict[str, None] | None = None
    for row in head:
        if column in row:
            return
        columns = {**(columns or {}), **dict.fromkeys(row)}
    if columns is None:
        raise ConfigError("SOURCE", source, "it has no documents", "name another")
    raise ConfigError("--text-column", column, f"{source} has no such column", f"its columns: {', '.join(columns)}")


def _text(row: dict[str, Any], column: str, place: str) -> str | None:
    text = row.get(column)
    if text is not None and not isinstance(text, str):
        problem = f"in {place} it holds {type(text).__name__} values, not text"
        raise ConfigError("--text-column", column, problem, "name a column of text, or leave that file out")
    return text


def _of_hub(source: str, config_name: str | None, split: str, column: str) -> Callable[[], Texts]:
    import datasets

    try:
        rows = datasets.load_dataset(source, config_name, split=split, streaming=True)
        columns = rows.column_names or list(next(iter(rows), {}))
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError("SOURCE", source, f"it cannot be read ({error})", "check the name and the network") from error
    _refuse_without(column, source, [dict.fromkeys(columns)] if columns else [])
    chosen = rows.select_columns([column])

    def texts() -> Texts:
        try:
            for row in chosen:
                yield _text(row, column, source)
        except (OSError, ValueError, EOFError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError("SOURCE", source, f"damaged or not UTF-8 ({error})", "leave it out") from error

    return texts


# Local files


def _rows(files: Sequence[Path], column: str | None) -> Iterator[dict[str, Any]]:
    """The rows of files of one format; of parquet ``column`` alone, or, where None is given, only what columns there are."""
    for file in files:
        with _explained(file):
            yield from {"text": _documents, "json": _objects, "parquet": _records}[str(format_of(file))](file, column)


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    """Turns what a reader raises about a file's contents into one ConfigError that names it."""
    import pyarrow

    try:
        yield
    except (OSError, ValueError, EOFError, zlib.error, zstandard.ZstdError, pyarrow.ArrowException) as error:
        if isinstance(error, ConfigError):
            raise
        said = " ".join(str(error).split())[:200]
        raise ConfigError("SOURCE", str(file), f"damaged or not UTF-8 ({said})", "mend that file or leave it out") from error


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked as its name says."""
    with file.open("rb") as raw:
        if raw.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ConfigError("SOURCE", str(file), "is a pointer of Git LFS, not the file itself", "fetch it with git lfs pull")
        raw.seek(0)
        if file.name.endswith(".gz"):
            with gzip.open(raw) as unpacked:
                yield unpacked  # type: ignore[misc]
        elif file.name.endswith(".zst"):
            yield io.BufferedReader(_Pieces(_frames(raw)))  # type: ignore[misc]
        else:
            yield raw


def _frames(packed: BinaryIO) -> Iterator[bytes]:
    """What zstd frames hold. The library's own reader takes a file that ends inside a frame for a whole one."""
    frame = zstandard.ZstdDecompressor().decompressobj()
    while piece := packed.read(1 << 20):
        while piece:
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(piece)
            piece = frame.unused_data if frame.eof else b""
    if not frame.eof:
        raise EOFError("it ends in the middle")


class _Pieces(io.RawIOBase):
    """Bytes that come in pieces, as a file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.pieces, self.rest = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.rest:
            piece = next(self.pieces, None)
            if piece is None:
                return 0
            self.rest = memoryview(piece)
        size = min(len(buffer), len(self.rest))
        buffer[:size], self.rest = self.rest[:size], self.rest[size:]
        return size


def _documents(file: Path, _column: str | None) -> Iterator[dict[str, Any]]:
    """A text file is one document."""
    with _opened(file) as data:
        text = data.read().decode("utf-8-sig")
    yield {"text": text}


def _objects(file: Path, _column: str | None) -> Iterator[dict[str, Any]]:
    """JSON: an array of objects, or an object a line; empty lines are passed over."""
    with _opened(file) as data, io.TextIOWrapper(data, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            if line.lstrip().startswith("["):
                whole = json_text.parse(line + lines.read())
                numbered = enumerate(whole, start=1)
                yield from (_object(row, f"entry {entry}") for entry, row in numbered)
                return
            try:
                row = json_text.parse(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
            yield _object(row, f"line {number}")


def _object(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{place} is no object with columns")
    return row


def _records(file: Path, column: str | None) -> Iterator[dict[str, Any]]:
    """A parquet file: its one column; a file without it gives rows without text."""
    from pyarrow import parquet

    with _opened(file) as data:
        table = parquet.ParquetFile(data)
        if column is None or column not in table.schema_arrow.names:
            known = table.schema_arrow.names if column is None else []
            yield from (dict.fromkeys(known) for _ in range(table.metadata.num_rows))
            return
        for batch in table.iter_batches(columns=[column], batch_size=1024):
            yield from batch.to_pylist()


def mend(text: str) -> str:
    """``text`` with a replacement character for each half of a surrogate pair, which no encoding of Unicode can hold."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
