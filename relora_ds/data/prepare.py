"""Text -> tokens on disk: what ``relora-ds prepare`` does.

The output folder holds ``train.bin`` and ``validation.bin`` (token ids, little-endian, nothing else), ``tokenizer.json`` with the
configuration that ``AutoTokenizer.from_pretrained`` wants beside it, and ``index.json``, which is written last: a folder with an
index is complete. Until then ``progress.json`` says how far the work came, and the same command goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from relora_ds.data import tokenizer as tokenizers
from relora_ds.data.documents import local_files, mend, open_source
from relora_ds.data.token_dataset import DTYPES, INDEX_FILE, INDEX_FORMAT, MASK_64, TRAIN, VALIDATION, file_sha256, mix64
from relora_ds.data.tokenizer import TOKENIZER_FILE, Given
from relora_ds.environment import attempt
from relora_ds.errors import ConfigError
from relora_ds.paths import make_folder, refuse_unwritable
from relora_ds.run.folder import write_atomically
from relora_ds.run.lock import LOCK_NAME, RunLock
from relora_ds.text import json_text

PROGRESS_FILE = "progress.json"
TRAINED_EOS = "<|endoftext|>"
SMALLEST_BPE = 257  # all bytes, and the token that ends a document
LARGEST_BPE = 1 << 24
TRAINING_CHARACTERS, TRAINING_DOCUMENTS = 20_000_000, 100_000
BATCH_CHARACTERS, BATCH_DOCUMENTS = 4_000_000, 1024
MAX_HOLDOUT = 0.5


def prepare(
    source: str,
    out: Path,
    *,
    tokenizer: str | None = None,
    vocab_size: int = 8192,
    text_column: str = "text",
    config_name: str | None = None,
    split: str = "train",
    holdout: float = 0.01,
    max_documents: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Tokenizes ``source`` into the folder ``out``, or goes on with an interrupted preparation there.

    Args:
        source: a file, a folder (read recursively in sorted order), a glob pattern, or the name of a hub data set.
        out: the folder to write. Interrupted and repeated, the same call ends with the same bytes as an uninterrupted one.
        tokenizer: a ``tokenizer.json``, a folder with one, or the name of a hub tokenizer; ``None`` trains a byte-level BPE.
        vocab_size: entries of the trained BPE (fewer when the text is too small for that many); not used with ``tokenizer``.
        text_column: the column that holds the documents. Text files have the one column ``text``.
        config_name: the configuration of a hub data set.
        split: the split of a hub data set.
        holdout: the fraction of documents held out for validation; see :func:`held_out`.
        max_documents: read only that many rows of the source.
        seed: the seed of the choice of held-out documents.
        progress: report on stderr.

    Returns:
        The index, as written to ``index.json``.

    Raises:
        ConfigError: a setting that cannot be used, a source without documents, or an ``out`` that holds something else, or that
            another process is preparing.
    """
    out, console = Path(out), Console(stderr=True, quiet=not progress)
    _check_settings(vocab_size if tokenizer is None else None, holdout, max_documents)
    refuse_unwritable("OUT", out)
    found = local_files(source, lambda file: is_written(file, out))
    files, passed_over = found if found is not None else (None, [])
    if files is not None:
        _refuse_of_hub(source, config_name, split)
    given = None if tokenizer is None else tokenizers.load(tokenizer)
    fingerprint = _fingerprint(
        source=[source, config_name, split] if files is None else [[str(file.resolve()), file.stat().st_size] for file in files],
        tokenizer=vocab_size if given is None else hashlib.sha256(given.encoder.to_str().encode()).hexdigest(),
        text_column=text_column,
        holdout=holdout,
        max_documents=max_documents,
        seed=seed,
    )
    if (index := _read_record(out / INDEX_FILE, fingerprint)) is not None:
        (out / PROGRESS_FILE).unlink(missing_ok=True)
        console.print(f"{out} already holds this preparation: nothing to do")
        return index
    if passed_over:
        names = ", ".join(str(file) for file in passed_over[:3])
        console.print(f"passed over: {len(passed_over):,} hidden file(s) or metadata, such as {names}")
    texts = open_source(source, files, config_name, split, text_column)
    head = list(islice(filter(None, islice(texts(), max_documents)), 2))
    if not head:
        rows = list(islice(texts(), max_documents))  # each of them empty
        record = {"left_out": {"without_text": rows.count(None), "empty": rows.count("")}}
        raise ConfigError("SOURCE", source, f"it has no documents ({tell_left_out(record) or 'no rows at all'})", "name another")
    if _read_record(out / PROGRESS_FILE, fingerprint) is None:
        _refuse_tokens(out)
        if given is None:
            console.print(f"training a byte-level BPE with {vocab_size} entries")
            given = Given(train_tokenizer(islice(texts(), max_documents), vocab_size), TRAINED_EOS)
    make_folder("OUT", out)  # not before: what cannot be read leaves nothing
    with _alone(out):
        state = _read_record(out / PROGRESS_FILE, fingerprint)
        if state is None:
            _refuse_tokens(out)
            assert given is not None, "nobody takes the record away"
            state = _start(out, fingerprint, given)
        else:
            console.print(f"resuming in {out} after {state['rows']:,} documents")
            before = state["rows"] - _total(state["splits"], "documents")  # of a version that did not tell them apart
            state.setdefault("left_out", {"without_text": 0, "empty": before})
        _tokenize(islice(texts(), state["rows"], max_documents), out, state, seed, holdout, console, is_alone=len(head) == 1)
        settings = {"format": INDEX_FORMAT, "source": source, "text_column": text_column, "seed": seed, "holdout": holdout}
        index = _write_index(out, settings | {"passed_over": len(passed_over), "fingerprint": fingerprint}, state, console)
        (out / PROGRESS_FILE).unlink()
        return index


def _write_index(out: Path, settings: dict[str, Any], state: dict[str, Any], console: Console) -> dict[str, Any]:
    """Writes ``index.json`` of a preparation that has read everything, and tells what there is; returns what it wrote."""
    index = settings | {key: state[key] for key in ("tokenizer", "dtype", "left_out", "mended")} | {"splits": {}}
    for name, counts in state["splits"].items():
        index["splits"][name] = {"file": f"{name}.bin", **counts, "sha256": file_sha256(out / f"{name}.bin")}
        console.print(f"{name}: {counts['tokens']:,} tokens of {counts['documents']:,} documents")
    if left_out := tell_left_out(index):
        console.print(left_out)
    if index["mended"]:
        console.print(f"mended: {index['mended']:,} document(s) with half a surrogate pair, which became U+FFFD")
    write_json(out / INDEX_FILE, index)
    return index


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Raises ConfigError while another process prepares the folder: as the tasks of one srun, both would write the same files."""
    lock = RunLock(out, attempt())
    try:
        lock.acquire()
    except ConfigError as error:
        raise ConfigError(
            "OUT", str(out), error.problem, "wait for that preparation or stop it, or name another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _check_settings(trained_vocab_size: int | None, holdout: float, max_documents: int | None) -> None:
    """Raises ConfigError for numbers that are out of range whatever the source."""
    if not 0 <= holdout <= MAX_HOLDOUT:
        raise ConfigError("--holdout", holdout, f"the held-out fraction must lie in [0, {MAX_HOLDOUT}]")
    if max_documents is not None and max_documents < 1:
        raise ConfigError("--max-documents", max_documents, "must be at least 1")
    if trained_vocab_size is not None and not SMALLEST_BPE <= trained_vocab_size <= LARGEST_BPE:
        raise ConfigError("--vocab-size", trained_vocab_size, f"a byte-level BPE has {SMALLEST_BPE} to {LARGEST_BPE:,} entries")


def _refuse_of_hub(source: str, config_name: str | None, split: str) -> None:
    """Raises ConfigError for what is said of a data set of the hub, where files are read."""
    for key, value in (("--config-name", config_name), ("--split", split if split != TRAIN else None)):
        if value is not None:
            raise ConfigError(key, value, f"is for data sets of the hub, and {source} is read from files", "leave it out")


def is_written(file: Path, out: Path) -> bool:
    """Whether a file was put into the folder ``out`` by a preparation."""
    return file.resolve().parent == out.resolve() and (
        file.name in (INDEX_FILE, PROGRESS_FILE, LOCK_NAME) or tokenizers.is_one_of_them(file.name)
    )


def train_tokenizer(texts: Iterable[str | None], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE on the head of ``texts``: at most 20 million characters of 100,000 documents.

    Id 0 ends a document. All 256 bytes are in the vocabulary, and nothing is normalised, so decoding gives back any text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [TRAINED_EOS]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_head(texts, TRAINING_DOCUMENTS, TRAINING_CHARACTERS), trainer)
    return tokenizer


def _head(texts: Iterable[str | None], documents: int, characters: int) -> Iterator[str]:
    """The first ``documents`` texts, cut off after ``characters`` characters in all."""
    for _, text in zip(range(documents), (mend(text or "") for text in texts), strict=False):
        yield text[:characters]
        characters -= len(text)
        if characters <= 0:
            return


def held_out(numbers: npt.NDArray[np.int64], seed: int, holdout: float) -> npt.NDArray[np.bool_]:
    """Which documents are held out for validation.

    A document is held out when a 64-bit hash of ``(seed, its number)`` falls below ``holdout``: a pure rule, so it does not
    depend on how many documents follow. Whatever the hash says, document 0 trains and document 1 is held out: both splits of any
    source with two documents have something in them. ``holdout=0`` holds out nothing.

    ``numbers``, ``int64 (N,)``, count the documents that are not empty from 0; the answer is ``bool (N,)``.
    """
    hashes = mix64(mix64(np.uint64(seed & MASK_64)) ^ numbers.astype(np.uint64))
    below = hashes < np.uint64(int(holdout * 2**64))
    return (below | (numbers == 1)) & (numbers != 0) if holdout else below


def _refuse_tokens(out: Path) -> None:
    """Raises ConfigError for a folder whose token files are of nobody knows what."""
    if (out / f"{TRAIN}.bin").exists() or (out / f"{VALIDATION}.bin").exists():
        raise ConfigError("OUT", str(out), "token files are in it, but no record of a preparation", "name another folder")


def _start(out: Path, fingerprint: str, given: Given) -> dict[str, Any]:
    """Fills the folder with the tokenizer, and the record of a preparation that has read nothing yet."""
    vocab_size = tokenizers.write(given, out)
    encoder_size = max(given.encoder.get_vocab().values()) + 1
    saved = {"file": TOKENIZER_FILE, "sha256": file_sha256(out / TOKENIZER_FILE)}
    state = {
        "fingerprint": fingerprint,
        "tokenizer": saved
        | {"vocab_size": vocab_size, "encoder_size": encoder_size, "eos_id": given.encoder.token_to_id(given.eos)},
        "dtype": "uint16" if vocab_size <= 1 << 16 else "uint32",
        "rows": 0,
        "left_out": {"without_text": 0, "empty": 0},
        "splits": {name: {"tokens": 0, "documents": 0} for name in (TRAIN, VALIDATION)},
    }
    write_json(out / PROGRESS_FILE, state)
    return state


def _tokenize(
    texts: Iterable[str | None], out: Path, state: dict[str, Any], seed: int, holdout: float, console: Console, *, is_alone: bool
) -> None:
    """Appends the tokens of ``texts`` to the files in ``out``; after each batch of documents, ``state`` there says so.

    Of a document that is the only one, the end is held out.
    """
    if file_sha256(out / TOKENIZER_FILE) != state["tokenizer"]["sha256"]:
        raise ConfigError("OUT", str(out), f"{TOKENIZER_FILE} has changed since the preparation began", "delete the folder")
    tokenizer = tokenizers.read_encoder(out)
    tokenizer.encode_special_tokens = True  # a document that spells out a special token is text: only the joins are the token
    dtype, eos_id, splits = DTYPES[state["dtype"]], state["tokenizer"]["eos_id"], state["splits"]
    started, before = time.monotonic(), _total(splits, "tokens")
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with ExitStack() as stack:
        bar = stack.enter_context(Progress(*columns, console=console, transient=True, disable=not console.is_terminal))
        task = bar.add_task("reading", total=None)
        files = {
            name: stack.enter_context(_reopen(out / f"{name}.bin", splits[name]["tokens"] * dtype.itemsize)) for name in splits
        }
        for rows in _batches(texts):
            batch = [mend(text) for text in rows if text]
            state["mended"] = state.get("mended", 0) + sum(map(operator.ne, batch, filter(None, rows)))
            first = _total(splits, "documents")
            validates = held_out(np.arange(first, first + len(batch)), seed, holdout)
            encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            for encoding, validate in zip(encodings, validates, strict=True):
                whole = {VALIDATION if validate else TRAIN: encoding.ids}
                for name, part in (_cut(encoding.ids, holdout) if is_alone and holdout else whole).items():
                    ids = np.array([*part, eos_id], dtype=dtype)
                    files[name].write(ids.tobytes())
                    splits[name]["tokens"] += len(ids)
                    splits[name]["documents"] += 1
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())  # before the record says that these tokens are there
            state["rows"] += len(rows)
            state["left_out"]["without_text"] += rows.count(None)
            state["left_out"]["empty"] += rows.count("")
            write_json(out / PROGRESS_FILE, state)
            tokens, seconds = _total(splits, "tokens"), time.monotonic() - started
            done = f"{state['rows']:,} documents, {tokens:,} tokens, {(tokens - before) / seconds:,.0f} tokens/s"
            bar.update(task, description=done)


def _cut(ids: list[int], holdout: float) -> dict[str, list[int]]:
    """The one document of a source by splits: its end is held out."""
    kept = len(ids) - math.ceil(holdout * len(ids))
    return {TRAIN: ids[:kept], VALIDATION: ids[kept:]}


def _total(splits: dict[str, dict[str, int]], key: str) -> int:
    """``tokens`` or ``documents`` over all splits."""
    return sum(counts[key] for counts in splits.values())


def _batches(texts: Iterable[str | None]) -> Iterator[list[str | None]]:
    """The texts of some rows at a time. Where batches end does not show in the output."""
    rows: list[str | None] = []
    characters = 0
    for text in texts:
        rows.append(text)
        characters += len(text or "")
        if len(rows) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield rows
            rows, characters = [], 0
    if rows:
        yield rows


def tell_left_out(record: dict[str, Any]) -> str:
    """The rows that gave no document, for people; empty where there were none, or the record of an older version does not say."""
    left_out = record.get("left_out", {})
    said = {"without text (null, or no such column)": left_out.get("without_text"), "empty": left_out.get("empty")}
    return "left out: " + ", ".join(f"{count:,} {kind}" for kind, count in said.items()) if any(said.values()) else ""


def _reopen(path: Path, size: int) -> BinaryIO:
    """Opens a token file for appending after its first ``size`` bytes; what an interrupted batch left after them is cut off."""
    actual = path.stat().st_size if path.exists() else 0
    if actual < size:
        raise ConfigError("OUT", str(path.parent), f"{path.name} lost its end ({actual} of {size} bytes)", "delete the folder")
    file = open(path, "ab")  # noqa: SIM115 - the caller closes it
    file.truncate(size)
    return file


def _fingerprint(**settings: Any) -> str:
    """SHA-256 of all that decides the output, as hexadecimal digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _read_record(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """The index or the progress at ``path``, ``None`` when there is none; ConfigError when it is of another preparation."""
    if not path.exists():
        return None
    try:
        record = json_text.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        said = f"{path.name} in it cannot be read: {error}"
        raise ConfigError("OUT", str(path.parent), said, "delete that folder or name another one") from None
    if not isinstance(record, dict) or record.get("fingerprint") != fingerprint:
        problem = f"it holds another preparation ({path.name} is of another source, tokenizer or setting)"
        raise ConfigError("OUT", str(path.parent), problem, "delete that folder or name another one")
    return record


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replaces ``path`` atomically: a reader sees the old contents or the new ones, also after a power cut."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")
