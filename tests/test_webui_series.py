import io
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from sqlalchemy import select
from webui_site import HOTTEST, SLICES, add_page, prediction, triaged

from herald.ledger import audit, results, reviews
from herald.picture import MASK_COLOUR
from webui.picture import MIDDLE_SLICES, Pictures, render


def address(event) -> str:
    return f"/series/{event.series_instance_uid}/{event.revision}"


def kept_reviews(site) -> list:
    with site.ledger.read() as connection:
        return list(connection.execute(select(reviews).order_by(reviews.c.occurred_at)).mappings())


def pixels(answer) -> np.ndarray:
    assert answer.mimetype == "image/png"
    return np.asarray(Image.open(io.BytesIO(answer.data)).convert("RGB")).astype(int)


# --- pictures


def test_the_page_opens_at_the_hottest_slice_with_its_original_numbers(site):
    page = site.client("rita").get(address(site.add(1))).text
    assert f"Slice {HOTTEST + 1} of {SLICES} (original 15–16), haemorrhage 93 %" in page
    assert f"/slice/{HOTTEST + 1}.png?window=brain&amp;mask=1" in page


def test_a_slice_is_windowed_and_the_mask_is_outlined_over_it(site):
    client, base = site.client("rita"), address(site.add(1)) + f"/slice/{HOTTEST + 1}.png"
    plain, masked = pixels(client.get(base)), pixels(client.get(base + "?mask=1"))
    assert plain.shape == (512, 512, 3)
    assert (plain[..., 0] == plain[..., 1]).all()  # grey
    assert abs(int(plain[400, 256, 0]) - round((34 - 0) / 80 * 255)) < 25  # brain at 34 HU, window 80/40
    changed = (plain != masked).any(axis=-1)
    rows, columns = np.nonzero((masked == MASK_COLOUR).all(axis=-1))
    assert len(rows) > 100
    assert (abs(rows.mean() - 216), abs(columns.mean() - 344)) < (10, 10)  # around the bleed, at twice the matrix
    assert changed.mean() < 0.1
    bone = pixels(client.get(base + "?window=bone"))
    assert bone[400, 256, 0] < plain[400, 256, 0]


@pytest.mark.parametrize("window", ["brain", "subdural", "stroke", "bone"])
def test_every_window_gives_another_picture_of_the_same_slice(site, window):
    client, base = site.client("rita"), address(site.add(1)) + "/slice/6.png"
    picture = pixels(client.get(f"{base}?window={window}"))
    others = [pixels(client.get(f"{base}?window={w}")) for w in ("brain", "subdural", "stroke", "bone") if w != window]
    assert all((picture != other).any() for other in others)


@pytest.mark.parametrize("path", ["slice/0.png", f"slice/{SLICES + 1}.png", "slice/1.png?window=liver", "slice/-1.png"])
def test_a_slice_or_window_that_is_not_there_is_not_found(site, path):
    assert site.client("rita").get(f"{address(site.add(1))}/{path}").status_code == 404


def test_a_prediction_written_again_is_shown_anew(site):
    event = site.add(1)
    pictures = Pictures(site.store)
    first = pictures.stack(event)
    assert pictures.stack(event) is first
    site.store.write_prediction(event.study_instance_uid, event.series_instance_uid, 1, prediction("negative"))
    assert pictures.stack(event) is not first
    assert pictures.stack(event).mask.max() == 0


def test_a_picture_keeps_the_shape_of_the_body_when_pixels_are_not_square(site):
    event = site.add(1)
    stack = replace(Pictures(site.store).stack(event), aspect=0.5)
    assert Image.open(io.BytesIO(render(stack, 0, "brain", mask=False))).size == (512, 256)


def test_a_prediction_of_a_model_that_saw_more_pixels_lies_in_the_same_place(site):
    event = site.add(1)
    usual = Pictures(site.store).stack(event)
    coarse = prediction("positive")
    fine = {name: getattr(coarse, name).repeat(2, axis=1).repeat(2, axis=2) for name in ("hounsfield", "mask")}
    site.store.write_prediction(event.study_instance_uid, event.series_instance_uid, 1, replace(coarse, **fine))
    stack = Pictures(site.store).stack(event)
    for axis in (0, 1):
        assert stack.spacing_mm[axis] * 2 == usual.spacing_mm[axis]
        edges = (stack.origin_mm[axis] - stack.spacing_mm[axis] / 2, usual.origin_mm[axis] - usual.spacing_mm[axis] / 2)
        assert edges[0] == pytest.approx(edges[1])
    seen = (HOTTEST, slice(None, None, 2), slice(None, None, 2))
    assert (stack.mask[seen] == usual.mask[HOTTEST]).all()


def write_series(site, event, count: int, *, pixel_data: bool = True, value: int = 1024 + 40) -> None:
    for number in range(1, count + 1):
        ds = Dataset()
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, f"{event.series_instance_uid}.{number}"
        ds.Modality, ds.InstanceNumber = "CT", number
        ds.ImagePositionPatient, ds.ImageOrientationPatient = [0, 0, 5.0 * number], [1, 0, 0, 0, 1, 0]
        ds.PixelSpacing, ds.RescaleSlope, ds.RescaleIntercept = [0.5, 0.5], 1, -1024
        ds.Rows = ds.Columns = 64
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        if pixel_data:
            ds.PixelData = np.full((64, 64), value, np.uint16).tobytes()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        buffer = io.BytesIO()
        dcmwrite(buffer, ds, enforce_file_format=True)
        site.store.write_instance(
            event.study_instance_uid, event.series_instance_uid, ds.SOPInstanceUID, [buffer.getvalue()]
        )


def test_of_a_series_that_was_not_analysed_the_middle_slices_are_shown(site):
    event = site.add(1, "not_eligible")
    write_series(site, event, 21)
    client = site.client("rita")
    page = client.get(address(event)).text
    assert f"Slice 5 of {MIDDLE_SLICES} (original 11)" in page
    assert "Not analysed for haemorrhage: 9 middle slices" in page
    assert "haemorrhage 9" not in page
    picture = pixels(client.get(address(event) + "/slice/5.png"))
    assert abs(picture - 128).max() <= 1  # 40 HU is the centre of the brain window


def test_a_series_without_brain_opens_at_the_bone_window(site):
    brain, air = site.add(1, "not_eligible"), site.add(2, "not_eligible")
    write_series(site, brain, 3)
    write_series(site, air, 3, value=0)
    client = site.client("rita")
    assert ".png?window=brain&amp;" in client.get(address(brain)).text
    assert ".png?window=bone&amp;" in client.get(address(air)).text
    assert ".png?window=stroke&amp;" in client.get(address(air) + "?window=stroke").text


def test_a_series_that_cannot_be_rendered_says_why(site):
    gone, empty = site.add(1, "failed"), site.add(2, "failed")
    write_series(site, empty, 1, pixel_data=False)
    client = site.client("rita")
    assert "the store holds no file of this series" in client.get(address(gone)).text
    assert "has no PixelData" in client.get(address(empty)).text
    assert client.get(address(gone) + "/slice/1.png").status_code == 404


# --- facts


def test_the_page_shows_pixels_beside_the_header_findings_and_latencies(site):
    page = re.sub(r"\s+", " ", site.client("rita").get(address(site.add(1))).text)
    for text in ("soft tissue", "bone <span", "differs", "says nothing", "Intraparenchymal", "11.4 ml", "gantry tilt"):
        assert text in page
    assert "Searched for haemorrhage" in page
    assert "<td>3.2 s</td><td>4.8 s</td>" in page


def test_pages_of_the_study_are_shown_with_their_state(site):
    event = site.add(1)
    add_page(site.ledger, event, recipient="neuro@example.org")
    page = site.client("rita").get(address(event)).text
    assert "neuro@example.org" in page
    assert "sent, not acknowledged" in page
    assert "Page 1 sent" in page


def test_an_older_revision_says_that_it_is_superseded_and_leads_to_the_newer(site):
    event = site.add(1)
    newer = site.add(1, "negative", revision=2)
    client = site.client("rita")
    page = client.get(address(event)).text
    assert "revision 2 supersedes this revision 1" in page
    assert f'href="{address(newer)}"' in page
    assert "supersedes" not in client.get(address(newer)).text
    assert client.get(f"/series/{event.series_instance_uid}").location == address(newer)


def test_a_finding_that_a_newer_revision_does_not_settle_says_that_it_stays_on_the_worklist(site):
    event = site.add(1)
    newer = site.add(1, "failed", revision=2)
    page = site.client("rita").get(address(event)).text
    assert (
        "revision 2 was not analysed, so this revision 1 stays on the worklist until somebody has acknowledged it"
        in page
    )
    assert f'href="{address(newer)}"' in page
    assert "supersedes" not in page


@pytest.mark.parametrize(
    "path", ["/series/1.2.3", "/series/1.2.3/1", "/series/..%2f..%2fetc/1", "/series/1.2.3/1/slice/1.png"]
)
def test_an_unknown_series_is_not_found(site, path):
    answer = site.client("rita").get(path)
    assert answer.status_code == 404
    assert "There is nothing here" in answer.text


def test_a_view_of_a_series_is_audited_once_and_its_slices_are_not(site):
    event = site.add(1)
    client = site.client("rita")
    client.get(address(event))
    client.get(address(event) + "/slice/1.png")
    with site.ledger.read() as connection:
        rows = connection.execute(select(audit).where(audit.c.action == "view-series")).mappings().all()
    assert [(row["user"], row["address"], row["series_instance_uid"]) for row in rows] == [
        ("rita", "127.0.0.1", event.series_instance_uid)
    ]


# --- review


@pytest.mark.parametrize("verdict", ["acknowledge", "agree", "disagree", "unsure"])
def test_a_review_is_kept_and_acknowledges_the_study(site, verdict):
    event = site.add(1)
    other = replace(triaged(1, "negative"), series_instance_uid=event.series_instance_uid + "9")
    site.put(other)
    site.put(triaged(2))
    form = {"verdict": verdict, "finding_kind": "sah", "note": " left ", **site.shown(event)}
    answer = site.client("rita").post(address(event) + "/review", data=form)
    assert (answer.status_code, answer.location) == (303, address(event))
    (row,) = kept_reviews(site)
    assert (row["action"], row["finding_kind"], row["note"], row["reader"]) == (verdict, "sah", "left", "rita")
    assert row["prediction_shown"] is True
    with site.ledger.read() as connection:
        by = dict(connection.execute(select(results.c.series_instance_uid, results.c.acknowledged_by)).all())
    assert by == {
        event.series_instance_uid: "rita",
        other.series_instance_uid: "rita",
        triaged(2).series_instance_uid: None,
    }


def test_a_review_of_an_older_revision_leaves_the_newer_to_be_acknowledged(site):
    event = site.add(1)
    newer = site.add(1, revision=2)
    site.client("rita").post(address(event) + "/review", data={"verdict": "agree", **site.shown(event)})
    with site.ledger.read() as connection:
        by = dict(connection.execute(select(results.c.revision, results.c.acknowledged_by)).all())
    assert by == {1: "rita", newer.revision: None}


def test_the_first_acknowledgement_stays_when_others_follow(site):
    event = site.add(1)
    site.client("rita").post(address(event) + "/review", data={"verdict": "acknowledge", **site.shown(event)})
    site.client("ada").post(address(event) + "/review", data={"verdict": "disagree", **site.shown(event)})
    assert [row["reader"] for row in kept_reviews(site)] == ["rita", "ada"]
    with site.ledger.read() as connection:
        assert connection.execute(select(results.c.acknowledged_by)).scalar_one() == "rita"


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"verdict": "maybe"},
        {"verdict": "agree", "finding_kind": "tumour"},
        {"verdict": "agree", "note": "x" * 2001},
    ],
)
def test_a_review_that_makes_no_sense_is_refused(site, form):
    event = site.add(1)
    answer = site.client("rita").post(address(event) + "/review", data={**form, **site.shown(event)})
    assert answer.status_code == 400
    assert kept_reviews(site) == []


# --- shadow mode


@pytest.mark.parametrize("disposition", ["positive", "negative"])
def test_in_shadow_mode_the_page_tells_a_reader_nothing_before_the_verdict(shadow, disposition):
    event = shadow.add(1, disposition)
    client = shadow.client("rita")
    page = client.get(address(event)).text
    for telling in ("Positive", "Negative", "93 %", "haemorrhage 9", "11.4 ml", "mask=1", "Hottest", 'class="strip"'):
        assert telling not in page
    assert f"Slice {SLICES // 2 + 1} of {SLICES}" in page  # the middle, not the hottest
    assert client.get(address(event) + "/slice/8.png?mask=1").status_code == 403
    assert client.get(address(event) + "/slice/8.png").status_code == 200
    assert client.post(address(event) + "/review", data={"verdict": "agree", **shadow.shown(event)}).status_code == 400


def test_in_shadow_mode_pages_look_the_same_for_either_prediction(shadow):
    client = shadow.client("rita")
    seen = []
    for number, disposition in ((1, "positive"), (2, "negative")):
        page = client.get(address(shadow.add(number, disposition))).text
        page = page.replace(f"498.{number}", "498.N").replace(f"ACC0000{number}", "ACC")
        seen.append(
            re.sub(r"[\d:.+-]*T?[\d:.+-]+ (UTC|s|min)|\d{4}-\d\d-\d\dT[\d:.+]+|value=\"\w[\w.-]{60,}\"", "", page)
        )
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("disposition", "verdict", "action", "kind"),
    [
        ("positive", "haemorrhage", "agree", "any"),
        ("positive", "no_haemorrhage", "disagree", None),
        ("negative", "haemorrhage", "disagree", "any"),
        ("negative", "no_haemorrhage", "agree", None),
        ("negative", "unsure", "unsure", None),
    ],
)
def test_in_shadow_mode_a_verdict_is_compared_with_the_hidden_prediction_and_reveals_it(
    shadow, disposition, verdict, action, kind
):
    event = shadow.add(1, disposition)
    client = shadow.client("rita")
    client.post(address(event) + "/review", data={"verdict": verdict, **shadow.shown(event)})
    (row,) = kept_reviews(shadow)
    assert (row["action"], row["finding_kind"], row["prediction_shown"]) == (action, kind, False)
    page = client.get(address(event)).text
    assert disposition.capitalize() in page
    assert "mask=1" in page
    client.post(address(event) + "/review", data={"verdict": "unsure", **shadow.shown(event)})
    assert kept_reviews(shadow)[1]["prediction_shown"] is True


def test_in_shadow_mode_to_acknowledge_is_no_verdict_and_reveals_nothing(shadow):
    event = shadow.add(1)
    client = shadow.client("rita")
    client.post(address(event) + "/review", data={"verdict": "acknowledge", **shadow.shown(event)})
    assert "Positive" not in client.get(address(event)).text


@pytest.mark.parametrize("who", ["remi", "ada"])
def test_in_shadow_mode_researchers_and_administrators_see_all(shadow, who):
    page = shadow.client(who).get(address(shadow.add(1))).text
    assert "Positive" in page
    assert "93 %" in page


def test_in_shadow_mode_another_readers_verdict_is_hidden_too(shadow):
    event = shadow.add(1)
    shadow.client("ada").post(
        address(event) + "/review", data={"verdict": "agree", "note": "seen by ada", **shadow.shown(event)}
    )
    assert "seen by ada" not in shadow.client("rita").get(address(event)).text
