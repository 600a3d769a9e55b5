"""report.html in a real browser: on a phone, a tablet and a desk, in light, dark and print; nothing is asked for, nothing runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from relora_ds.reports import html_page
from relora_ds.reports.contents import Section
from relora_ds.reports.report import report
from relora_ds.spectra.changes import Change, LayerChange, RunChanges
from relora_ds.spectra.drawing import panels
from relora_ds.spectra.pages import sections
from relora_ds.spectra.spectrum import Spectrum
from relora_ds.sweeps.pictures import at_the_end, on_the_way
from tests import browser
from tests.unit.reports.run_folders import (
    WARM_START,
    begun,
    falling,
    relora_records,
    restart,
    start,
    write_run,
    write_starts,
    write_traffic,
)  # fmt: skip

pytestmark = [pytest.mark.long, pytest.mark.skipif(browser.PROGRAM is None, reason="no chromium: apt-get install chromium")]

WIDTHS = [360, 768, 1280]
WIDEST = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
SPILT = """[...document.querySelectorAll('body *')].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width && (box.right > innerWidth + 1 || box.left < -1) && !e.closest('.wide, pre, details:not([open])');
}).map(e => e.tagName + ' ' + e.textContent.slice(0, 40))"""
CURVES = """[...document.querySelectorAll('figure')].map(figure => {
  const frame = figure.querySelector('svg').getBoundingClientRect();
  const curves = [...figure.querySelectorAll('[id*="-series-"]')].map(e => e.getBoundingClientRect());
  const inside = box => box.width > 2 && box.left >= frame.left - 1 && box.right <= frame.right + 1;
  return [figure.id, curves.length, curves.filter(inside).length];
})"""
# Numbers of the axes: how tall the letters are in px, and pairs that lie over each other.
NUMBERS = """[...document.querySelectorAll('svg')].map(svg => {
  const texts = [...svg.querySelectorAll('text')], scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  const boxes = texts.map(e => e.getBoundingClientRect());
  const over = (a, b) => a.left < b.right && b.left < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom;
  const pairs = boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => over(a, b)).map(() => svg.getAttribute('aria-label')));
  return [Math.min(...texts.map(e => parseFloat(getComputedStyle(e).fontSize) * scale)), pairs];
})"""
CONTRAST = """(selector, property) => {
  const light = colour => {
    const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = e => {
    const colour = getComputedStyle(e).backgroundColor;
    return e.parentElement && /, 0\\)|transparent/.test(colour) ? behind(e.parentElement) : colour;
  };
  const ratios = [...document.querySelectorAll(selector)].map(e => {
    const [a, b] = [light(getComputedStyle(e)[property]), light(behind(e))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  });
  return ratios.length ? Math.min(...ratios) : null;
}"""
TEXTS = ["body", "p", "th", "td", "thead th", "a", "code", "pre", "summary", ".unit", ".legend li", "footer"]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run with all that a report shows, with a long name, and of another one beside it."""
    records = relora_records()
    for record in records:
        record["sent_bytes"] = 4_000_000 if record["phase"] == "lora" else 10_000_000
    folder = tmp_path_factory.mktemp("runs") / "a_run_with_a_name_that_is_longer_than_a_phone_is_wide_and_has_no_space"
    settings = "method: relora\nrelora: {rank: 4, alpha: 8, warm_start: 60}\ndata: {path: /" + "very/" * 40 + "deep}\n"
    write_run(folder, records, [restart(1, WARM_START + 40), restart(2, 150)], settings=settings)
    write_traffic(folder, start(last_update=200, trainable_parameters=250))
    write_starts(folder, begun(command="relora-ds train " + "a" * 200), begun())
    (folder / "ranks.jsonl").write_text('{"update": 20, "hosts": ["a", "b"], "forward_s": [1, 2]}\n')
    report([folder])
    return folder / "report.html"


@pytest.fixture(scope="module")
def shown(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Tab]:
    with browser.tab(tmp_path_factory.mktemp("profile")) as tab:
        tab.resize(1280)
        tab.open(page)
        yield tab


def contrast(tab: browser.Tab, selector: str, what: str) -> float | None:
    return tab.run(f"({CONTRAST})({selector!r}, {what!r})")


def test_nothing_is_asked_for_and_the_console_is_silent(shown: browser.Tab, page: Path) -> None:
    assert shown.requests == [page.as_uri()]
    assert shown.complaints == []
    assert shown.run("document.scripts.length + document.querySelectorAll('img, link, iframe, object').length") == 0


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_the_screen(shown: browser.Tab, width: int) -> None:
    shown.prefer()
    shown.resize(width)
    content, screen = shown.run(WIDEST)
    assert content <= screen == width
    assert shown.run(SPILT) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_every_picture_has_its_curves_and_numbers_that_can_be_read(shown: browser.Tab, width: int) -> None:
    shown.prefer()
    shown.resize(width)
    drawn = shown.run(CURVES)
    assert len(drawn) == 8 and all(inside == curves > 0 for _, curves, inside in drawn), drawn
    for size, pairs in shown.run(NUMBERS):
        assert size >= 9 and pairs == [], (size, pairs)


@pytest.mark.parametrize(("scheme", "medium"), [("light", "screen"), ("dark", "screen"), ("dark", "print")])
def test_contrast(shown: browser.Tab, scheme: str, medium: str) -> None:
    """As WCAG asks: 4.5 for text, 3 for curves. Paper is white whatever the screen is."""
    shown.prefer(scheme, medium)
    paper = shown.run("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == ((scheme, medium) != ("dark", "screen"))
    for selector in TEXTS:
        ratio = contrast(shown, selector, "color")
        assert ratio is not None and ratio >= 4.5, (selector, ratio)
    for selector, what, least in (
        ("svg text", "fill", 4.5),
        ('svg [id*="-series-"] path', "stroke", 3),
        ('svg [id*="-mark-"] path', "stroke", 3),
    ):
        ratio = contrast(shown, selector, what)
        assert ratio is not None and ratio >= least, (selector, ratio)


def test_on_paper(shown: browser.Tab) -> None:
    """A4 within its margins: nothing is cut off, and what is folded up on a screen is there."""
    shown.prefer(medium="print")
    shown.resize(718)
    content, sheet = shown.run(WIDEST)
    assert content <= sheet
    assert shown.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert shown.run("document.querySelector('details pre').getBoundingClientRect().height") > 20
    beyond = "[...document.querySelectorAll('table')].filter(e => e.getBoundingClientRect().right > innerWidth + 1).length"
    assert shown.run(beyond) == 0


def test_a_page_of_spectra_fits_a_phone(tmp_path: Path) -> None:
    values = torch.tensor([0.5, 0.2, 0.01] + [0.0] * 29)
    layers = [LayerChange("model.layers.0.q_proj", (32, 32), 4, Spectrum(values, 32, 0.54, 0.0, noise=1e-3))]
    early, late = (Change(before=5, now=now, restarts=1, layers=layers) for now in (10, 20))
    runs = [RunChanges(label, "relora", late, [early]) for label in ("a", "a_run_with_a_very_long_name_" * 3)]
    parts = sections(runs, [panels(1, "q_proj", runs)])
    (tmp_path / "spectrum.html").write_text(html_page.page("Spectra", parts, "relora-ds spectrum"), encoding="utf-8")
    with browser.tab(tmp_path / "profile") as tab:
        for width in WIDTHS:
            tab.resize(width)
            tab.open(tmp_path / "spectrum.html")
            content, screen = tab.run(WIDEST)
            assert content <= screen == width and tab.run(SPILT) == []
            drawn = tab.run(CURVES)
            assert len(drawn) == 3 and all(inside == curves > 0 for _, curves, inside in drawn), drawn
            assert [pairs for _, pairs in tab.run(NUMBERS)] == [[]] * 3
        assert tab.complaints == []


def test_several_runs_side_by_side_fit_a_phone(page: Path, tmp_path: Path) -> None:
    others = [write_run(tmp_path / f"run_{number}", falling(80), method="full") for number in range(7)]
    report([page.parent, *others], tmp_path / "both")
    with browser.tab(tmp_path / "profile") as tab:
        tab.resize(360)
        tab.open(tmp_path / "both" / "report.html")
        content, screen = tab.run(WIDEST)
        assert content <= screen == 360
        assert tab.complaints == []
        assert all(curves == inside > 0 for _, curves, inside in tab.run(CURVES))


def test_the_arms_of_a_sweep_fit_a_phone(page: Path, tmp_path: Path) -> None:
    """Thirty arms by row, and their curves, which take the colours four times over."""
    arms = [f"relora_with_a_long_name_r{number}_1.2e-2" for number in range(30)]
    drawn = [
        at_the_end({arm: [20.0 + number, 21.0 + number] for number, arm in enumerate(arms)}),
        on_the_way({arm: [{5: 50.0 + number, 10: 20.0 + number}] for number, arm in enumerate(arms)}),
    ]
    report([page.parent], tmp_path / "sweep", first=[Section(picture.title, [picture]) for picture in drawn])
    with browser.tab(tmp_path / "profile") as tab:
        for width in WIDTHS:
            tab.resize(width)
            tab.open(tmp_path / "sweep" / "report.html")
            content, screen = tab.run(WIDEST)
            assert content <= screen == width and tab.run(SPILT) == []
            assert all(curves == inside > 0 for _, curves, inside in tab.run(CURVES))
            assert all(pairs == [] for _, pairs in tab.run(NUMBERS))
        assert tab.complaints == []


def test_the_policy_holds(page: Path, tmp_path: Path) -> None:
    """A script and an address from elsewhere, had they come in, would do nothing."""
    text = page.read_text(encoding="utf-8")
    (tmp_path / "broken.html").write_text(
        text.replace(
            "<main>",
            '<main><script>document.title = "ran"</script><img src="http://127.0.0.1:9/x.png" onerror="document.title = 1">',
        ),
        encoding="utf-8",
    )
    with browser.tab(tmp_path / "profile") as tab:
        tab.open(tmp_path / "broken.html")
        assert tab.run("document.title").startswith("Report on")
        assert len(tab.complaints) >= 2 and all("Content Security Policy" in complaint for complaint in tab.complaints)
