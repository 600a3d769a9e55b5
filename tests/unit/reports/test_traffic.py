"""The table of bytes, and what factors saved."""

from __future__ import annotations

from pathlib import Path

from relora_ds.reports import traffic
from relora_ds.reports.run_records import read_run
from tests.unit.reports.run_folders import relora_records, start, words, write_run, write_traffic


def test_every_line_says_whose_bytes_these_are(run_dir: Path) -> None:
    assert traffic.rows(start()) == [
        ["what", "sent by", "in all", "an update"],
        ["gradients", "rank 0", "2 MB", "1.82 kB"],
        ["parameters", "rank 0", "2 MB", "1.82 kB"],
        ["norms and losses", "rank 0", "40 B", "0.0364 B"],
        ["restarts", "rank 0", "1.5 MB", "–"],
        ["evaluation, checkpoints", "rank 0", "100 B", "–"],
        ["all of an update", "a rank, on the mean", "4.75 MB", "4.32 kB"],
        ["everything counted", "all 2 ranks", "12 MB", "–"],
        ["at the interfaces", "2 node(s)", "12.1 MB", "–"],
    ]
    write_traffic(run_dir, start(), start(first_update=1101, last_update=1200, unseen=["cxi0 (libfabric)"]))
    text = words(run_dir)
    assert "Updates 1 to 1,100, 2 rank(s) on 2 node(s)." in text and "Updates 1,101 to 1,200" in text
    assert (
        "| at the interfaces | 2 node(s) | 12.1 MB | – |" in text and "| at the interfaces | 2 node(s) | ≥ 12.1 MB | – |" in text
    )


def test_one_machine_has_no_network(run_dir: Path) -> None:
    assert traffic.ONE_MACHINE not in traffic.note([start()])
    assert traffic.ONE_MACHINE in traffic.note([start(nodes=start()["nodes"][:1])])


def test_a_damaged_traffic_file_is_left_out(run_dir: Path) -> None:
    (run_dir / "traffic.json").write_text('{"starts": [{"first')
    assert "## Traffic" not in words(run_dir)


def test_bytes_saved(tmp_path: Path) -> None:
    """60 updates of 10 kB, then 140 of 4 kB: 840 kB less, and the restarts took 1.5 MB / 10."""
    records = relora_records()
    for record in records:
        record["sent_bytes"] = 4000 if record["phase"] == "lora" else 10_000
    folder = write_run(tmp_path / "run", records)
    write_traffic(folder, start(wire_bytes={"restart": 100_000, "verify": 50_000}))
    assert traffic.saved_bytes(read_run(folder)) == (
        "An update of the LoRA phase sent 4 kB, one of the full-rank phase 10 kB: 60.0% less. Over 140 updates rank 0 sent "
        "690 kB less than it would have in full-rank training, the 150 kB of the restarts counted."
    )
    write_traffic(folder, start(), start(world_size=4))
    assert traffic.saved_bytes(read_run(folder)) == "", "another number of ranks sends other bytes"
    alone = write_run(tmp_path / "alone", records[70:])
    assert traffic.saved_bytes(read_run(alone)) == "", "no full-rank phase to compare with"
