"""The page: nothing of a run's folder is more than text, nothing is loaded, nothing runs."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import yaml

from relora_ds.reports.contents import Recipe, Section, Table
from relora_ds.reports.html_page import POLICY, page
from tests.unit.reports.run_folders import pages, relora_records, restart, start, write_run, write_traffic

EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>\"'&{};</style>"


class Tags(HTMLParser):
    """All elements of a page, with their attributes, and those that are open at its end."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def assert_harmless(text: str) -> None:
    tags = Tags(text)
    assert tags.open == []
    names = {tag for tag, _ in tags.found}
    assert names.isdisjoint({"script", "img", "iframe", "object", "embed", "link", "form", "base", "foreignobject", "image"})
    for tag, attributes in tags.found:
        assert not [name for name in attributes if name.startswith("on") or name == "src"], tag
        for name in ("href", "xlink:href"):
            assert str(attributes.get(name, "#")).startswith("#"), tag
        assert not re.search(r"url\((?!#)|@import", attributes.get("style") or ""), tag


def test_what_a_run_says_is_text(tmp_path: Path) -> None:
    folder = tmp_path / "evil <b>run & 'co' \"x\""
    write_run(folder, relora_records(), [restart(1, 100)], settings=yaml.safe_dump({"method": EVIL, "data": {"path": EVIL}}))
    write_traffic(folder, start(backend=EVIL, unseen=[EVIL], nodes=[{"host": EVIL, "counted_bytes": 1, "sent_bytes": 1}]))
    (folder / "ranks.jsonl").write_text('{"update": 20, "hosts": ["<script>a()</script>", "b"], "forward_s": [2, 1]}\n')
    _, text = pages(folder)
    assert_harmless(text)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "evil &lt;b&gt;run &amp;" in text


def test_a_page_of_blocks() -> None:
    blocks = ["It is **so** and `a<b` or *never* 2*3*4.", Table([["a", "b"], ["1", "<2>"]]), Recipe("c.yaml", "x: <y>\n")]
    text = page("T & U", [Section("S <1>", blocks)])
    assert_harmless(text)
    assert f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">' in text and "script" not in POLICY
    assert "default-src 'none'" in POLICY
    assert "<title>T &amp; U</title>" in text and "<h2>S &lt;1&gt;</h2>" in text
    assert "<p>It is <strong>so</strong> and <code>a&lt;b</code> or <em>never</em> 2*3*4.</p>" in text
    assert '<tr><th scope="row">1</th><td>&lt;2&gt;</td></tr>' in text
    assert "<pre>x: &lt;y&gt;\n</pre>" in text


def test_the_page_needs_no_other_file(run_dir: Path) -> None:
    _, text = pages(run_dir)
    assert_harmless(text)
    assert text.count("<svg") == text.count("<figure") == 8
    assert "http:" not in text and "https:" not in text and "@import" not in text
