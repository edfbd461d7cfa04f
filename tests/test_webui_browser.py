"""A reader at work, in a real Chromium against the real server: waitress, SQLite ledger and bus."""

import re
from collections.abc import Iterator

import pytest
from sqlalchemy import select
from webui_browser import (
    CONTRAST,
    DESKTOP,
    LAPTOP,
    PHONE,
    UNNAMED,
    collect_complaints,
    fits,
    log_in,
    open_page,
    picture_loaded,
)
from webui_site import HOTTEST, ROOT, SLICES, Site, open_site, prediction, served, triaged

from herald.bus import open_bus
from herald.events import SeriesReviewed
from herald.ledger import reviews, series, users

sync_api = pytest.importorskip("playwright.sync_api")


@pytest.fixture
def site(tmp_path) -> Iterator[Site]:
    with open_site(tmp_path) as site, served(site) as running:
        yield running


def fetched(site: Site, count: int) -> list[SeriesReviewed]:
    """What reached the bus: so many reviews, and no more."""
    bus, events = open_bus(site.config.bus), []
    try:
        while len(events) < count:
            delivery = bus.fetch("test", ("reviews",), timeout_s=20)
            assert delivery is not None, f"only {len(events)} reviews reached the bus"
            assert isinstance(delivery.event, SeriesReviewed)
            bus.ack(delivery)
            events.append(delivery.event)
        assert bus.fetch("test", ("reviews",), timeout_s=0) is None
        return events
    finally:
        bus.close()


def kept(site: Site) -> list:
    with site.ledger.read() as connection:
        return list(connection.execute(select(reviews).order_by(reviews.c.occurred_at)).mappings())


def high(locator, least: int = 44) -> bool:
    """Whether every one is high and wide enough for a thumb (44 px: WCAG 2.5.5)."""
    boxes = [one.bounding_box() for one in locator.all()]
    return bool(boxes) and all(box["height"] >= least and box["width"] >= least for box in boxes)


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
    page.keyboard.press("ArrowUp")
    assert f"Slice {HOTTEST + 2} of" in position.text_content()
    page.keyboard.press("m")
    page.keyboard.press("4")
    assert page.url.endswith(f"?slice={HOTTEST + 2}&window=bone&mask=0")  # a reload shows the same
    page.screenshot(path=pictures / "series-bone.png")
    page.locator("#viewer").hover()
    page.mouse.wheel(0, 100)
    sync_api.expect(position).to_contain_text(f"Slice {HOTTEST + 1} of")
    for key in ("ArrowDown", "h", "m", "1"):
        page.keyboard.press(key)
    assert page.url.endswith(f"?slice={HOTTEST + 1}&window=brain&mask=1")

    for key in ("a", "i", "n"):  # no wait between them: what is typed while the verdict is saved is not lost
        page.keyboard.press(key)
    page.wait_for_url("**/series/*.2.1/1")  # the negative is the next unread
    assert [(event.action, event.reader) for event in fetched(site, 2)] == [("agree", "rita")] * 2
    assert [(row["finding_kind"], row["undone_at"]) for row in kept(site)] == [(None, None), ("iph", None)]
    assert page.complaints == []


def test_from_the_link_of_a_page_to_the_next_series(chromium, site, pictures):
    """Page link, log-in, images, acknowledgement, verdict, kind, note, undo, verdict, next: and all on the bus."""
    event = site.add(1)
    site.add(2, "negative")
    page = open_page(chromium, site, LAPTOP, site.link(event))
    page.get_by_role("link", name="Open images (log in)").click()
    log_in(page)
    picture_loaded(page)
    recorded = page.locator("#recorded")
    page.screenshot(path=pictures / "read.png")
    for shown in ("h1", ".gist meter", ".gist .tag", "#picture", "#review [data-key=a]", "#review [data-key=d]"):
        place = page.locator(shown).first.bounding_box()
        assert place["y"] + place["height"] <= LAPTOP["height"], f"{shown} is below the fold"

    page.keyboard.press("k")
    sync_api.expect(recorded).to_have_text("Recorded: acknowledged.")
    page.keyboard.press("a")
    dialog = page.get_by_role("dialog", name="Which kind of haemorrhage?")
    dialog.wait_for()
    assert page.evaluate("document.activeElement.closest('dialog') !== null")
    page.screenshot(path=pictures / "read-kind.png")
    window = page.locator("[data-window-name][aria-current]").text_content()
    page.keyboard.press("4")  # a key of the viewer, which has no say here
    page.keyboard.press("t")
    page.keyboard.type("left basal ganglia: a, d, u and z are only letters here")
    page.keyboard.press("Escape")
    assert dialog.is_visible()
    page.keyboard.press("i")
    sync_api.expect(recorded).to_have_text("Recorded: agreed, intraparenchymal.")
    assert page.evaluate("document.activeElement.id") == "next"
    assert page.locator("[data-window-name][aria-current]").text_content() == window
    page.get_by_text("left basal ganglia").first.wait_for()
    page.screenshot(path=pictures / "read-agreed.png", full_page=True)

    page.keyboard.press("z")
    sync_api.expect(recorded).to_contain_text("Your verdict is taken back")
    page.screenshot(path=pictures / "read-undone.png")
    page.keyboard.press("a")
    dialog.wait_for()
    page.keyboard.press("Escape")
    sync_api.expect(recorded).to_have_text("Recorded: agreed.")
    sync_api.expect(dialog).not_to_be_visible()
    page.keyboard.press("n")
    page.wait_for_url("**/series/*.2.1/1")
    assert [said.action for said in fetched(site, 4)] == ["acknowledge", "agree", "agree", "agree"]
    rows = kept(site)
    assert [bool(row["undone_at"]) for row in rows] == [False, True, True, False]
    assert rows[2]["note"] == "left basal ganglia: a, d, u and z are only letters here"
    assert all(row["opened_at"] for row in rows)
    assert page.complaints == []


def test_a_blind_reader_says_what_there_is_and_is_then_shown_the_prediction(chromium, tmp_path, pictures):
    with open_site(tmp_path, mode="shadow") as unserved, served(unserved) as site:
        site.add(1)
        page = open_page(chromium, site, LAPTOP, f"/series/{ROOT}.1.1/1")
        log_in(page)
        picture_loaded(page)
        page.screenshot(path=pictures / "blind.png")
        assert "93 %" not in page.content()
        page.keyboard.press("y")
        dialog = page.get_by_role("dialog")
        dialog.wait_for()
        assert "93 %" not in page.content()
        page.keyboard.press("s")
        page.get_by_text("The prediction is shown now.").wait_for()
        picture_loaded(page)
        assert "93 %" in page.content()
        page.screenshot(path=pictures / "blind-revealed.png")
        rows = kept(site)
        assert [(row["finding_kind"], row["prediction_shown"]) for row in rows] == [("any", False), ("sah", False)]
        assert page.complaints == []


def test_a_verdict_that_could_not_be_sent_is_said_and_is_not_lost(chromium, site):
    site.add(1)
    page = open_page(chromium, site, LAPTOP, f"/series/{ROOT}.1.1/1")
    log_in(page)
    picture_loaded(page)
    page.route("**/review", lambda route: route.abort())
    page.keyboard.press("a")
    page.get_by_text("Not recorded: Herald gave no answer").wait_for()
    page.unroute("**/review")
    page.keyboard.press("a")
    page.get_by_role("dialog").wait_for()
    assert [row["action"] for row in kept(site)] == ["agree"]


def test_a_verdict_to_which_nothing_answers_is_said_to_be_uncertain_and_keys_work_again(chromium, site, pictures):
    site.add(1)
    page = open_page(chromium, site, LAPTOP, "/")
    page.clock.install()
    page.goto(f"/series/{ROOT}.1.1/1")
    log_in(page)
    picture_loaded(page)
    held = []
    page.route("**/review", lambda route: held.append(route))
    with page.expect_request("**/review"):
        page.keyboard.press("a")
    page.keyboard.press("a")  # typed ahead: means nothing once there is no answer
    page.clock.fast_forward(20_000)
    page.get_by_text("Perhaps not recorded: Herald gave no answer within 20 seconds.").wait_for()
    page.screenshot(path=pictures / "read-no-answer.png")
    page.unroute("**/review")
    page.keyboard.press("a")
    page.get_by_role("dialog").wait_for()
    assert len(held) == 1
    assert [row["action"] for row in kept(site)] == ["agree"]


@pytest.mark.parametrize("scripts", [True, False])
def test_who_acknowledges_a_failure_that_has_become_a_positive_is_shown_the_positive_first(
    chromium, site, pictures, scripts
):
    seen = site.add(1, "failed")
    page = open_page(chromium, site, LAPTOP, f"/series/{ROOT}.1.1/1", java_script_enabled=scripts)
    log_in(page)
    assert page.get_by_role("button", name="Acknowledge").is_visible()
    site.store.write_prediction(seen.study_instance_uid, seen.series_instance_uid, 1, prediction())
    assert site.put(triaged(1)).status_code == 200
    acknowledge = page.get_by_role("button", name="Acknowledge")
    if scripts:
        page.keyboard.press("k")
    else:
        acknowledge.click()
    notice = page.get_by_role("alert").filter(has_text="after the page was loaded: look again. Nothing was recorded.")
    notice.wait_for()
    assert page.locator("h1 .mark").text_content() == "Positive"
    sync_api.expect(page.locator("#picture")).to_have_js_property("complete", True)
    page.screenshot(path=pictures / f"read-changed{'' if scripts else '-no-script'}.png")
    for shown in ("h1", "#picture", "#review [data-key=a]", "#review [data-key=k]"):
        place = page.locator(shown).first.bounding_box()
        assert place["y"] + place["height"] <= LAPTOP["height"], f"{shown} is below the fold"
    if scripts:
        assert page.evaluate(CONTRAST) == []
        assert [text for text in page.complaints if "409" not in text] == []
    assert kept(site) == []
    acknowledge.click()
    page.get_by_text("Recorded: acknowledged.").wait_for()
    assert [row["action"] for row in kept(site)] == ["acknowledge"]
    assert notice.count() == (1 if scripts else 0)  # a script changes a part of the page


def test_a_blind_reader_whose_result_changed_reads_it_at_its_own_address(chromium, tmp_path, pictures):
    with open_site(tmp_path, mode="shadow") as unserved, served(unserved) as site:
        site.add(1, "negative")
        page = open_page(chromium, site, LAPTOP, f"/series/{ROOT}.1.1/1")
        log_in(page)
        picture_loaded(page)
        site.put(triaged(1))
        page.keyboard.press("x")  # which sends the form as a page without scripts does
        page.get_by_role("alert").filter(has_text="look again. Nothing was recorded.").wait_for()
        page.screenshot(path=pictures / "blind-changed.png")
        sync_api.expect(page).to_have_url(re.compile(r"/series/[\d.]+/1(\?|$)"))
        assert "93 %" not in page.content()
        assert kept(site) == []
        page.reload()
        picture_loaded(page)
        assert page.get_by_role("alert").count() == 0


def test_a_phone_is_told_that_the_result_of_its_page_changed(chromium, site, pictures):
    seen = site.add(1, "failed")
    page = open_page(chromium, site, PHONE, site.link(seen), has_touch=True, is_mobile=True, device_scale_factor=2)
    site.put(triaged(1))
    page.get_by_role("button", name="Acknowledge").tap()
    page.get_by_text("after the page was loaded: look again. Nothing was recorded.").wait_for()
    page.get_by_text("93 %").wait_for()
    page.screenshot(path=pictures / "phone-page-changed.png")
    assert fits(page)
    assert kept(site) == []
    acknowledge = page.get_by_role("button", name="Acknowledge")
    place = acknowledge.bounding_box()
    assert place["y"] + place["height"] <= PHONE["height"]
    acknowledge.tap()
    page.get_by_text("Nobody else will be paged").wait_for()
    assert [row["action"] for row in kept(site)] == ["acknowledge"]


# timers of a second and more never come: what is shown in time was told by the stream
NO_POLLING = """const set = window.setTimeout;
window.setTimeout = (call, ms, ...rest) => set(call, ms < 1000 ? ms : 1e8, ...rest);"""


def open_worklist(chromium, site, viewport=DESKTOP, script: str = ""):
    context = chromium.new_context(viewport=viewport, base_url=site.config.webui.public_url)
    context.add_init_script(script)
    page = context.new_page()
    collect_complaints(page)
    page.goto("/")
    with page.expect_response("**/worklist/events"), page.expect_response("**/worklist/rows"):
        log_in(page)
    return page


def test_a_new_positive_comes_onto_the_open_worklist_by_itself(chromium, site, pictures):
    for number in range(2, 40):
        site.put(triaged(number, "negative"))
    page = open_worklist(chromium, site, script=NO_POLLING)
    place = "document.activeElement.getBoundingClientRect().top"
    page.get_by_role("link", name="ACC00025").focus()
    page.evaluate("window.same = true")
    before = page.evaluate(place)
    site.add(1)
    page.get_by_role("link", name="ACC00001").wait_for()
    assert page.evaluate("window.same"), "the page was reloaded"
    assert page.evaluate("document.activeElement.textContent") == "ACC00025"  # the reader's place is kept
    assert abs(page.evaluate(place) - before) <= 1
    assert page.title() == "(1) Worklist · Herald"
    page.get_by_text("A new positive series has arrived.").wait_for(state="attached")
    page.screenshot(path=pictures / "worklist-live.png")
    event = triaged(50)
    with site.ledger.begin() as connection:
        connection.execute(
            series.insert().values(
                series_instance_uid=event.series_instance_uid,
                revision=1,
                study_instance_uid=event.study_instance_uid,
                accession_number=event.accession_number,
                instance_count=7,
                first_image_at=event.first_image_at,
                last_image_at=event.last_image_at,
            )
        )
    page.get_by_text("receiving images").wait_for(state="attached")  # what is on its way is live, too
    site.put(event)
    page.get_by_text("receiving images").wait_for(state="detached")
    assert page.complaints == []


def test_a_worklist_that_gets_no_stream_asks_again_and_again(chromium, site, pictures):
    site.put(triaged(2, "negative"))
    context = chromium.new_context(viewport=DESKTOP, base_url=site.config.webui.public_url)
    page = context.new_page()
    page.route("**/worklist/events", lambda route: route.fulfill(status=503, body="as many as can be"))
    page.goto("/")
    log_in(page)
    page.get_by_role("link", name="ACC00002").wait_for()
    site.put(triaged(1))
    page.get_by_role("link", name="ACC00001").wait_for()
    with site.ledger.begin() as connection:
        connection.execute(users.delete())
    page.wait_for_url(re.compile(r"/login\?next="))  # whoever was removed sees no more of it


def test_filters_are_reached_and_used_by_keyboard(chromium, site, pictures):
    for number, disposition in ((1, "positive"), (2, "negative"), (3, "failed")):
        site.put(triaged(number, disposition, scanner=f"CT {number}"))
    page = open_worklist(chromium, site)
    page.keyboard.press("f")
    page.keyboard.type("Neg")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(r"/\?disposition=negative$"))  # and nothing that was not asked
    assert page.locator("a.open").all_inner_texts() == ["ACC00002"]
    page.keyboard.press("f")
    reached = []
    for _ in range(3):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.name || document.activeElement.textContent"))
    assert reached == ["unreviewed", "More filters", "Show"]
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "finding"
    page.keyboard.press("Tab")
    page.keyboard.type("CT 1")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(r"/\?disposition=negative&scanner=CT\+1$"))
    page.get_by_text("No series matches.").wait_for()
    page.keyboard.press("/")
    page.keyboard.type("acc00003")
    page.keyboard.press("Escape")
    page.screenshot(path=pictures / "worklist-filters.png")
    assert page.locator("#disposition").input_value() == "negative"
    page.get_by_role("link", name="Show all").click()
    page.wait_for_url("**/")
    assert page.locator("a.open").count() == 3
    assert page.complaints == []


def test_a_new_positive_sounds_once_the_reader_has_allowed_it(chromium, site, pictures):
    site.put(triaged(9, "negative"))
    page = open_worklist(chromium, site)
    sound = page.locator("#sound")
    sounded = "document.getElementById('sound').dataset.sounded"
    sync_api.expect(sound).to_have_text("Sound on a new positive: off")
    site.put(triaged(1))
    page.get_by_role("link", name="ACC00001").wait_for()
    assert page.evaluate(sounded) is None
    sound.click()
    sync_api.expect(sound).to_have_text("Sound on a new positive: on")
    sync_api.expect(sound).to_have_attribute("aria-pressed", "true")
    assert page.evaluate(sounded) == "1"  # so that the reader hears what to expect
    site.put(triaged(2))
    sync_api.expect(sound).to_have_attribute("data-sounded", "2")
    site.put(triaged(3, "negative"))
    page.get_by_role("link", name="ACC00003").wait_for()
    assert page.evaluate(sounded) == "2"
    with page.expect_response("**/worklist/rows"):
        page.reload()
    sync_api.expect(sound).to_have_text("Sound on a new positive: on after your next click or key")
    page.screenshot(path=pictures / "worklist-sound.png")
    page.keyboard.press("j")
    sync_api.expect(sound).to_have_text("Sound on a new positive: on")
    site.put(triaged(5))
    sync_api.expect(sound).to_have_attribute("data-sounded", "1")
    sound.click()
    sync_api.expect(sound).to_have_text("Sound on a new positive: off")
    assert page.complaints == []


def test_the_worklist_with_all_its_filters_fits_a_phone(chromium, site, pictures):
    for number, disposition in ((1, "positive"), (2, "negative"), (3, "failed")):
        site.put(triaged(number, disposition, scanner="CT-EMERGENCY-DEPARTMENT-WEST"))
    page = open_worklist(chromium, site, PHONE)
    page.screenshot(path=pictures / "phone-worklist-new.png", full_page=True)
    assert fits(page)
    page.goto("/?finding=iph&from=2020-01-01&disposition=nonsense")
    assert page.evaluate(CONTRAST) == []
    assert page.evaluate(UNNAMED) == []
    page.screenshot(path=pictures / "phone-worklist-filters.png", full_page=True)
    assert fits(page)
    small = "[...document.querySelectorAll('main button, main select, main input:not([type=checkbox]), main summary')]"
    assert page.evaluate(f"{small}.filter(e => e.checkVisibility() && e.offsetHeight < 24).map(e => e.outerHTML)") == []
    assert page.complaints == []


def test_a_page_is_answered_on_a_phone(chromium, site, pictures):
    """Acknowledge without log-in; images, verdict and kind after it, all by touch."""
    event = site.add(1)
    other = site.add(2, "negative")
    page = open_page(chromium, site, PHONE, site.link(event), has_touch=True, is_mobile=True, device_scale_factor=2)
    page.screenshot(path=pictures / "phone-page.png")
    assert fits(page)
    assert page.locator("img[src*=slice]").count() == 0
    acknowledge = page.get_by_role("button", name="Acknowledge")
    assert high(acknowledge, 60)
    place = acknowledge.bounding_box()
    assert place["y"] + place["height"] <= PHONE["height"]
    acknowledge.tap()
    page.get_by_text("Nobody else will be paged").wait_for()
    page.get_by_text("Acknowledged by pager link").wait_for()
    page.screenshot(path=pictures / "phone-acknowledged.png")
    assert [said.action for said in fetched(site, 1)] == ["acknowledge"]

    page.get_by_role("link", name="Open images").tap()
    log_in(page)
    picture_loaded(page)
    page.screenshot(path=pictures / "phone-read.png")
    page.screenshot(path=pictures / "phone-series.png", full_page=True)
    assert fits(page)
    verdicts = page.locator("#review button")
    assert high(verdicts)
    for button in verdicts.all():  # under the thumb, without scrolling
        place = button.bounding_box()
        assert 0 <= place["y"] <= PHONE["height"] - place["height"]
    page.get_by_role("button", name="Agree", exact=True).tap()
    page.get_by_role("dialog").wait_for()
    page.screenshot(path=pictures / "phone-kind.png")
    assert high(page.locator("dialog button"))
    assert page.locator("dialog").evaluate("dialog => dialog.scrollWidth <= dialog.clientWidth")
    assert fits(page)
    page.get_by_role("button", name="Subarachnoid").tap()
    page.get_by_text("Recorded: agreed, subarachnoid.").wait_for()
    assert kept(site)[-1]["finding_kind"] == "sah"

    page.goto(site.link(event))  # who is logged in sees the key picture there, and can judge
    sync_api.expect(page.locator(".key-picture img")).to_have_js_property("complete", True)
    page.screenshot(path=pictures / "phone-page-logged-in.png", full_page=True)
    assert fits(page)
    assert high(page.locator(".actions button"))
    page.get_by_role("link", name="Herald", exact=True).tap()
    page.get_by_role("link", name=other.accession_number).wait_for()
    page.screenshot(path=pictures / "phone-worklist.png", full_page=True)
    assert fits(page)
    assert page.complaints == []


def test_single_key_shortcuts_can_be_switched_off(chromium, site):
    site.add(1)
    page = open_page(chromium, site, DESKTOP)
    log_in(page)
    page.get_by_role("link", name="ACC00001").click()
    picture_loaded(page)
    page.get_by_text("Keyboard").click()
    page.get_by_label("Use single-key shortcuts").uncheck()
    page.locator("h1").click()
    page.keyboard.press("4")
    assert page.locator("[data-window-name=brain][aria-current]").count() == 1
    page.keyboard.press("ArrowUp")  # not a character: still works
    assert f"Slice {HOTTEST + 2} of" in page.locator("#position").text_content()
    assert site.bus.published == []
