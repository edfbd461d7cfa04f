"""Volumes and pictures that the viewer asks for: true to the prediction, without identity, not for blind readers."""

import gzip
import io
import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from sqlalchemy import select
from webui_site import HOTTEST, SLICES, prediction

from herald.ledger import audit
from herald.picture import MASK_COLOUR
from herald.store import INSTANCE_SUFFIX
from herald.volume import Window
from webui import viewer
from webui.nifti import pack
from webui.picture import Pictures, render

SPACING_MM = (0.9, 0.8)  # of rows, of columns
BETWEEN_MM = 2.5
MATRIX = (180, 200)
PLACEMENT = (-10, 20, 160)
"""Where the square that the model saw lies in the matrix: top, left, side."""
NAME, PATIENT_ID = "Surname^Given", "ID-4711"


def base(event) -> str:
    return f"/series/{event.series_instance_uid}/{event.revision}"


def loaded(answer) -> nibabel.Nifti1Image:
    assert answer.status_code == 200, answer.text
    assert answer.mimetype == "application/gzip"
    return nibabel.Nifti1Image.from_bytes(gzip.decompress(answer.data))


def pixels(answer) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.asarray(Image.open(io.BytesIO(answer.data)).convert("RGB")).astype(int)


def voxels(image: nibabel.Nifti1Image) -> np.ndarray:
    """As we lay it out: slice, row, column."""
    return np.asarray(image.dataobj).transpose(2, 1, 0)


def store_series(site, event, *, count: int = 2 * SLICES, shuffled: bool = True) -> np.ndarray:
    """Original images of a series, (D, H, W) HU, each with one bright pixel of its own; a patient has a name."""
    hounsfield = np.full((count, *MATRIX), 30, np.int16)
    hounsfield[:, :, :10] = -1000  # the patient's right side
    for i in range(count):
        hounsfield[i, 5 + i, 40] = 1000 + i
    order = np.random.default_rng(1).permutation(count) if shuffled else range(count)
    folder = site.store.series_folder(event.study_instance_uid, event.series_instance_uid)
    folder.mkdir(parents=True, exist_ok=True)
    for number, i in enumerate(order):
        ds = Dataset()
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, f"{event.series_instance_uid}.{i}"
        ds.StudyInstanceUID, ds.SeriesInstanceUID = event.study_instance_uid, event.series_instance_uid
        ds.PatientName, ds.PatientID, ds.PatientBirthDate = NAME, PATIENT_ID, "19500102"
        ds.Modality, ds.InstanceNumber = "CT", number + 1
        ds.ImageOrientationPatient, ds.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-80, -90, -40 + BETWEEN_MM * int(i)]
        ds.PixelSpacing = list(SPACING_MM)
        ds.Rows, ds.Columns = MATRIX
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated = ds.BitsStored = 16
        ds.HighBit, ds.PixelRepresentation = 15, 1
        ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
        ds.PixelData = (hounsfield[i] + 1024).astype("<i2").tobytes()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dcmwrite(folder / f"{ds.SOPInstanceUID}{INSTANCE_SUFFIX}", ds, enforce_file_format=True)
    return hounsfield


def analysed(site, finer=1, **changes):
    """A positive series with its originals: two of them in each of the slices of a model that saw `finer` pixels."""
    event = site.add(1, **changes)
    hounsfield = store_series(site, event)
    middles = [f"{event.series_instance_uid}.{2 * k + 1}" for k in range(SLICES)]
    seen = replace(
        prediction(),
        **{name: getattr(prediction(), name).repeat(finer, 1).repeat(finer, 2) for name in ("hounsfield", "mask")},
        placement=np.array([*PLACEMENT, *MATRIX]),
        pixel_spacing_mm=np.array(SPACING_MM),
        sop_instance_uids=np.array(middles),
    )
    site.store.write_prediction(event.study_instance_uid, event.series_instance_uid, 1, seen)
    return event, hounsfield


# --- volumes


def test_the_volume_has_the_hounsfield_units_that_the_model_saw(site):
    image = loaded(site.client("rita").get(base(site.add(1)) + "/volume.nii.gz"))
    assert image.get_data_dtype() == np.int16
    assert (voxels(image) == prediction().hounsfield).all()


def test_the_mask_volume_is_the_probability_of_any_haemorrhage_on_the_same_voxels(site):
    client, event = site.client("rita"), site.add(1)
    mask = loaded(client.get(base(event) + "/mask.nii.gz"))
    assert mask.get_data_dtype() == np.uint8
    assert (voxels(mask) == prediction().mask[..., 0]).all()
    assert (mask.affine == loaded(client.get(base(event) + "/volume.nii.gz")).affine).all()


def test_a_volume_says_where_left_front_and_up_are(site):
    image = loaded(site.client("rita").get(base(site.add(1)) + "/volume.nii.gz"))
    assert nibabel.aff2axcodes(image.affine) == ("L", "P", "S")
    assert np.allclose(image.get_qform(), image.get_sform())
    assert image.header.get_xyzt_units()[0] == "mm"


def test_spacing_is_that_of_the_square_that_the_model_saw_and_of_the_files(site):
    event, _ = analysed(site)
    image = loaded(site.client("rita").get(base(event) + "/volume.nii.gz"))
    scale = PLACEMENT[2] / 256
    assert np.allclose(image.header.get_zooms(), (SPACING_MM[1] * scale, SPACING_MM[0] * scale, 2 * BETWEEN_MM))


def test_the_original_volume_has_every_slice_from_below_to_above_whatever_its_number(site):
    event, hounsfield = analysed(site)
    image = loaded(site.client("rita").get(base(event) + "/original.nii.gz"))
    assert (voxels(image) == hounsfield).all()
    assert np.allclose(image.header.get_zooms(), (SPACING_MM[1], SPACING_MM[0], BETWEEN_MM))


def test_both_volumes_lie_in_the_same_place(site):
    event, _ = analysed(site)
    client = site.client("rita")
    seen, original = (loaded(client.get(f"{base(event)}/{name}.nii.gz")) for name in ("volume", "original"))
    top, left, side = PLACEMENT
    row, column, k = 100, 37, 4  # of the model
    there = seen.affine @ (column, row, k, 1)
    at = np.linalg.inv(original.affine) @ there
    expected = left + (column + 0.5) * side / 256 - 0.5, top + (row + 0.5) * side / 256 - 0.5, 2 * k + 0.5
    assert np.allclose(at[:3], expected, atol=1e-3)


@pytest.mark.parametrize("name", ["volume", "mask", "original"])
def test_a_volume_says_nothing_of_the_patient(site, name):
    event, _ = analysed(site)
    answer = site.client("rita").get(f"{base(event)}/{name}.nii.gz")
    image, raw = loaded(answer), gzip.decompress(answer.data)
    for field in ("descrip", "aux_file", "intent_name", "db_name", "data_type"):
        assert image.header[field].tobytes().strip(b"\0") == b""
    assert len(image.header.extensions) == 0
    for word in (NAME, PATIENT_ID, "19500102", event.series_instance_uid, event.accession_number):
        assert word.encode() not in raw
    assert event.accession_number not in str(answer.headers)
    assert image.affine[2, 3] != -40, "the scanner's own coordinates went along"


def test_an_odd_shape_survives_packing():
    tall = np.arange(3 * 5 * 7, dtype=np.int16).reshape(3, 5, 7) - 50
    raw = gzip.decompress(b"".join(pack(tall, (0.5, 0.6, 3.0), (1.0, 2.0, 4.0))))
    image = nibabel.Nifti1Image.from_bytes(raw)
    assert (voxels(image) == tall).all()
    assert np.allclose(image.affine[:3], [[-0.5, 0, 0, -1], [0, -0.6, 0, -2], [0, 0, 3, 4]])


def test_without_files_slices_are_taken_as_five_millimetres_apart(site):
    image = loaded(site.client("rita").get(base(site.add(1)) + "/volume.nii.gz"))
    assert image.header.get_zooms()[2] == 5


# --- who may see what


@pytest.mark.parametrize("name", ["volume.nii.gz", "mask.nii.gz", "original.nii.gz", "original.json", "coronal/9.png"])
def test_every_address_asks_for_log_in_and_is_kept_by_the_browser_alone(site, name):
    event, _ = analysed(site)
    assert site.client().get(f"{base(event)}/{name}").status_code in (302, 303, 401)
    answer = site.client("rita").get(f"{base(event)}/{name}")
    assert answer.status_code == 200
    assert answer.cache_control.private
    assert not answer.cache_control.public


@pytest.mark.parametrize("name", ["mask.nii.gz", "coronal/9.png?mask=1", "slice/1.png?mask=1&original=1"])
def test_a_blind_reader_gets_no_mask(shadow, name):
    event, _ = analysed(shadow)
    assert shadow.client("rita").get(f"{base(event)}/{name}").status_code == 403
    assert shadow.client("ada").get(f"{base(event)}/{name}").status_code == 200


def test_the_facts_of_a_blind_readers_page_tell_nothing_of_the_prediction(shadow):
    event, _ = analysed(shadow)
    seen, full = facts(shadow.client("rita"), event), facts(shadow.client("ada"), event)
    assert full["hasMask"]
    assert full["mask"]
    assert full["hottest"] == HOTTEST + 1
    assert len(full["probabilities"]) == SLICES
    assert not seen["hasMask"]
    assert not seen["mask"]
    assert seen["probabilities"] == []
    assert seen["focus"] == [0.5, 0.5]
    assert seen["hottest"] == seen["slice"] == SLICES // 2 + 1


def facts(client, event) -> dict:
    return json.loads(unescape(re.search(r'data-facts="([^"]*)"', client.get(base(event)).text)[1]))


def test_who_takes_the_original_images_is_written_down(site):
    event, _ = analysed(site)
    site.client("rita").get(base(event) + "/original.json")
    with site.ledger.read() as connection:
        actions = connection.execute(select(audit.c.action, audit.c.user)).all()
    assert ("view-original", "rita") in [tuple(row) for row in actions]


@pytest.mark.parametrize("name", ["volume.nii.gz", "mask.nii.gz", "original.nii.gz", "coronal/9.png"])
def test_a_series_without_pictures_is_not_found(site, name):
    assert site.client("rita").get(f"{base(site.add(3, 'failed'))}/{name}").status_code == 404


def test_a_negative_has_a_mask_and_an_unanalysed_series_has_none(site):
    client = site.client("rita")
    assert loaded(client.get(base(site.add(2, "negative")) + "/mask.nii.gz")).get_fdata().max() == 0
    event = site.add(3, "not_eligible")
    store_series(site, event)
    assert client.get(base(event) + "/mask.nii.gz").status_code == 404
    assert loaded(client.get(base(event) + "/volume.nii.gz")).shape[2] == 9
    assert loaded(client.get(base(event) + "/original.nii.gz")).shape[2] == 2 * SLICES


def test_original_images_that_do_not_fit_the_revision_are_refused_in_words(site):
    event, _ = analysed(site)
    store_series(site, event, count=2 * SLICES + 3)
    answer = site.client("rita").get(base(event) + "/original.json")
    assert answer.status_code == 404
    assert f"has {2 * SLICES + 3} slices now, {2 * SLICES} were analysed" in answer.json["error"]
    assert site.client("rita").get(base(event) + "/original.nii.gz").status_code == 404


def test_the_original_says_how_its_slices_are_called(site):
    event, _ = analysed(site)
    told = site.client("rita").get(base(event) + "/original.json").json
    assert told["numbers"] == [str(n) for n in range(1, 2 * SLICES + 1)]
    assert told["shape"] == [2 * SLICES, *MATRIX]


# --- pictures


def test_a_picture_takes_any_window(site):
    client, event = site.client("rita"), site.add(1)
    named, told = (client.get(f"{base(event)}/slice/6.png?{q}") for q in ("window=subdural", "center=75&width=200"))
    assert named.data == told.data
    assert client.get(f"{base(event)}/slice/6.png?center=75&width=90").data != told.data


@pytest.mark.parametrize(
    "query", ["center=0&width=0", "center=nan&width=80", "center=40&width=1e9", "mask=1&opacity=2"]
)
def test_a_window_or_tint_that_is_none_is_not_found(site, query):
    assert site.client("rita").get(f"{base(site.add(1))}/slice/6.png?{query}").status_code == 404


def test_the_tint_of_the_mask_grows_and_its_outline_stays(site):
    client, event = site.client("rita"), site.add(1)
    plain, faint, full = (
        pixels(client.get(f"{base(event)}/slice/{HOTTEST + 1}.png?{q}"))
        for q in ("mask=0", "mask=1&opacity=0", "mask=1&opacity=0.8")
    )
    outline = (faint == MASK_COLOUR).all(axis=-1)
    assert outline.sum() > 100
    assert (faint[~outline] == plain[~outline]).all()
    inside = full[216, 344] - plain[216, 344]
    assert inside[1] < -60  # the bleed turns from white to magenta
    assert (full == MASK_COLOUR).all(axis=-1)[outline].all()


def test_coronal_and_sagittal_cuts_are_seen_from_the_front_and_with_the_nose_on_the_left(site):
    stack = Pictures(site.store).stack(site.add(1))
    hounsfield = np.full(stack.hounsfield.shape, -1000, np.int16)
    hounsfield[SLICES - 1, 100, 30] = 3000  # high up, to the patient's right, ahead of the middle
    stack = replace(stack, hounsfield=hounsfield, spacing_mm=(1.0, 1.0, 5.0))
    wide = Window(0, 2000)
    for plane, index, across in (("coronal", 100, 30), ("sagittal", 30, 100)):
        picture = np.asarray(Image.open(io.BytesIO(render(stack, index, wide, mask=False, plane=plane))))
        assert picture.shape == (round(512 * 5 * SLICES / 256), 512)
        row, column = np.unravel_index(picture.argmax(), picture.shape)
        assert abs(column - 2 * across) < 4
        assert row < picture.shape[0] / SLICES


@pytest.mark.parametrize("finer", [1, 2])
def test_the_mask_lies_over_the_original_where_it_lies_over_what_the_model_saw(site, finer):
    event, _ = analysed(site, finer)
    client = site.client("rita")
    seen = client.get(f"{base(event)}/slice/{HOTTEST + 1}.png?mask=1&opacity=0")
    original = client.get(f"{base(event)}/slice/{2 * HOTTEST + 1}.png?mask=1&opacity=0&original=1")
    top, left, side = PLACEMENT
    rows, columns = np.nonzero((pixels(seen) == MASK_COLOUR).all(axis=-1))
    there = np.nonzero((pixels(original) == MASK_COLOUR).all(axis=-1))
    # pictures are 512 on their longer side: of 256 rows, and of 180 rows at 0.9 mm by 200 columns at 0.8 mm
    scale = 512 / max(MATRIX[0] * SPACING_MM[0], MATRIX[1] * SPACING_MM[1])
    size = Image.open(io.BytesIO(seen.data)).size
    row = (rows.mean() / size[1] * side + top) * SPACING_MM[0] * scale
    column = (columns.mean() / size[0] * side + left) * SPACING_MM[1] * scale
    assert abs(there[0].mean() - row) < 6
    assert abs(there[1].mean() - column) < 6


@pytest.mark.parametrize("plane", ["coronal", "sagittal"])
def test_cuts_of_the_original_show_the_mask_too(site, plane):
    event, _ = analysed(site)
    client = site.client("rita")
    across = {"coronal": PLACEMENT[0] + 108 * 160 / 256, "sagittal": PLACEMENT[1] + 172 * 160 / 256}[plane]
    picture = pixels(client.get(f"{base(event)}/{plane}/{round(across)}.png?mask=1&original=1"))
    assert (picture == MASK_COLOUR).all(axis=-1).sum() > 50


def test_a_localizer_has_pictures_but_no_volume_and_no_other_planes(site, monkeypatch):
    event = site.add(3, "not_eligible")
    store_series(site, event)
    stack = replace(Pictures(site.store).stack(event), orientation="coronal")
    monkeypatch.setattr(Pictures, "stack", lambda *_: stack)
    client = site.client("rita")
    assert client.get(base(event) + "/slice/1.png").status_code == 200
    assert client.get(base(event) + "/volume.nii.gz").status_code == 404
    assert client.get(base(event) + "/coronal/1.png").status_code == 404
    told = facts(client, event)
    assert [told[name] for name in ("axial", "volume", "lettered")] == [False] * 3


# --- honesty


def test_sides_are_not_lettered_when_the_header_does_not_say_them(site):
    assert facts(site.client("rita"), site.add(1))["lettered"]
    event = site.add(2, notes=("ImageOrientationPatient is missing; taken as axial",))
    assert not facts(site.client("rita"), event)["lettered"]


@pytest.mark.parametrize("built", [True, False])
def test_the_page_says_when_the_volume_viewer_is_not_built(site, tmp_path, monkeypatch, built):
    bundle = tmp_path / "niivue.js"
    monkeypatch.setattr(viewer, "VOLUME_VIEWER", bundle)
    if built:
        bundle.touch()
    event = site.add(1)
    page = site.client("rita").get(base(event)).text
    assert ("not built on this node" in page) != built
    assert facts(site.client("rita"), event)["volume"] == built


def test_the_lock_file_names_a_checksum_for_every_package_and_no_registry():
    lock = json.loads((Path(__file__).parents[1] / "deploy/viewer/package-lock.json").read_text())
    packages = {name: entry for name, entry in lock["packages"].items() if name}
    assert "node_modules/@niivue/niivue" in packages
    assert all(entry["integrity"].startswith("sha512-") for entry in packages.values())
    assert "resolved" not in json.dumps(lock)
