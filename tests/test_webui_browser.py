"""A reader at work, in a real Chromium against the real server: waitress, SQLite ledger and bus."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from webui_site import HOTTEST, PASSWORD, SLICES, Site, open_site, served

from herald.bus import open_bus
from herald.events import SeriesReviewed

sync_api = pytest.importorskip("playwright.sync_api")

DESKTOP = {"width": 1366, "height": 900}
PHONE = {"width": 360, "height": 740}


@pytest.fixture
def site(tmp_path) -> Iterator[Site]:
    with open_site(tmp_path) as site, served(site) as running:
        yield running


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Where screenshots go: $HERALD_TEST_SCREENSHOTS to look at them, else a temporary folder."""
    folder = Path(os.environ.get("HERALD_TEST_SCREENSHOTS", tmp_path / "screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def open_page(chromium, site: Site, viewport, path: str = "/"):
    """A page in a context of its own that collects what the browser complains about."""
    page = chromium.new_context(viewport=viewport, base_url=site.config.webui.public_url).new_page()
    page.complaints = []
    page.on("console", lambda said: page.complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(path)
    return page


def log_in(page, name: str = "rita") -> None:
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()


def picture_loaded(page) -> None:
    # no wait_for_function: it would need eval, which our Content-Security-Policy refuses
    sync_api.expect(page.locator("#picture")).to_have_js_property("complete", True)
    assert page.locator("#picture").evaluate("image => image.naturalWidth") == 512


def fits(page) -> bool:
    """Nothing is wider than the page or than its card."""
    return page.evaluate(
        "[document.documentElement, ...document.querySelectorAll('.card')].every(e => e.scrollWidth <= e.clientWidth)"
    )


def fetched(site: Site) -> SeriesReviewed:
    bus = open_bus(site.config.bus)
    try:
        delivery = bus.fetch("test", ("reviews",), timeout_s=10)
        assert delivery is not None, "no review reached the bus"
        assert isinstance(delivery.event, SeriesReviewed)
        return delivery.event
    finally:
        bus.close()


def fill(site: Site) -> None:
    site.add(3, "not_eligible", uncertain=True)
    site.add(2, "negative")
    site.add(4, "failed", reasons=("the model server cannot be reached; start it with `herald run serving`",))
    site.add(1)


def test_a_reader_logs_in_finds_the_positive_looks_and_agrees_by_keyboard(chromium, site, pictures):
    fill(site)
    page = open_page(chromium, site, DESKTOP)
    page.screenshot(path=pictures / "log-in.png")
    log_in(page)
    page.wait_for_url("**/")
    assert page.title() == "(1) Worklist · Herald"
    page.screenshot(path=pictures / "worklist.png")
    page.keyboard.press("j")
    assert page.evaluate("document.activeElement.textContent") == "ACC00001"  # the positive comes first
    page.keyboard.press("j")
    page.keyboard.press("k")
    page.keyboard.press("Enter")
    picture_loaded(page)

    position = page.locator("#position")
    assert f"Slice {HOTTEST + 1} of {SLICES} (original 15–16)" in position.text_content()
    page.screenshot(path=pictures / "series.png", full_page=True)
    first = page.locator("#picture").get_attribute("src")
    page.keyboard.press("ArrowUp")
    assert f"Slice {HOTTEST + 2} of" in position.text_content()
    page.keyboard.press("m")
    assert "mask=0" in page.locator("#picture").get_attribute("src")
    page.keyboard.press("4")
    assert "window=bone" in page.locator("#picture").get_attribute("src")
    picture_loaded(page)
    page.screenshot(path=pictures / "series-bone.png")
    page.locator("#viewer").hover()
    page.mouse.wheel(0, 100)
    sync_api.expect(position).to_contain_text(f"Slice {HOTTEST + 1} of")
    for key in ("ArrowDown", "h", "m", "1"):
        page.keyboard.press(key)
    assert page.locator("#picture").get_attribute("src") == first

    page.get_by_label("What you see").select_option("iph")
    page.get_by_label("Note").fill("left basal ganglia: a, d and u are only letters here")
    page.keyboard.press("Escape")
    page.keyboard.press("a")
    page.get_by_text("Recorded: agreed.").wait_for()
    page.screenshot(path=pictures / "series-agreed.png", full_page=True)
    event = fetched(site)
    assert (event.action, event.reader) == ("agree", "rita")
    page.keyboard.press("n")
    page.wait_for_url("**/series/*.2.1/1")  # the negative is the next unread
    assert page.complaints == []


def test_a_new_positive_comes_onto_the_open_worklist_by_itself(chromium, site):
    site.add(2, "negative")
    page = open_page(chromium, site, DESKTOP)
    log_in(page)
    page.get_by_role("link", name="ACC00002").focus()
    page.evaluate("window.same = true")
    site.add(1)
    page.get_by_role("link", name="ACC00001").wait_for()
    assert page.evaluate("window.same"), "the page was reloaded"
    assert page.evaluate("document.activeElement.textContent") == "ACC00002"  # the reader's place is kept
    assert page.title() == "(1) Worklist · Herald"
    page.get_by_text("A new positive series has arrived.").wait_for()


def test_a_page_is_acknowledged_on_a_phone_and_leads_to_the_images_after_log_in(chromium, site, pictures):
    event = site.add(1)
    fill_others = [site.add(number, "negative") for number in (2, 3)]
    page = open_page(chromium, site, PHONE, site.link(event))
    page.screenshot(path=pictures / "phone-page.png")
    assert fits(page)
    assert page.locator("img[src*=slice]").count() == 0
    page.get_by_role("button", name="Acknowledge").click()
    page.get_by_text("Nobody else will be paged").wait_for()
    assert fetched(site).action == "acknowledge"
    page.screenshot(path=pictures / "phone-acknowledged.png")
    page.get_by_role("link", name="Open images").click()
    log_in(page)
    picture_loaded(page)
    page.screenshot(path=pictures / "phone-series.png", full_page=True)
    assert fits(page)
    page.get_by_role("link", name="Herald", exact=True).click()
    page.get_by_role("link", name=fill_others[0].accession_number).wait_for()
    page.screenshot(path=pictures / "phone-worklist.png", full_page=True)
    assert fits(page)
    assert page.complaints == []


def test_single_key_shortcuts_can_be_switched_off(chromium, site):
    site.add(1)
    page = open_page(chromium, site, DESKTOP)
    log_in(page)
    page.get_by_role("link", name="ACC00001").click()
    page.get_by_text("Keyboard").click()
    page.get_by_label("Use single-key shortcuts").uncheck()
    page.locator("h1").click()
    page.keyboard.press("4")
    assert "window=brain" in page.locator("#picture").get_attribute("src")
    page.keyboard.press("ArrowUp")  # not a character: still works
    assert f"Slice {HOTTEST + 2} of" in page.locator("#position").text_content()
    assert site.bus.published == []


CONTRAST = """() => {
  const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const lum = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const ground = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length && (c.length < 4 || c[3] > 0)) return c; } return [255, 255, 255]; };
  const poor = [];
  for (const e of document.querySelectorAll("body *")) {
    const text = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!text || !e.checkVisibility() || e.closest(".unseen, .skip")) continue;
    const [a, b] = [lum(parse(getComputedStyle(e).color)), lum(ground(e))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) poor.push(`${e.tagName}.${e.className} ${ratio.toFixed(2)}: ${e.textContent.trim().slice(0, 30)}`);
  }
  return poor;
}"""

UNNAMED = """() => [...document.querySelectorAll("a, button, input:not([type=hidden]), select, textarea, img, meter")]
  .filter(e => e.checkVisibility() && !(e.matches("img") ? e.hasAttribute("alt") : e.getAttribute("aria-label")
    || e.textContent.trim() || e.labels?.length))
  .map(e => e.outerHTML.slice(0, 100))"""


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_text_has_contrast_controls_have_names_and_pages_fit(chromium, site, viewport):
    fill(site)
    page = open_page(chromium, site, viewport)
    for path in ("/login", "/", "/series/1.2.826.0.1.3680043.8.498.1.1/1", "/series/1.2.826.0.1.3680043.8.498.4.1/1"):
        page.goto(path)
        assert page.evaluate(CONTRAST) == [], path
        assert page.evaluate(UNNAMED) == [], path
        assert fits(page), path
        if path == "/login":
            log_in(page)
            page.wait_for_url("**/")
