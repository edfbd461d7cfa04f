"""The volume viewer in a real Chromium with WebGL on the processor, and the same page in one without WebGL."""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from conftest import ARGUMENTS, CHROMIUM
from PIL import Image
from test_webui_viewer import analysed, base
from webui_browser import DESKTOP, PHONE, fits, log_in, open_page
from webui_site import HOTTEST, SLICES, Site, open_site, served

from webui.viewer import VOLUME_VIEWER

sync_api = pytest.importorskip("playwright.sync_api")

WEBGL = (
    *(argument for argument in ARGUMENTS if argument != "--disable-gpu"),
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
)
NO_WEBGL = (*ARGUMENTS, "--disable-3d-apis")
PATIENCE_MS = 120_000  # WebGL on a busy processor


@pytest.fixture(scope="module")
def browsers() -> Iterator[Any]:
    """Opens Chromium with given arguments, each once."""
    missing = [name for name in (str(VOLUME_VIEWER), CHROMIUM) if not Path(name).exists()]
    if missing:
        message = f"no {' and '.join(missing)}; `make viewer tools` installs them"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    opened: dict[tuple[str, ...], Any] = {}
    with sync_api.sync_playwright() as playwright:

        def launch(arguments: tuple[str, ...]) -> Any:
            if arguments not in opened:
                opened[arguments] = playwright.chromium.launch(executable_path=CHROMIUM, args=list(arguments))
            return opened[arguments]

        yield launch
        for browser in opened.values():
            browser.close()


@pytest.fixture
def site(tmp_path) -> Iterator[Site]:
    with open_site(tmp_path) as site, served(site) as running:
        yield running


def open_series(browser, site: Site, event, viewport=DESKTOP, query: str = "", *, volume: bool = True):
    page = open_page(browser, site, viewport, "/login")
    page.set_default_timeout(PATIENCE_MS)
    page.hosts = set()
    page.on("request", lambda asked: page.hosts.add(urlsplit(asked.url).netloc))
    log_in(page)
    page.wait_for_url("**/")
    page.goto(f"{base(event)}{query}")
    if volume:
        page.locator("#stage.volume").wait_for()
    else:
        sync_api.expect(page.locator("#planes")).to_be_visible()
    return page


def shot(page, selector: str = "#stage") -> np.ndarray:
    """What is on the screen, (rows, columns, RGB), without the letters and lines over it."""
    marks = page.locator(".marks")
    marks.evaluate("marks => marks.style.visibility = 'hidden'")
    # two frames: the first may still be on its way
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    png = page.locator(selector).screenshot()
    marks.evaluate("marks => marks.style.visibility = ''")
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def settled(page) -> None:
    """Every picture that was asked for is there."""
    page.evaluate("Promise.all([...document.querySelectorAll('img.plane')].filter(i => i.src).map(i => i.decode()))")


def served_picture(site: Site, event, query: str, shape) -> np.ndarray:
    """Our own rendering of the hottest slice, at the size of the stage."""
    answer = site.client("rita").get(f"{base(event)}/slice/{HOTTEST + 1}.png?{query}")
    picture = Image.open(io.BytesIO(answer.data)).convert("RGB").resize(shape[1::-1], Image.Resampling.BILINEAR)
    return np.asarray(picture).astype(int)


def blurred(picture: np.ndarray) -> np.ndarray:
    """Means of squares of eight pixels: what two ways to interpolate agree on."""
    rows, columns = (side // 8 * 8 for side in picture.shape[:2])
    return picture[:rows, :columns].reshape(rows // 8, 8, columns // 8, 8, 3).mean(axis=(1, 3))


def test_the_volume_shows_what_the_picture_showed_in_the_same_place(browsers, site, pictures):
    event = site.add(1)
    page = open_series(browsers(WEBGL), site, event)
    page.screenshot(path=pictures / "volume.png", full_page=True)
    drawn = shot(page)
    for query, key in (("window=brain&mask=1", ""), ("window=brain&mask=0", "m"), ("window=bone&mask=0", "4")):
        if key:
            page.keyboard.press(key)
            drawn = shot(page)
        expected = served_picture(site, event, query, drawn.shape)
        apart = np.abs(blurred(drawn) - blurred(expected))
        assert apart.mean() < 4, query
        assert apart.mean() < np.abs(blurred(drawn) - blurred(expected[:, ::-1])).mean() / 2, "mirrored"
    page.keyboard.press("1")
    grey = shot(page)[..., 1]
    rows, columns = grey.shape
    at = [round(0.675 * columns), round(0.425 * rows)]  # the bleed: 68 HU, to the patient's left
    assert grey[at[1], at[0]] > 190
    assert grey[at[1], columns - at[0]] < 160
    assert page.complaints == []
    assert page.hosts == {urlsplit(site.config.webui.public_url).netloc}


def test_keys_pointer_and_sliders_work_on_the_volume(browsers, site, pictures):
    event = site.add(1)
    page = open_series(browsers(WEBGL), site, event)
    position, levels = page.locator("#position"), page.locator("#levels")

    before = shot(page)
    page.keyboard.press("ArrowUp")
    sync_api.expect(position).to_contain_text(f"Slice {HOTTEST + 2} of {SLICES} (original 17–18)")
    assert (shot(page) != before).any()
    page.locator("#stage").hover()
    page.mouse.wheel(0, 100)
    sync_api.expect(position).to_contain_text(f"Slice {HOTTEST + 1} of")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("h")
    sync_api.expect(position).to_contain_text(f"Slice {HOTTEST + 1} of")
    assert np.abs(shot(page) - before).mean() < 0.5

    for key, said in (("2", "W 200 L 75"), ("3", "W 40 L 40"), ("4", "W 2800 L 600"), ("1", "W 80 L 40")):
        page.keyboard.press(key)
        sync_api.expect(levels).to_have_text(said)
    for button in ("left", "right"):
        drag(page, 60, -50, button)
        said = levels.text_content()
        width, level = int(said.split()[1]), int(said.split()[3])
        assert width > 85  # to the right is wider
        assert level > 45  # up is higher
        assert page.locator("[data-window-name][aria-current]").count() == 0
        assert (shot(page) != before).mean() > 0.1
        page.keyboard.press("r")
        sync_api.expect(levels).to_have_text("W 80 L 40")
    drag(page, -20, 10, "left")
    page.locator("#stage").dblclick()
    sync_api.expect(levels).to_have_text("W 80 L 40")

    inside = np.s_[round(0.425 * before.shape[0]), round(0.675 * before.shape[1])]
    tints = []
    for opacity in ("0", "80"):
        page.locator("#opacity").fill(opacity)
        tints.append(shot(page)[inside])
    assert tints[0].max() - tints[0].min() < 12, "the bleed is not grey where only the outline is drawn"
    assert tints[1][0] - tints[1][1] > 80
    page.screenshot(path=pictures / "volume-tint.png")
    assert page.complaints == []


def drag(page, right: float, down: float, button: str) -> None:
    box = page.locator("#stage").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down(button=button)
    page.mouse.move(x + right / 2, y + down / 2)
    page.mouse.move(x + right, y + down)
    page.mouse.up(button=button)


def letters(page) -> str:
    return "".join(page.locator(".marks text").all_text_contents())


@pytest.mark.parametrize("webgl", [True, False], ids=["volume", "pictures"])
def test_three_planes_are_linked_by_a_cross_and_the_original_images_come_on_demand(browsers, site, pictures, webgl):
    event, _ = analysed(site)
    page = open_series(browsers(WEBGL if webgl else NO_WEBGL), site, event, volume=webgl)
    name = "volume" if webgl else "pictures"
    position = page.locator("#position")
    settled(page)
    sync_api.expect(page.locator(".marks text")).to_have_count(4)
    assert letters(page) == "RLAP"

    page.keyboard.press("p")
    settled(page)
    sync_api.expect(page.locator(".marks line")).to_have_count(6)
    assert letters(page) == "RLAPRLSIAPSI"
    page.screenshot(path=pictures / f"{name}-planes.png", full_page=True)
    stage = shot(page)
    half = stage.shape[1] * 2 // 3
    coronal = stage[: stage.shape[0] // 2, half:]
    found = coronal.max(axis=-1) > 200
    assert found.any(), "nothing in the coronal plane"
    # a click above the middle of the coronal plane goes to a higher slice
    box = page.locator("#stage").bounding_box()
    tile = page.evaluate(
        "[...document.querySelectorAll('.marks line')].slice(2, 4).map(l => ['x1','x2','y1','y2']"
        ".map(a => Number(l.getAttribute(a))))"
    )
    (_, _, top, bottom), (left, right, _, _) = tile
    page.mouse.click(box["x"] + (left + right) / 2, box["y"] + top + 0.04 * (bottom - top) + 1)
    sync_api.expect(position).to_contain_text(f"Slice {SLICES} of {SLICES}")
    page.mouse.click(box["x"] + (left + right) / 2, box["y"] + bottom - 2)
    sync_api.expect(position).to_contain_text(f"Slice 1 of {SLICES}")
    page.keyboard.press("h")
    page.keyboard.press("p")

    page.keyboard.press("o")
    sync_api.expect(position).to_contain_text(f"Original slice {2 * HOTTEST + 2} of {2 * SLICES}, haemorrhage 93 %")
    settled(page)
    page.screenshot(path=pictures / f"{name}-original.png")
    assert page.locator("#slice").get_attribute("max") == str(2 * SLICES)
    # each original has one bright pixel of its own, here in row 5 + 15, column 40 of 180 x 200 at 0.9 x 0.8 mm
    page.keyboard.press("4")
    settled(page)
    grey = shot(page)[..., 1]
    rows, columns = grey.shape
    row, column = 20.5 / 180, 40.5 / 200
    tall = 160 / 162  # width by height of the matrix
    at = round(row * rows), round((column * tall + (1 - tall) / 2) * columns)
    near = grey[at[0] - 4 : at[0] + 5, at[1] - 4 : at[1] + 5]
    assert near.max() > grey[rows // 2, columns // 2] + 25
    page.keyboard.press("ArrowUp")
    sync_api.expect(position).to_contain_text(f"Original slice {2 * HOTTEST + 3} of {2 * SLICES}")
    page.keyboard.press("o")
    sync_api.expect(position).to_contain_text(f"Slice {HOTTEST + 2} of {SLICES} (original 17–18)")
    assert page.complaints == []
    assert page.hosts == {urlsplit(site.config.webui.public_url).netloc}


def test_without_webgl_pictures_answer_to_the_same_keys(browsers, site, pictures):
    event = site.add(1)
    page = open_series(browsers(NO_WEBGL), site, event, volume=False)
    sync_api.expect(page.locator("#viewer-note")).to_contain_text("no WebGL 2")
    page.keyboard.press("o")  # the store of this site holds no files
    sync_api.expect(page.locator("#viewer-note")).to_contain_text("The original images cannot be shown")
    page.complaints.clear()  # the browser notes the answer 404
    assert page.locator("#volume").count() == 0
    levels = page.locator("#levels")
    settled(page)
    before = shot(page)
    drag(page, 60, -50, "right")
    settled(page)
    assert levels.text_content() != "W 80 L 40"
    assert (shot(page) != before).mean() > 0.1
    page.keyboard.press("r")
    settled(page)
    assert (shot(page) == before).all()
    inside = np.s_[round(0.425 * before.shape[0]), round(0.675 * before.shape[1])]
    page.locator("#opacity").fill("80")
    settled(page)
    assert shot(page)[inside][0] - shot(page)[inside][1] > 80
    page.keyboard.press("m")
    assert "mask=0" in page.locator("#picture").get_attribute("src")
    assert page.complaints == []


def test_when_the_graphics_context_is_lost_pictures_take_over(browsers, site):
    event = site.add(1)
    page = open_series(browsers(WEBGL), site, event)
    before = shot(page)
    page.evaluate(
        "document.getElementById('volume').getContext('webgl2').getExtension('WEBGL_lose_context').loseContext()"
    )
    sync_api.expect(page.locator("#viewer-note")).to_contain_text("slices are shown as pictures")
    assert page.locator("#stage.volume").count() == 0
    settled(page)
    assert np.abs(blurred(shot(page)) - blurred(before)).mean() < 4
    page.keyboard.press("ArrowUp")
    sync_api.expect(page.locator("#position")).to_contain_text(f"Slice {HOTTEST + 2} of")


def test_a_blind_reader_sees_the_volume_without_mask(browsers, tmp_path, pictures):
    with open_site(tmp_path, mode="shadow") as opened, served(opened) as site:
        event = site.add(1)
        page = open_series(browsers(WEBGL), site, event, query=f"?slice={HOTTEST + 1}")
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        before = shot(page)
        assert np.abs(blurred(before) - blurred(served_picture(site, event, "window=brain", before.shape))).mean() < 4
        inside = before[:-2]  # the caption begins within the last row
        assert (inside.max(axis=-1) - inside.min(axis=-1)).max() < 12, "something is coloured"
        for key in ("m", "h"):
            page.keyboard.press(key)
        assert (shot(page) == before).all()
        page.screenshot(path=pictures / "volume-blind.png")
        assert page.locator("#opacity, #mask, #hottest").count() == 0
        assert not [url for url in asked if "mask" in url]
        assert page.complaints == []


def test_the_viewer_fits_a_phone(browsers, site, pictures):
    event = site.add(1)
    page = open_series(browsers(WEBGL), site, event, PHONE)
    page.screenshot(path=pictures / "phone-volume.png", full_page=True)
    assert fits(page)
    page.get_by_role("button", name="Three planes").click()
    sync_api.expect(page.locator(".marks line")).to_have_count(6)
    page.screenshot(path=pictures / "phone-planes.png", full_page=True)
    assert fits(page)
    box = page.locator("#stage").bounding_box()
    assert box["height"] > box["width"] > 300
    assert page.complaints == []
