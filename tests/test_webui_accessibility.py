"""Every page as WCAG 2.2 AA asks: contrast, names, headings, focus; on a desktop and on a phone, in a real Chromium."""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import update
from webui_browser import CONTRAST, LAPTOP, PHONE, fits, log_in, open_page
from webui_site import ROOT, Site, open_site, served

from herald.ledger import results
from webui import record

SERIES = f"/series/{ROOT}"

STRUCTURE = """() => {
  const faults = [], all = selector => [...document.querySelectorAll(selector)];
  const seen = all("a, button, input:not([type=hidden]), select, textarea, summary, img, meter, dialog, [role=button]");
  for (const e of seen.filter(e => e.checkVisibility())) {
    const pointed = (e.getAttribute("aria-labelledby") || "").split(" ").map(id => document.getElementById(id));
    const named = e.matches("img") ? e.hasAttribute("alt") : e.getAttribute("aria-label") || e.labels?.length
      || pointed.some(one => one?.textContent.trim())
      || (!e.matches("input, select, textarea, meter, dialog") && e.textContent.trim())
      || e.querySelector("img[alt]:not([alt=''])");
    if (!named) faults.push(`no name: ${e.outerHTML.slice(0, 90)}`);
  }
  if (!document.documentElement.lang) faults.push("no language");
  if (!document.title.trim()) faults.push("no title");
  if (all("h1").length !== 1) faults.push(`${all("h1").length} h1`);
  if (all("main").length !== 1) faults.push("no main");
  const levels = all("h1, h2, h3, h4").filter(e => e.checkVisibility()).map(e => Number(e.tagName[1]));
  levels.forEach((level, i) => {
    if (i && level > levels[i - 1] + 1) faults.push(`h${levels[i - 1]} then h${level}`);
  });
  all("[tabindex]").filter(e => e.tabIndex > 0).forEach(e => faults.push(`tabindex: ${e.outerHTML.slice(0, 90)}`));
  const ids = all("[id]").map(e => e.id);
  ids.filter((id, i) => ids.indexOf(id) !== i).forEach(id => faults.push(`two of #${id}`));
  for (const e of all("[aria-labelledby], [aria-describedby], [for]"))
    for (const name of ["aria-labelledby", "aria-describedby", "for"])
      for (const id of (e.getAttribute(name) || "").split(" ").filter(Boolean))
        if (!document.getElementById(id)) faults.push(`${name} of nothing: ${id}`);
  return faults;
}"""

# what has the focus: a number for its place in the document, and whether the focus can be seen
FOCUSED = """() => {
  const e = document.activeElement, style = getComputedStyle(e);
  const outlined = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
  return {place: e === document.body ? -1 : [...document.querySelectorAll("*")].indexOf(e), outlined,
          in_dialog: Boolean(e.closest("dialog")), html: e.outerHTML.slice(0, 90)};
}"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A positive that rita has judged, a negative, one that failed, and one that she must read blind."""
    with open_site(tmp_path_factory.mktemp("accessibility")) as unserved, served(unserved) as site:
        judged = site.add(1)
        site.add(2, "negative")
        site.add(3, "not_eligible", uncertain=True)
        site.add(4, "failed", reasons=("the model server cannot be reached; start it with `herald run serving`",))
        site.add(5)
        record.add_review(site.ledger, judged, "agree", "rita", prediction_shown=True, note="a note")
        record.add_review(site.ledger, judged, "unsure", "ada", prediction_shown=True)
        with site.ledger.begin() as connection:
            statement = update(results).where(results.c.accession_number == "ACC00005")
            connection.execute(statement.values(blind=record.SHADOW))
        yield site


PUBLIC = {"log-in": "/login", "refused link": "/page/x", "page": "<link>"}
PAGES = {
    "worklist": "/",
    "positive": f"{SERIES}.1.1/1",
    "kind": f"{SERIES}.1.1/1?describe=1",
    "failed": f"{SERIES}.4.1/1",
    "blind": f"{SERIES}.5.1/1",
    "page": "<link>",
    "operations": "/operations",
    "nothing there": "/nowhere",
}


@pytest.mark.parametrize("viewport", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_text_has_contrast_controls_have_names_and_pages_have_a_structure_and_fit(
    chromium: Any, site: Site, viewport: dict[str, int]
) -> None:
    page = open_page(chromium, site, viewport)
    link = site.link(record.find_analysed(site.ledger, f"{ROOT}.2")[0].event)
    for name, path in {**PUBLIC, **{f"{name}, logged in": path for name, path in PAGES.items()}}.items():
        if name == "worklist, logged in":
            page.goto("/login")
            log_in(page)
            page.wait_for_url("**/")
        page.goto(path.replace("<link>", link))
        assert page.evaluate(CONTRAST) == [], name
        assert page.evaluate(STRUCTURE) == [], name
        assert fits(page), name


@pytest.mark.parametrize("name", ["worklist", "positive", "blind", "page", "operations"])
def test_the_focus_is_seen_and_follows_the_order_of_the_page(chromium: Any, site: Site, name: str) -> None:
    page = open_page(chromium, site, LAPTOP)
    log_in(page)
    page.wait_for_url("**/")
    link = site.link(record.find_analysed(site.ledger, f"{ROOT}.2")[0].event)
    page.goto(PAGES[name].replace("<link>", link))
    places = []
    for _ in range(80):
        page.keyboard.press("Tab")
        focused = page.evaluate(FOCUSED)
        if focused["place"] < 0 or focused["place"] in places:  # round
            break
        assert focused["outlined"], f"the focus is not seen on {focused['html']}"
        places.append(focused["place"])
    assert len(places) >= 5
    assert places == sorted(places)


def test_every_part_of_the_site_is_a_thumb_away_on_a_phone(chromium: Any, site: Site) -> None:
    page = open_page(chromium, site, PHONE)
    log_in(page)
    page.wait_for_url("**/")
    for name in ("Operations", "Adjudication", "Worklist"):
        link = page.get_by_role("navigation", name="Main").get_by_role("link", name=name)
        assert link.bounding_box()["height"] >= 44, name  # WCAG 2.5.5
        link.click()
        page.get_by_role("heading", level=1, name=name).wait_for()
        assert fits(page), name


def test_the_question_for_the_kind_holds_the_focus_and_gives_it_back(chromium: Any, site: Site) -> None:
    page = open_page(chromium, site, LAPTOP)
    log_in(page)
    page.wait_for_url("**/")
    page.goto(PAGES["positive"])
    page.get_by_role("link", name="Kind and note").click()
    page.get_by_role("dialog", name="Which kind of haemorrhage?").wait_for()
    for _ in range(12):
        focused = page.evaluate(FOCUSED)
        assert focused["in_dialog"] or focused["place"] < 0, focused["html"]  # below zero: the browser's own buttons
        page.keyboard.press("Tab")
    page.get_by_role("button", name="Not stated").click()
    page.get_by_role("dialog").wait_for(state="hidden")
    assert page.evaluate("document.activeElement.id") == "next"


def test_what_was_recorded_is_told_to_a_screen_reader(chromium: Any, site: Site) -> None:
    page = open_page(chromium, site, LAPTOP)
    log_in(page)
    page.wait_for_url("**/")
    page.goto(f"{SERIES}.2.1/1")
    page.get_by_role("button", name="Agree", exact=True).click()
    told = page.get_by_role("status").filter(has_text="Recorded: agreed.")
    told.wait_for()
    assert told.get_attribute("aria-live") == "polite"
