"""Token files, the stateless order of samples, and how an update is shared out among ranks."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from relora_ds.data.token_dataset import (
    TokenDataset,
    global_batch_indices,
    mix64,
    permute,
    rank_micro_batches,
    read_index,
    verify,
)
from relora_ds.errors import ConfigError

LENGTH = 8
TOKENS = 8 * 37 + 5


def write_folder(folder: Path, dtype: str = "uint16", tokens: int = TOKENS) -> Path:
    """A prepared folder whose train split counts up from 0, so that a sample shows where it was read; validation is empty."""
    folder.mkdir()
    splits = {}
    for name, count in (("train", tokens), ("validation", 0)):
        data = np.arange(count).astype({"uint16": "<u2", "uint32": "<u4"}[dtype]).tobytes()
        (folder / f"{name}.bin").write_bytes(data)
        splits[name] = {"file": f"{name}.bin", "tokens": count, "documents": 1, "sha256": hashlib.sha256(data).hexdigest()}
    tokenizer = {"file": "tokenizer.json", "sha256": "", "vocab_size": 80_000, "eos_id": 3}
    index = {"format": 1, "tokenizer": tokenizer, "dtype": dtype, "splits": splits}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "tokens")


def edit_index(folder: Path, **changes: object) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_read_index_returns_what_was_written(folder: Path) -> None:
    index = read_index(folder)
    assert (index.vocab_size, index.eos_id, index.dtype) == (80_000, 3, np.dtype("<u2"))
    assert (index.splits["train"].tokens, index.splits["train"].documents) == (TOKENS, 1)


def test_missing_folder_and_unfinished_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match="no finished preparation") as caught:
            read_index(path)
        assert caught.value.key == "data.path"


def test_index_of_another_format(folder: Path) -> None:
    edit_index(folder, format=2)
    with pytest.raises(ConfigError, match="format 2"):
        read_index(folder)


@pytest.mark.parametrize("contents", ["{", "[]", '{"format": 1}'])
def test_index_that_is_none(folder: Path, contents: str) -> None:
    (folder / "index.json").write_text(contents)
    with pytest.raises(ConfigError, match=r"data\.path"):
        read_index(folder)


def test_file_of_another_size(folder: Path) -> None:
    with open(folder / "train.bin", "ab") as file:
        file.write(b"\0\0")
    with pytest.raises(ConfigError, match=r"train\.bin has 604 bytes, the index says 602"):
        read_index(folder)
    (folder / "train.bin").unlink()
    with pytest.raises(ConfigError, match=r"train\.bin has no file"):
        read_index(folder)


def test_verify_finds_one_flipped_bit(folder: Path) -> None:
    verify(folder)
    data = bytearray((folder / "train.bin").read_bytes())
    data[100] ^= 1
    (folder / "train.bin").write_bytes(data)
    with pytest.raises(ConfigError, match=r"train\.bin is damaged"):
        verify(folder)


def test_mix64_is_splitmix64() -> None:
    # The first outputs of the reference implementation for seed 0: state n * golden ratio, finalised.
    states = np.array([0, 0x9E3779B97F4A7C15], dtype=np.uint64)
    assert mix64(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 1000, 4095, 4097, 65_537])
def test_permute_is_a_bijection(n: int) -> None:
    for seed, epoch in ((0, 0), (0, 1), (7, 0), (-1, 12)):
        assert np.array_equal(np.sort(permute(np.arange(n), n, seed, epoch)), np.arange(n))


def test_permute_depends_on_seed_and_epoch_only() -> None:
    n = 1000
    orders = [permute(np.arange(n), n, seed, epoch) for seed in range(4) for epoch in range(4)]
    assert len({order.tobytes() for order in orders}) == 16
    one_by_one = [int(permute(np.array([k]), n, 3, 3)[0]) for k in range(n)]
    assert one_by_one == orders[-1].tolist()
    mixed = permute(np.array([5, 5, 5]), n, 0, np.array([0, 1, 2]))
    assert mixed.tolist() == [int(orders[epoch][5]) for epoch in range(3)]


def test_permute_looks_random() -> None:
    n = 5000
    order = permute(np.arange(n), n, 0, 0)
    # For a uniform permutation both correlations have a standard deviation of 1/sqrt(n), and one point is fixed on average.
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 4 / math.sqrt(n)
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 4 / math.sqrt(n)
    assert (order == np.arange(n)).sum() < 8


def test_permute_needs_no_table() -> None:
    n = 10**15
    image = permute(np.array([0, 1, n - 1]), n, 0, 0)
    assert len(set(image.tolist())) == 3
    assert image.max() < n


def test_permute_rejects_indices_outside() -> None:
    for index in (-1, 10):
        with pytest.raises(ValueError, match=r"\[0, 10\)"):
            permute(np.array([index]), 10, 0, 0)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_batch_in_file_order(tmp_path: Path, dtype: str) -> None:
    # Values over 32767 and 65535 would come out wrong from a signed or a short type.
    count = 8 * (9000 if dtype == "uint32" else 5000)
    dataset = TokenDataset(write_folder(tmp_path / "t", dtype, count), "train", LENGTH, shuffle=False)
    batch = dataset.batch(range(len(dataset) - 2, len(dataset)))
    assert batch.dtype == torch.int64
    assert batch.tolist() == [list(range(count - 16, count - 8)), list(range(count - 8, count))]


def test_length_leaves_out_the_incomplete_sample(folder: Path) -> None:
    dataset = TokenDataset(folder, "train", LENGTH)
    assert len(dataset) == 37
    assert dataset.batch(range(37)).max() == 37 * LENGTH - 1


def test_unshuffled_epochs_repeat(folder: Path) -> None:
    dataset = TokenDataset(folder, "train", LENGTH, shuffle=False)
    assert torch.equal(dataset.batch([0, 36]), dataset.batch([37, 73]))


def test_each_epoch_holds_each_sample_once_in_another_order(folder: Path) -> None:
    dataset = TokenDataset(folder, "train", LENGTH, seed=5)
    epochs = [dataset.batch(range(37 * e, 37 * (e + 1)))[:, 0] // LENGTH for e in range(3)]
    for epoch in epochs:
        assert epoch.sort().values.tolist() == list(range(37))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3


def test_batch_across_the_end_of_an_epoch(folder: Path) -> None:
    dataset = TokenDataset(folder, "train", LENGTH, seed=1)
    across = dataset.batch(range(35, 40))
    assert torch.equal(across, torch.cat([dataset.batch([k]) for k in range(35, 40)]))
    assert across[2, 0] // LENGTH == permute(np.array([0]), 37, 1, 1)[0]


def test_order_is_fixed_for_ever(folder: Path) -> None:
    """A checkpoint records the number of updates and nothing of the order: another order would repeat and skip samples."""
    starts = TokenDataset(folder, "train", LENGTH, seed=1234).batch([0, 1, 2, 37, 38])[:, 0] // LENGTH
    assert starts.tolist() == [33, 35, 10, 35, 1]


def test_split_without_one_sample(folder: Path) -> None:
    for split, length in (("train", TOKENS + 1), ("validation", LENGTH), ("train", 0)):
        with pytest.raises(ConfigError, match="less than one sample") as caught:
            TokenDataset(folder, split, length)
        assert caught.value.key == "data.sequence_length"
    assert len(TokenDataset(folder, "train", TOKENS)) == 1


@pytest.mark.parametrize(("place", "is_seen_at_once"), [(3, True), (5000, False)], ids=["in a probe", "between probes"])
def test_an_id_that_no_token_has_is_refused_when_it_is_read_at_the_latest(
    tmp_path: Path, place: int, is_seen_at_once: bool
) -> None:
    folder = write_folder(tmp_path / "tokens", "uint32", tokens=200_000)
    data = np.zeros(200_000, dtype="<u4")
    data[place] = 80_000
    (folder / "train.bin").write_bytes(data.tobytes())
    with pytest.raises(
        ConfigError, match=r"data\.path=.* holds the id 80000, its vocabulary ends before 80000; delete the folder"
    ):
        dataset = TokenDataset(folder, "train", LENGTH, shuffle=False)
        assert not is_seen_at_once
        dataset.batch(np.array([0, place // LENGTH]))
    assert len(TokenDataset(write_folder(tmp_path / "others", "uint32", tokens=80_000), "train", LENGTH)) == 10_000, (
        "the last id is one"
    )


def test_a_file_that_is_cut_off_while_it_is_read_from_is_refused(folder: Path) -> None:
    """A map of it would end the process with a bus error, and no word."""
    dataset = TokenDataset(folder, "train", LENGTH, shuffle=False)
    os.truncate(folder / "train.bin", 3 * LENGTH * 2 + 5)
    assert dataset.batch([0, 2]).tolist() == [list(range(LENGTH)), list(range(2 * LENGTH, 3 * LENGTH))]
    with pytest.raises(ConfigError, match=r"train\.bin was cut off to 53 bytes since the run began"):
        dataset.batch([3])


def test_a_disk_that_fails_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    dataset = TokenDataset(folder, "train", LENGTH)
    monkeypatch.setattr(os, "pread", fails)
    with pytest.raises(OSError, match=r"Input/output error: .*train\.bin"):
        dataset.batch([0])


def test_a_file_of_another_user_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder can be read, and the file cannot."""

    def fails(path: Path, *_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "open", fails)
    with pytest.raises(ConfigError, match=r"^data\.path=.*: train\.bin cannot be read \(Permission denied\); "):
        TokenDataset(folder, "train", LENGTH)


def test_pieces_of_a_read_are_put_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read may give less than was asked for."""
    dataset, read = TokenDataset(folder, "train", LENGTH), os.pread
    whole = dataset.batch([4, 50])
    monkeypatch.setattr(os, "pread", lambda file, count, start: read(file, min(count, 3), start))
    assert torch.equal(dataset.batch([4, 50]), whole)


def test_a_dataset_holds_its_file_no_longer_than_it_lives(folder: Path) -> None:
    dataset = TokenDataset(folder, "train", LENGTH)
    number = dataset._file
    os.fstat(number)
    del dataset
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_unknown_split(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no split 'test'"):
        TokenDataset(folder, "test", LENGTH)


def test_global_batches_follow_each_other() -> None:
    assert list(global_batch_indices(1, 4)) == [0, 1, 2, 3]
    assert list(global_batch_indices(3, 4)) == [8, 9, 10, 11]
    with pytest.raises(ValueError, match="numbered from 1"):
        global_batch_indices(0, 4)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_ranks_share_the_same_global_batch(world_size: int, micro_batch: int) -> None:
    for update in (1, 2, 9):
        shares = [
            rank_micro_batches(update, global_batch=16, micro_batch=micro_batch, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        assert {len(micro) for share in shares for micro in share} == {micro_batch}
        assert {len(share) for share in shares} == {16 // world_size // micro_batch}
        # In the order of the ranks the shares are the global batch itself: contiguous, nothing twice, nothing missing.
        assert [k for share in shares for micro in share for k in micro] == list(global_batch_indices(update, 16))


@pytest.mark.parametrize("wrong", [{"micro_batch": 3}, {"world_size": 3}, {"rank": 2}, {"rank": -1}, {"micro_batch": 0}])
def test_batches_that_do_not_divide(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="multiple|rank"):
        rank_micro_batches(1, **({"global_batch": 16, "micro_batch": 2, "rank": 0, "world_size": 2} | wrong))
