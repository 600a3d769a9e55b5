"""Pictures as PNG and as a part of a page: the right marks, no colour or letter of their own, nothing from elsewhere."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.image
import pytest

from relora_ds.reports.drawing import COLOURS, VARIABLES, Entry, axis_number, legend, svg, turn, write_panels, write_png
from relora_ds.reports.figures import Mark, Picture, Series

LINE = Series("a", [1, 2, 3, 4], [1.0, 2.0, math.nan, 4.0], 0)
PICTURE = Picture(
    "loss", "Loss", "nats", "", (LINE, Series("b", [1, 4], [2.0, 3.0], 1, "dots"), Series("", [1, 4], [1.0, 1.0], 8, "thin")),
    (Mark("restart", 2), Mark("restart", 3, 1), Mark("phase change", 2)),
)  # fmt: skip


def test_a_legend_tells_each_thing_once() -> None:
    assert legend(PICTURE) == [
        Entry("a", "line", 0), Entry("b", "dots", 1), Entry("restart", "restart", None),
        Entry("end of the warm start", "phase change", None),
    ]  # fmt: skip


def test_svg_has_the_colours_and_letters_of_its_page() -> None:
    drawn = svg(PICTURE)
    root = ElementTree.fromstring(drawn)
    assert root.tag == "svg" and {"width", "height"}.isdisjoint(root.attrib) and root.get("viewBox") == "0 0 518.4 244.8"
    assert not re.search(r"#[0-9a-f]{6}\b|font|<style|<metadata|http", drawn)
    assert {"var(--series-0)", "var(--series-1)", "var(--soft)", "var(--mark)", "var(--grid)"} <= set(
        re.findall(r"var\([\w-]+\)", drawn)
    )
    assert len(VARIABLES) == len(COLOURS) + 3
    texts = ["".join(element.itertext()).strip() for element in root.iter("text")]
    assert {"1", "2", "3", "4"} <= set(texts)


def test_ids_of_two_pictures_in_a_page_differ() -> None:
    first, second = (svg(Picture(name, "", "", "", PICTURE.series, PICTURE.marks)) for name in ("loss", "speed"))
    ids = [re.findall(r' id="([^"]+)"', drawn) for drawn in (first, second)]
    assert all(len(set(own)) == len(own) for own in ids) and set(ids[0]).isdisjoint(ids[1])
    for drawn, own in zip((first, second), ids, strict=True):
        assert set(re.findall(r'(?:url\(|href=")#([^")]+)', drawn)) <= set(own), "what is referred to is there"
    assert [name for name in ids[0] if "-series-" in name] == [f"loss-series-{number}" for number in range(3)]


def test_the_same_picture_is_drawn_the_same() -> None:
    assert svg(PICTURE) == svg(PICTURE)


def test_a_ninth_curve_is_not_taken_for_the_second() -> None:
    """The colours begin anew, with dots of another shape."""
    curves = tuple(Series(str(number), [1, 2], [1.0, 2.0], number, "dots") for number in (1, 1 + len(COLOURS)))
    drawn = [svg(Picture("p", "", "", "", (curve,))) for curve in curves]
    assert all("var(--series-1)" in text for text in drawn) and turn(1) == 0 and turn(1 + len(COLOURS)) == 1
    shapes = [re.search(r'<defs>\s*<path[^>]* d="([^"]+)"', text[text.index("p-series-0") :]) for text in drawn]
    assert shapes[0] and shapes[1] and shapes[0][1] != shapes[1][1]


def test_rows_have_their_names_and_room_for_them(tmp_path: Path) -> None:
    rows = tuple(f"arm_{number}: $3" for number in range(12))
    dots = (Series("a run", [20.0, 200.0], [0, 11], 0, "points"), Series("mean", [30.0], [0], 1, "means"))
    picture = Picture("arms", "Arms", "perplexity", "", dots, rows=rows, is_log=True)
    root = ElementTree.fromstring(svg(picture))
    texts = ["".join(element.itertext()).strip() for element in root.iter("text")]
    assert set(rows) <= set(texts) and {"20", "100"} <= set(texts)
    assert float((root.get("viewBox") or "").split()[-1]) > 300
    write_png(picture, tmp_path / "arms.png")
    assert matplotlib.image.imread(tmp_path / "arms.png").shape[0] > 500


@pytest.mark.parametrize("is_log", [True, False])
def test_numbers_of_an_axis_are_plain(is_log: bool) -> None:
    picture = Picture("p", "", "", "", (Series("a", [0, 20000], [3.0, 50000.0], 0),), is_log=is_log)
    texts = [element.text or "" for element in ElementTree.fromstring(svg(picture)).iter("text")]
    assert "20,000" in texts and all(re.fullmatch(r"[\d,.]+", text) for text in texts), texts


def test_png(tmp_path: Path) -> None:
    path = tmp_path / "loss.png"
    write_png(Picture("loss", "Loss", "nats", "", (Series("a $x$", [1, 2], [1.0, 2.0], 0),)), path)
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] > 300 and pixels.shape[1] > 800 and pixels.std() > 0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0008, "0.0008"), (2.5e-5, "2.5e-5"), (0.25, "0.25"), (20000, "20,000"), (1.5e6, "1.5M"), (-0.2, "-0.2")],
)
def test_numbers_of_an_axis_are_short(value: float, text: str) -> None:
    assert axis_number(value) == text


@pytest.mark.parametrize("label", ["{}", "small/relora_rank_16_rate_6e-3_{}/seed-1: validation loss"])
def test_a_long_legend_is_not_cut_off(tmp_path: Path, label: str) -> None:
    series = tuple(Series(label.format(number), [1, 2], [1.0, 2.0], number) for number in range(24))
    for name, pictures in (("one", [PICTURE]), ("two", [PICTURE, PICTURE])):
        few, many = tmp_path / f"{name}_few.png", tmp_path / f"{name}_many.png"
        write_panels(pictures, few, (9, 4.65))
        write_panels([replace(picture, series=series) for picture in pictures], many, (9, 4.65))
        pixels = matplotlib.image.imread(many)
        assert (pixels[:, 0] == 1).all() and (pixels[:, -1] == 1).all(), "no letter reaches the edge"
        assert pixels.shape[0] > matplotlib.image.imread(few).shape[0], "it takes no room from the curves"
