"""The files of a run's folder: whole or absent, and logs that a resumed run goes on with."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from relora_ds import config
from relora_ds.errors import ConfigError
from relora_ds.run import folder as run_folder
from relora_ds.run.folder import Log, RunFolder, append_line, give_usual_mode, truncate_log, write_atomically


def test_write_atomically_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    write_atomically(path, "old, and longer than the new text")
    write_atomically(path, "new: naïve")
    assert path.read_text(encoding="utf-8") == "new: naïve"
    assert list(tmp_path.iterdir()) == [path]


def test_write_atomically_keeps_the_old_text_until_the_new_one_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "manifest.json"
    write_atomically(path, "old")
    events: list[str] = []

    def fsync(file: int) -> None:
        events.append(f"fsync of {os.fstat(file).st_size} bytes")

    def replace(source: Any, target: Any) -> None:
        events.append("replace")
        raise OSError("killed here")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="killed here"):
        write_atomically(path, "new text")
    assert events == ["fsync of 8 bytes", "replace"]
    assert path.read_text(encoding="utf-8") == "old"


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_a_file_gets_the_mode_of_any_other(tmp_path: Path, umask: int) -> None:
    """safetensors makes its own with 0600, which colleagues cannot read; an owner who wants that says so by the umask."""
    path, other = tmp_path / "rank_00000.safetensors", tmp_path / "config.yaml"
    save_file({"weight": torch.zeros(2)}, path)
    give_usual_mode(path)
    write_atomically(other, "text")
    assert [stat.S_IMODE(file.stat().st_mode) for file in (path, other)] == [0o666 & ~umask] * 2
    assert set(tmp_path.iterdir()) == {path, other}
    assert load_file(path)["weight"].tolist() == [0, 0]


def test_a_file_system_without_modes_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise PermissionError(errno.EPERM, "no modes here")

    monkeypatch.setattr(Path, "chmod", refuse)
    path = tmp_path / "model.safetensors"
    path.touch()
    give_usual_mode(path)
    assert list(tmp_path.iterdir()) == [path]


def test_truncate_log_drops_what_a_power_cut_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"update": 1}\n\x00\x00\xff\xfe')
    truncate_log(path, 5)
    assert path.read_bytes() == b'{"update": 1}\n'


def test_append_line_begins_a_new_line_behind_one_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"run": "a"}\n{"run": "b/se')
    for run in ("c", "d"):
        append_line(path, {"run": run})
    assert path.read_text() == '{"run": "a"}\n{"run": "b/se\n{"run": "c"}\n{"run": "d"}\n'


def test_append_line_adds_one_json_object_per_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records: list[dict[str, Any]] = [{"update": 1, "loss": 5.25}, {"update": 2, "phase": "line\nbreak, naïve"}]
    for record in records:
        append_line(path, record)
    assert path.read_text(encoding="utf-8").endswith("\n")
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == records


def write_log(path: Path, updates: range, tail: str = "") -> None:
    path.write_text("".join(json.dumps({"update": u, "loss": 1.0 / u}) + "\n" for u in updates) + tail, encoding="utf-8")


def read_updates(path: Path) -> list[int]:
    return [json.loads(line)["update"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_truncate_log_drops_later_updates(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_log(path, range(1, 8))
    append_line(path, {"update": 4, "eval_loss": 2.0})  # an evaluation stands beside the update it belongs to
    truncate_log(path, 4)
    assert read_updates(path) == [1, 2, 3, 4, 4]
    truncate_log(path, 0)
    assert path.read_text() == ""


@pytest.mark.parametrize("cut_off", ['{"update": 4, "lo', '{"update": 4}\x00\x00', "\x00\x00\x00"])
def test_truncate_log_drops_a_line_cut_off_by_a_kill(tmp_path: Path, cut_off: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write_log(path, range(1, 4), tail=cut_off)
    truncate_log(path, 10)
    assert read_updates(path) == [1, 2, 3]
    append_line(path, {"update": 4})
    assert read_updates(path) == [1, 2, 3, 4]


def test_numbers_that_json_cannot_hold_are_null(tmp_path: Path) -> None:
    path = tmp_path / "restarts.jsonl"
    append_line(path, {"update": 1, "merge_error": float("nan"), "by_layer_type": {"q_proj": {"merged_change": float("inf")}}})
    assert path.read_text() == '{"update": 1, "merge_error": null, "by_layer_type": {"q_proj": {"merged_change": null}}}\n'


def test_a_log_waits_for_a_disk_that_refuses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a line finds room: it is taken back, and the lines come in order once there is room again."""
    told: list[str] = []
    log = Log(tmp_path / "metrics.jsonl", told.append)
    log.append({"update": 1})

    def half_a_line(path: Path, record: dict[str, Any]) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record)[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(run_folder, "append_line", half_a_line)
        log.append({"update": 2})
        log.append({"update": 3})
    assert read_updates(log.path) == [1]
    log.append({"update": 4})
    assert read_updates(log.path) == [1, 2, 3, 4]
    assert len(told) == 2 and "cannot be written (No space left on device)" in told[0] and "can be written again" in told[1]


def test_a_log_waits_for_a_folder_that_cannot_even_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stale handle of NFS, a mount that fails."""
    told: list[str] = []
    log = Log(tmp_path / "metrics.jsonl", told.append)
    log.append({"update": 1})

    def stale(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as away:
        away.setattr(Path, "stat", stale)
        log.append({"update": 2})
    log.append({"update": 3})
    assert read_updates(log.path) == [1, 2, 3]
    assert len(told) == 2 and "cannot be written (Stale file handle)" in told[0]


def test_a_line_that_was_written_is_not_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder cannot be looked at just after it."""
    log = Log(tmp_path / "metrics.jsonl", lambda text: None)
    log.append({"update": 1})

    def stale(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as away:

        def written_before(path: Path, record: dict[str, Any]) -> None:
            append_line(path, record)
            away.setattr(Path, "stat", stale)

        away.setattr(run_folder, "append_line", written_before)
        log.append({"update": 2})
    log.append({"update": 3})
    assert read_updates(log.path) == [1, 2, 3]


def test_truncate_log_of_a_run_without_a_log(tmp_path: Path) -> None:
    truncate_log(tmp_path / "restarts.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


def test_folder_is_a_run_only_with_config_and_checkpoints(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert not folder.exists()
    folder.config.write_text("run: {}")
    assert not folder.exists()
    folder.checkpoints.mkdir()
    assert folder.exists()


def test_read_config_returns_what_the_run_was_started_with(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(ConfigError, match=r"RUN_DIR=.* no config\.yaml"):
        folder.read_config()
    started_with = config.parse(settings)
    folder.config.write_text(config.dump(started_with), encoding="utf-8")
    assert folder.read_config() == started_with


def test_settings_that_are_gone_matter_only_where_a_run_used_them(tmp_path: Path, settings: dict[str, Any]) -> None:
    run = RunFolder(tmp_path)
    gone = {"vocabulary_every": 1, "vocabulary_rows": "all", "vocabulary_dtype": "auto"}
    write_atomically(run.config, yaml.safe_dump({**settings, "traffic": gone}))
    assert run.read_config() == config.parse(settings)
    write_atomically(run.config, yaml.safe_dump({**settings, "traffic": {**gone, "vocabulary_every": 2}}))
    with pytest.raises(
        ConfigError, match=r"traffic=\{.*'vocabulary_every': 2.*\}: is not there any more; resume with the version"
    ):
        run.read_config()


def test_a_line_that_another_machine_wrote_over_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """O_APPEND of two clients of NFS: both write where the file ended for them."""
    path, real, calls = tmp_path / "faults.jsonl", run_folder.append_line, []

    def append(where: Path, record: dict[str, object]) -> None:
        real(where, record)
        calls.append(record)
        if len(calls) < 3:
            where.write_text('{"rank": 1}\n')

    monkeypatch.setattr(run_folder, "append_line", append)
    monkeypatch.setattr(run_folder, "APPEND_PAUSE_S", 0.0)
    run_folder.append_surely(path, {"rank": 0, "loss": math.nan})
    assert path.read_text() == '{"rank": 1}\n{"rank": 0, "loss": null}\n'
    assert len(calls) == 3


def test_a_line_that_is_lost_every_time_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "faults.jsonl"
    monkeypatch.setattr(run_folder, "append_line", lambda where, record: where.write_text(""))
    monkeypatch.setattr(run_folder, "APPEND_PAUSE_S", 0.0)
    run_folder.append_surely(path, {"rank": 0})
    assert path.read_text() == ""
