"""Amounts of data."""

from __future__ import annotations

import pytest

from relora_ds.errors import ConfigError
from relora_ds.units import human_bytes, human_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [("100Mbit", 12.5e6), ("1Gbit/s", 125e6), ("200 gbit", 25e9), ("10Gbps", 1.25e9), ("25GB/s", 25e9), ("80GB", 80e9),
     ("512MiB", 512 * 2**20), ("1.5 TB", 1.5e12), ("7B", 7.0), ("0.5kB", 500.0)],
)  # fmt: skip
def test_amounts(text: str, expected: float) -> None:
    assert parse_bytes(text, "--link") == expected


@pytest.mark.parametrize("text", ["", "fast", "-1Gbit", "0Gbit", "10", "10G", "1Gbit/h"])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--link=.*100Mbit"):
        parse_bytes(text, "--link")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (2.34e9, "2.34 GB"), (5e15, "5e+03 TB")],
)
def test_human_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (1e-9, "0.001 µs"), (3.21e-6, "3.21 µs"), (0.0123, "12.3 ms"), (0.9996, "1 s"), (61.25, "61.2 s"),
     (12345, "12,345 s")],
)  # fmt: skip
def test_human_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text
