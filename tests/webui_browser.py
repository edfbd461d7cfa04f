"""A browser for the tests of the web UI: sizes of screens, log-in, screenshots, and what to ask of any page."""

from typing import Any

import pytest
from webui_site import PASSWORD, Site

sync_api = pytest.importorskip("playwright.sync_api")

DESKTOP = {"width": 1366, "height": 900}
LAPTOP = {"width": 1366, "height": 768}
PHONE = {"width": 360, "height": 740}


def open_page(chromium: Any, site: Site, viewport: dict[str, int], path: str = "/", **options: Any) -> Any:
    """A page in a context of its own that collects what the browser complains about."""
    page = chromium.new_context(viewport=viewport, base_url=site.config.webui.public_url, **options).new_page()
    collect_complaints(page)
    page.goto(path)
    return page


def collect_complaints(page: Any) -> None:
    page.complaints = []

    def listen(said: Any) -> None:
        # a GPU in software is slow, and says so
        if said.type in ("error", "warning") and "GL Driver Message" not in said.text:
            page.complaints.append(said.text)

    page.on("console", listen)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))


def log_in(page: Any, name: str = "rita") -> None:
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(PASSWORD)
    with page.expect_navigation():  # till its modules have run: a key that is pressed before they listen is lost
        page.get_by_role("button", name="Log in").click()


# a browser may hold back what is pressed before it has shown the page once: nobody can mean a key there
PAINTED = """() => new Promise((done) => new PerformanceObserver(done).observe({type: "paint", buffered: true}))"""


def picture_loaded(page: Any) -> None:
    """The picture is there and shown, and the modules of its page have run, which listen for keys."""
    # no wait_for_function: it would need eval, which our Content-Security-Policy refuses
    sync_api.expect(page.locator("#picture")).to_have_js_property("complete", True)
    page.wait_for_load_state("load")  # now of the page that holds the picture, not of the one before
    assert page.locator("#picture").evaluate("image => image.naturalWidth") == 512
    page.evaluate(PAINTED)


def fits(page: Any) -> bool:
    """Nothing is wider than the page or than its card."""
    return page.evaluate(  # type: ignore[no-any-return]
        "[document.documentElement, ...document.querySelectorAll('.card')].every(e => e.scrollWidth <= e.clientWidth)"
    )


# relative luminance and contrast ratio as WCAG 2.2 defines them, over colours that are laid over one another
CONTRAST = """() => {
  const parse = c => { const [r, g, b, a = 1] = (c.match(/[\\d.]+/g) || []).map(Number); return [r, g, b, a]; };
  const over = (top, under) => top.slice(0, 3).map((v, i) => v * top[3] + under[i] * (1 - top[3])).concat(1);
  const linear = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const luminance = c => .2126 * linear(c[0]) + .7152 * linear(c[1]) + .0722 * linear(c[2]);
  const ground = e => {
    const layers = [];
    for (; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour[3] > 0) layers.push(colour);
      if (colour[3] === 1) break;
    }
    return layers.reduceRight((under, top) => over(top, under), [255, 255, 255, 1]);
  };
  const poor = [];
  for (const e of document.querySelectorAll("body, body *")) {
    const text = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!text || !e.checkVisibility() || e.closest(".unseen, .skip, svg, script")) continue;
    const style = getComputedStyle(e), size = parseFloat(style.fontSize), under = ground(e);
    const least = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
    const [a, b] = [luminance(over(parse(style.color), under)), luminance(under)];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    const where = `${e.tagName}.${e.className}: ${e.textContent.trim().slice(0, 30)}`;
    if (ratio < least) poor.push(`${ratio.toFixed(2)} ${where}`);
  }
  return poor;
}"""

UNNAMED = """() => [...document.querySelectorAll("a, button, input:not([type=hidden]), select, textarea, img, meter")]
  .filter(e => e.checkVisibility() && !(e.matches("img") ? e.hasAttribute("alt") : e.getAttribute("aria-label")
    || e.textContent.trim() || e.labels?.length))
  .map(e => e.outerHTML.slice(0, 100))"""
