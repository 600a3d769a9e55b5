"""Tokens on disk -> batches, without any state.

``relora-ds prepare`` leaves one flat array of tokens per split. Sample ``k`` of a run is a pure function of ``(seed, k)``: nothing
about the order is ever stored, so a run that is resumed, or goes on with another number of processes, sees the same samples as
one that was never interrupted.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from relora_ds.errors import ConfigError
from relora_ds.text import json_text

INDEX_FILE = "index.json"
INDEX_FORMAT = 1
TRAIN = "train"
VALIDATION = "validation"
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}  # name in the index -> layout on disk

FEISTEL_ROUNDS = 8
MASK_64 = (1 << 64) - 1
GOLDEN_64 = 0x9E3779B97F4A7C15
PROBES, PROBE_TOKENS = 16, 4096
"""So many stretches of a token file, of so many tokens each, are looked at before a run begins; each batch is when it is read."""


class _Entry(BaseModel):
    """Part of an index as it is written. What a newer version may add is passed over."""

    model_config = ConfigDict(strict=True, frozen=True)


class SplitFile(_Entry):
    """One split: ``tokens`` tokens of ``documents`` documents in ``file``, whose bytes hash to ``sha256``."""

    file: Annotated[str, Field(pattern=r"^[^/]+$")]
    tokens: Annotated[int, Field(ge=0)]
    documents: int
    sha256: str


class _Tokenizer(_Entry):
    vocab_size: Annotated[int, Field(gt=0)]
    encoder_size: Annotated[int, Field(gt=0)] | None = None
    eos_id: Annotated[int, Field(ge=0)]


class _Index(_Entry):
    format: int
    tokenizer: _Tokenizer
    dtype: Literal["uint16", "uint32"]
    splits: dict[str, SplitFile]


@dataclass(frozen=True)
class TokenIndex:
    """What a prepared folder holds. ``dtype`` is little-endian ``uint16`` or ``uint32``.

    ``vocab_size`` rows are for all tokens of the tokenizer; those of documents are below ``encoder_size``, which may be less.
    """

    folder: Path
    vocab_size: int
    encoder_size: int
    eos_id: int
    dtype: np.dtype
    splits: dict[str, SplitFile]

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each split's tokens: what the folder holds, wherever it lies."""
        return {name: split.sha256 for name, split in self.splits.items()}

    @property
    def holds_out(self) -> bool:
        """Whether there is anything to evaluate on: not after ``--holdout 0``. A split that is missing is no choice of anyone's."""
        return VALIDATION not in self.splits or self.splits[VALIDATION].tokens > 0


def read_index(folder: Path) -> TokenIndex:
    """Reads ``folder/index.json`` and compares the sizes of the token files with it.

    Raises:
        ConfigError: on ``data.path``, when the folder holds no finished preparation, or one that this version cannot read, or a
            file has another size than the index says.
    """
    folder = Path(folder)

    def refused(problem: str) -> ConfigError:
        return ConfigError("data.path", str(folder), problem, "run `relora-ds prepare` on the text to make this folder")

    try:
        raw = json_text.parse((folder / INDEX_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise refused(f"there is no {INDEX_FILE} in it, so it holds no finished preparation") from None
    except OSError as error:
        raise refused(f"{INDEX_FILE} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise refused(f"{INDEX_FILE} is not JSON ({error})") from None
    if isinstance(raw, dict) and raw.get("format", INDEX_FORMAT) != INDEX_FORMAT:
        raise refused(f"{INDEX_FILE} has format {raw['format']!r}, this version reads format {INDEX_FORMAT}")
    try:
        found = _Index.model_validate(raw)
    except ValidationError as error:
        fault = json_text.first_fault(error)
        raise refused(f"{INDEX_FILE} does not have the entries of a preparation ({fault})") from None
    sizes = found.tokenizer
    index = TokenIndex(
        folder=folder,
        vocab_size=sizes.vocab_size,
        encoder_size=sizes.encoder_size or sizes.vocab_size,
        eos_id=sizes.eos_id,
        dtype=DTYPES[found.dtype],
        splits=found.splits,
    )
    for split in index.splits.values():
        path = folder / split.file
        expected = split.tokens * index.dtype.itemsize
        size = path.stat().st_size if path.is_file() else None
        if size != expected:
            raise refused(f"{split.file} has {'no file' if size is None else f'{size} bytes'}, the index says {expected} bytes")
    return index


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file as hexadecimal digits, read in pieces of 4 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(4 << 20):
            digest.update(piece)
    return digest.hexdigest()


def verify(folder: Path) -> None:
    """Reads all token files of ``folder`` and compares their checksums with the index.

    Raises:
        ConfigError: on ``data.path``, naming the first file whose bytes are not those that were written.
    """
    index = read_index(folder)
    for split in index.splits.values():
        actual = file_sha256(index.folder / split.file)
        if actual != split.sha256:
            damage = f"{split.file} is damaged: it has SHA-256 {actual}, the index says {split.sha256}"
            raise ConfigError("data.path", str(folder), damage, "delete the folder and prepare it again")


def mix64(values: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64, a bijection of 64-bit integers in which each input bit reaches each output bit.

    Args:
        values: ``uint64``, any shape.

    Returns:
        ``uint64``, the same shape. Arithmetic wraps modulo 2^64 on purpose.
    """
    with np.errstate(over="ignore"):
        z = np.asarray(values, dtype=np.uint64) + np.uint64(GOLDEN_64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def permute(
    index: npt.NDArray[np.int64], num_samples: int, seed: int, epoch: npt.NDArray[np.int64] | int
) -> npt.NDArray[np.int64]:
    """Shuffles without a table: where sample ``index`` of an epoch lies among ``num_samples``.

    For each ``(seed, epoch)`` this is a bijection of ``[0, num_samples)``: a Feistel network permutes the smallest domain of
    ``4^h`` values that holds ``num_samples``, and values that leave ``[0, num_samples)`` go through it again until they are back
    (cycle walking). The domain is at most four times as large as ``num_samples``, so that takes four passes or fewer on average.

    Args:
        index: ``int64 (B,)`` in ``[0, num_samples)``.
        num_samples: samples per epoch, at least 1.
        seed: any integer; the low 64 bits count.
        epoch: ``int64 (B,)`` or one integer, at least 0.

    Returns:
        ``int64 (B,)`` in ``[0, num_samples)``.

    Raises:
        ValueError: an ``index`` outside ``[0, num_samples)``.
    """
    index = np.asarray(index, dtype=np.int64)
    if index.size and (index.min() < 0 or index.max() >= num_samples):
        raise ValueError(f"indices must lie in [0, {num_samples}), got {index.min()} to {index.max()}")
    half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)  # an even number of bits in all: the halves are alike
    epochs = np.broadcast_to(np.asarray(epoch, dtype=np.uint64), index.shape)
    keys = mix64(mix64(np.uint64(seed & MASK_64)) ^ epochs)
    values = _feistel(index.astype(np.uint64), keys, half_bits)
    while (outside := values >= num_samples).any():
        values[outside] = _feistel(values[outside], keys[outside], half_bits)
    return values.astype(np.int64)


def _feistel(values: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64], half_bits: int) -> npt.NDArray[np.uint64]:
    """A balanced Feistel network on ``2 * half_bits`` bits; ``values`` and ``keys`` are ``uint64 (B,)``."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for round_number in range(FEISTEL_ROUNDS):
        round_keys = mix64(keys ^ np.uint64(round_number))
        # Each round is its own inverse given `right`, whatever the mixing function: that is what makes the network a bijection.
        left, right = right, left ^ (mix64(right ^ round_keys) & mask)
    return (left << shift) | right


class TokenDataset:
    """One split cut into samples of ``sequence_length`` tokens, in an order that is a function of the seed alone.

    Samples are numbered from 0 and count on over epochs: sample ``k`` is sample ``k % len(self)`` of epoch ``k // len(self)``.
    Each epoch holds every sample once. Tokens after the last whole sample are never read.

    Args:
        folder: a folder made by ``relora-ds prepare``.
        split: ``train`` or ``validation``.
        sequence_length: tokens per sample, ``T``.
        seed: the seed of the order.
        shuffle: ``False`` reads every epoch from the first token to the last, as evaluation does.

    Raises:
        ConfigError: on ``data.path`` when the folder cannot be read or lacks the split; on ``data.sequence_length`` when the
            split has less than one sample.
    """

    def __init__(self, folder: Path, split: str, sequence_length: int, seed: int = 0, shuffle: bool = True) -> None:
        self.index = read_index(folder)
        self.sequence_length = sequence_length
        self.seed = seed
        self.shuffle = shuffle
        if split not in self.index.splits:
            raise ConfigError("data.path", str(folder), f"it has no split {split!r}, only {', '.join(self.index.splits)}")
        tokens = self.index.splits[split].tokens
        if sequence_length < 1 or tokens < sequence_length:
            raise ConfigError(
                "data.sequence_length",
                sequence_length,
                f"the split {split!r} of {folder} has {tokens} tokens, which is less than one sample",
                f"give a length of 1 to {tokens}" if tokens else "prepare more documents, or hold out more of them",
            )
        self._length = tokens // sequence_length
        path = self.index.folder / self.index.splits[split].file
        try:
            self._path, self._file = path, os.open(path, os.O_RDONLY)
        except OSError as error:
            problem = f"{path.name} cannot be read ({error.strerror})"
            raise ConfigError("data.path", str(folder), problem, "have its owner make it readable, or prepare it again") from None
        weakref.finalize(self, os.close, self._file).atexit = False  # a thread may read until the process is gone
        for start in np.linspace(0, max(0, tokens - PROBE_TOKENS), PROBES, dtype=np.int64):
            self._refuse_strange(self._read(int(start), min(PROBE_TOKENS, tokens)))

    def __len__(self) -> int:
        """Samples per epoch."""
        return self._length

    def batch(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> torch.Tensor:
        """The samples with these numbers (any epoch), ``int64 (len(indices), sequence_length)`` on the CPU.

        Raises:
            ConfigError: on ``data.path``: the file has become shorter, or holds what is no token.
            OSError: it cannot be read at the moment.
        """
        numbers = np.asarray(indices, dtype=np.int64)
        epochs, positions = np.divmod(numbers, self._length)
        if self.shuffle:
            positions = permute(positions, self._length, self.seed, epochs)
        tokens = np.empty((len(positions), self.sequence_length), dtype=self.index.dtype)
        for row, position in zip(tokens, positions.tolist(), strict=True):
            row[:] = self._read(position * self.sequence_length, self.sequence_length)
        self._refuse_strange(tokens)
        return torch.from_numpy(tokens.astype(np.int64))

    def _read(self, start: int, count: int) -> npt.NDArray[np.integer]:
        """Tokens of the file. It is not mapped: where a map cannot be read, the process ends without a word."""
        width = self.index.dtype.itemsize
        data, wanted = bytearray(), count * width
        while len(data) < wanted:
            try:
                piece = os.pread(self._file, wanted - len(data), start * width + len(data))
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self._path)) from None
            if not piece:
                size = os.fstat(self._file).st_size
                problem = f"{self._path.name} was cut off to {size} bytes since the run began"
                raise ConfigError("data.path", str(self.index.folder), problem, "delete the folder and prepare it again")
            data += piece
        return np.frombuffer(data, dtype=self.index.dtype)

    def _refuse_strange(self, tokens: npt.NDArray[np.integer]) -> None:
        """Raises ConfigError for an id that no token has: on a GPU a model would end with an assertion that names nothing."""
        largest = int(tokens.max(initial=0))
        if largest >= self.index.vocab_size:
            problem = f"a token file is damaged: it holds the id {largest}, its vocabulary ends before {self.index.vocab_size}"
            raise ConfigError("data.path", str(self.index.folder), problem, "delete the folder and prepare it again")


def global_batch_indices(update: int, global_batch: int) -> range:
    """The numbers of the ``global_batch`` samples that update ``update`` (the first is 1) trains on, over all ranks."""
    if update < 1:
        raise ValueError(f"updates are numbered from 1, got {update}")
    return range((update - 1) * global_batch, update * global_batch)


def rank_micro_batches(update: int, *, global_batch: int, micro_batch: int, rank: int, world_size: int) -> list[range]:
    """One rank's part of an update: its micro batches in order, as ranges of sample numbers.

    Rank ``r`` takes the ``r``-th contiguous share of :func:`global_batch_indices`, so the union over ranks is the same set for
    every world size and micro batch.

    Raises:
        ValueError: when ``global_batch`` is not a multiple of ``micro_batch * world_size``, or there is no such rank.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in [0, {world_size}), got {rank}")
    if micro_batch < 1 or global_batch % (micro_batch * world_size):
        raise ValueError(f"a global batch of {global_batch} is not a multiple of {world_size} ranks x micro batch {micro_batch}")
    share = global_batch // world_size
    mine = global_batch_indices(update, global_batch)[rank * share : (rank + 1) * share]
    return [mine[start : start + micro_batch] for start in range(0, share, micro_batch)]
