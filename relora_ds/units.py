"""Amounts of data as people write and read them: ``200Gbit`` a second, ``80GB``, 4.52 MB."""

from __future__ import annotations

import re

from relora_ds.errors import ConfigError

PREFIXES = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_AMOUNT = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?)(i?)(bit|b)(?:ps|/s)?\s*", re.IGNORECASE)


def parse_bytes(text: str, key: str) -> float:
    """``80GB``, ``512MiB``, ``25GB/s`` in bytes, and ``200Gbit``, ``1Gbit/s``, ``100Mbps`` divided by eight.

    A small b alone stands for bits where ``ps`` follows, as vendors write it.

    Raises:
        ConfigError: on ``key``, when it is no positive amount.
    """
    match = _AMOUNT.fullmatch(text)
    amount = float(match[1]) if match else 0.0
    if match is None or amount <= 0:
        raise ConfigError(key, text, "is no amount of data", "write it like 100Mbit, 200Gbit, 25GB/s or 80GB")
    prefix = match[2].lower()
    factor = 1024 ** "kmgt".index(prefix) * 1024 if match[3] and prefix else PREFIXES[prefix]
    in_bits = match[4].lower() == "bit" or (match[4] == "b" and "ps" in text)
    return amount * factor / (8 if in_bits else 1)


def human_bytes(count: float) -> str:
    """Bytes with a decimal prefix, three digits: 4.52 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"


def human_seconds(seconds: float) -> str:
    """Seconds with a decimal prefix where they are few, three digits: 4.52 ms."""
    for unit in ("s", "ms", "µs"):
        if seconds >= 0.9995 or seconds == 0 or unit == "µs":
            break
        seconds *= 1000
    return f"{seconds:,.0f} {unit}" if seconds >= 999.5 else f"{seconds:.3g} {unit}"
