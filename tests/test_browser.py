"""The report in a browser: its gallery is clicked through, and nothing is cut off at the usual widths."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.index import write
from pipeline.report.pictures import PALETTE
from tests import drawn
from tests.browser import Visit, chromium, visiting
from tests.test_photo_gallery import OWN, again

HOSTILE = "</script><img src=x onerror=alert(1)>\u2028\"'&lt;"
WIDTHS = (360, 800, 1400)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on 205 own photos with a class of a hostile name."""
    chromium()
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        graph = drawn.experiment(OWN, train=8, held=197)
        path = graph.find("index").outputs["index"]
        index = json.loads(path.read_text())
        index["classes"][0] = HOSTILE
        index["images"]["i000"]["tags"] = []
        write(path, index)
        again(graph.find("report"))
    return folder / "results/drawn/report.html"


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on generated data with 25 rows, two seeds, long names and a warning with a long path."""
    chromium()
    raw: dict[str, Any] = {**drawn.RAW, "rows": None, "seeds": [3, 4_000_000_000]}
    raw["pseudo_labels"], raw["segmentations"] = {**raw["pseudo_labels"]}, {**raw["segmentations"]}
    for n in range(20):
        raw["pseudo_labels"][f"rule_{n}"] = raw["pseudo_labels"]["oaa"]
        raw["segmentations"][f"a_rather_long_name_{n}"] = {"labels": f"pseudo_labels/rule_{n}", **drawn.LEARNER}
    raw["classifiers"] = {f"base{n:02d}": drawn.SMALL for n in range(12)} | raw["classifiers"]
    folder = tmp_path_factory.mktemp("generated")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        job = drawn.experiment(raw).find("report")
        log = job.inputs["log of segmentations/cam"]
        warning = f"results/{'a_long_name/' * 9}labels.h5 ignores all pixels"
        log.write_text(json.dumps(json.loads(log.read_text()) | {"warning": warning}))
        again(job)
    return folder / "results/drawn/report.html"


@pytest.fixture
def visit(page: Path) -> Iterator[Visit]:
    with visiting(page) as open_page:
        yield open_page
        assert open_page.faults == []


def text(visit: Visit, selector: str) -> str:
    return str(visit.page.locator(selector).inner_text())


def shown(visit: Visit) -> list[str]:
    return list(visit.page.locator(".tile .name").all_inner_texts())


def data(page: Path) -> dict[str, Any]:
    part = page.read_text().partition('id="photo-data">')[2].partition("</script>")[0]
    content: dict[str, Any] = json.loads(part)
    return content


def doubt(content: dict[str, Any]) -> dict[str, float]:
    columns = zip(*(content[key] for key in ("id", "missing", "untagged", "uncertainty")), strict=True)
    return {name: len(missing) + len(other) + (unsure or 0) / 1000 for name, missing, other, unsure in columns}


def test_the_doubtful_photos_come_first(visit: Visit, page: Path) -> None:
    doubts = doubt(data(page))
    values = [doubts[name] for name in shown(visit)]
    assert len(values) == 60
    assert values == sorted(doubts.values(), reverse=True)[:60]
    visit.page.select_option("#photo-sort", "sure")
    assert [doubts[name] for name in shown(visit)] == sorted(doubts.values())[:60]
    visit.page.select_option("#photo-sort", "name")
    assert shown(visit) == [f"i{number:03d}" for number in range(60)]


def test_pictures_are_loaded_as_they_come_into_view(visit: Visit) -> None:
    visit.page.wait_for_load_state("networkidle")
    loaded = "[...document.querySelectorAll('.tile img')].filter(i => i.complete && i.naturalWidth).length"
    assert visit.page.evaluate("document.querySelectorAll('#photos img').length") <= 2 * 60 + 3
    before = visit.page.evaluate(loaded)
    assert before > 0
    assert len([url for url in visit.requests if "/photos/" in url]) == 0  # only thumbnails and masks
    visit.page.locator(".tile").last.scroll_into_view_if_needed()
    visit.wait_until(f"{loaded} === 120")


def test_filters(visit: Visit, page: Path) -> None:
    content = data(page)
    holding = [
        name
        for name, tags, shares in zip(content["id"], content["tags"], content["shares"], strict=True)
        if 2 in (tags or []) or any(k == 2 for k, _ in shares)
    ]
    visit.page.select_option("#photo-class", "2")
    assert text(visit, "#photo-count").startswith(f"{len(holding)} of 205 photos")
    assert set(shown(visit)) <= set(holding)
    visit.page.select_option("#photo-class", "")
    visit.page.select_option("#photo-show", "label")
    assert sorted(shown(visit)) == [f"i{number:03d}" for number in range(8)]
    visit.page.select_option("#photo-show", "negative")
    assert shown(visit) == ["i000"]
    visit.page.select_option("#photo-show", "")
    visit.page.fill("#photo-name", "I20")
    assert sorted(shown(visit)) == [f"i{number}" for number in range(200, 205)]
    visit.page.fill("#photo-name", "nothing like this")
    assert text(visit, "#photo-count") == "0 of 205 photos"


def test_pages(visit: Visit) -> None:
    visit.page.select_option("#photo-sort", "name")
    assert visit.page.locator("#photo-back").is_disabled()
    visit.page.click("#photo-forward")
    assert shown(visit)[0] == "i060"
    visit.page.select_option("#photo-page", "3")
    assert shown(visit) == [f"i{number}" for number in range(180, 205)]
    assert visit.page.locator("#photo-forward").is_disabled()
    assert text(visit, "#photo-count") == "205 of 205 photos, 181 to 205 on this page"


def test_a_photo_large_with_slider_and_keyboard(visit: Visit) -> None:
    page = visit.page
    page.select_option("#photo-sort", "name")
    page.locator(".tile").nth(58).click()
    assert text(visit, "#viewer-title") == "i058"
    assert page.evaluate("document.activeElement.id") == "viewer-frame"
    visit.wait_until("document.getElementById('viewer-photo').naturalWidth > 0")
    box, photo, mask = (page.locator(f"#viewer-{name}").bounding_box() for name in ("stage", "photo", "mask"))
    assert photo == mask
    assert photo["height"] == pytest.approx(box["height"], abs=2)  # as large as the window allows

    def opacity() -> float:
        return float(page.evaluate("getComputedStyle(document.getElementById('viewer-mask')).opacity"))

    assert opacity() == pytest.approx(0.6)
    page.locator("#viewer-slider").fill("20")
    assert opacity() == pytest.approx(0.2)
    page.locator("#viewer-frame").focus()
    for key, value in (("ArrowUp", 0.3), ("ArrowDown", 0.2), ("0", 0.0), ("9", 1.0), ("ArrowUp", 1.0)):
        page.keyboard.press(key)
        assert opacity() == pytest.approx(value)
    page.keyboard.press("b")  # before and after
    assert page.locator("#viewer-compare").is_checked()
    assert page.evaluate("document.getElementById('viewer-mask').style.clipPath") == "inset(0px 0px 0px 50%)"
    page.mouse.move(photo["x"] + photo["width"] / 4, photo["y"] + 50)
    page.mouse.down()
    page.mouse.up()
    assert page.evaluate("document.getElementById('viewer-mask').style.clipPath") == "inset(0px 0px 0px 25%)"
    page.keyboard.press("u")
    assert page.locator("#viewer-doubt").is_visible()
    for key, name in (("ArrowRight", "i059"), ("ArrowRight", "i060"), ("ArrowLeft", "i059"), ("End", "i204")):
        page.keyboard.press(key)
        assert text(visit, "#viewer-title") == name
    page.keyboard.press("ArrowRight")
    assert text(visit, "#viewer-title") == "i204"
    assert page.locator("#viewer-next").is_disabled()
    page.keyboard.press("Escape")
    assert not page.locator("#photo-viewer").is_visible()
    visit.wait_until("document.activeElement.querySelector('.name')?.textContent === 'i204'")  # on its own page


def test_a_pseudo_label_has_no_doubt_map(visit: Visit) -> None:
    visit.page.select_option("#photo-show", "label")
    visit.page.locator(".tile").first.click()
    assert visit.page.locator("#viewer-unsure").is_disabled()
    visit.page.keyboard.press("u")
    assert not visit.page.locator("#viewer-doubt").is_visible()
    assert "pseudo label" in text(visit, "#viewer-facts")


def test_a_hostile_class_name_is_text(visit: Visit) -> None:
    dialogs: list[str] = []
    visit.page.on("dialog", lambda dialog: dialogs.append(dialog.message))
    visit.page.select_option("#photo-class", "1")
    visit.page.locator(".tile").first.click()
    assert HOSTILE.replace("\u2028", "") in text(visit, "#viewer-facts").replace("\u2028", "")
    assert visit.page.locator("img[src=x]").count() == 0
    assert dialogs == []


def test_every_picture_and_control_has_a_name(visit: Visit) -> None:
    visit.page.locator(".tile").first.click()
    assert visit.page.locator("#photos img:not([hidden]):not([alt])").count() == 0
    assert visit.page.evaluate("[...document.images].filter(i => !i.hidden && !i.alt).length") == 0
    unnamed = """[...document.querySelectorAll('button, select, input')].filter(
        e => !(e.textContent.trim() || e.ariaLabel || e.labels?.length)).map(e => e.id)"""
    assert visit.page.evaluate(unnamed) == []


CONTRAST = """() => {
  const luminance = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const back = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (c.startsWith('rgb(')) return c; } return getComputedStyle(document.body).backgroundColor; };
  const out = new Set();
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    const skipped = 'script, style, noscript, svg, option, :disabled, .heat, .unseen';
    if (!walk.currentNode.data.trim() || e.closest(skipped)) continue;
    const [a, b] = [luminance(getComputedStyle(e).color), luminance(back(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) out.add(`${e.tagName}.${e.className} ${e.textContent.slice(0, 30)}`);
  }
  return [...out];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", ["page", "generated"])
def test_contrast_of_texts(which: str, scheme: str, request: pytest.FixtureRequest) -> None:
    """At least 4.5, the level AA of WCAG."""
    with visiting(request.getfixturevalue(which), scheme=scheme) as visit:
        if which == "page":
            visit.page.locator(".tile").first.click()
        assert visit.page.evaluate(CONTRAST) == []


CUT_OFF = """() => [...document.querySelectorAll('body *')].filter(e => {
  if (e.closest('.scroll, dialog:not([open]), .hidden, script, style, option, noscript')) return false;
  const box = e.getBoundingClientRect();
  return box.width > 0 && (box.right > innerWidth + 1 || box.left < -1);
}).map(e => `${e.tagName}.${e.className.baseVal ?? e.className}`)"""
TEXT_CUT_OFF = """() => [...document.querySelectorAll('svg.chart text')].filter(t => {
  const box = t.getBoundingClientRect(), frame = t.ownerSVGElement.getBoundingClientRect();
  return box.left < frame.left - 1 || box.right > frame.right + 1
    || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
}).map(t => t.textContent)"""
TOO_SMALL = """() => [...document.querySelectorAll('svg.chart text')].filter(
  t => t.getBoundingClientRect().height && t.getCTM().a * parseFloat(getComputedStyle(t).fontSize) < 9).length"""


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("which", ["page", "generated"])
def test_nothing_is_cut_off(which: str, width: int, request: pytest.FixtureRequest) -> None:
    with visiting(request.getfixturevalue(which), width=width) as visit:
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
        assert visit.page.evaluate(CUT_OFF) == []
        assert visit.page.evaluate(TEXT_CUT_OFF) == []
        assert visit.page.evaluate(TOO_SMALL) == 0
        if which == "page":
            visit.page.locator(".tile").first.click()
            assert visit.page.evaluate(CUT_OFF) == []
            for name in ("viewer-close", "viewer-next", "viewer-slider", "viewer-photo"):
                box = visit.page.locator(f"#{name}").bounding_box()
                assert min(box["x"], box["y"]) >= 0
                assert box["x"] + box["width"] <= width
                assert box["y"] + box["height"] <= 900
        assert visit.faults == []


def test_colours_of_the_classes_are_those_of_the_masks(visit: Visit) -> None:
    red, green, blue = PALETTE[2].tolist()
    swatch = visit.page.locator(".photo-list .tags li", has_text="square").first.locator("i")
    colour = swatch.evaluate("e => getComputedStyle(e).backgroundColor")
    assert colour == f"rgb({red}, {green}, {blue})"
