"""What is not eligible without asking a model, and why."""

from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, SecondaryCaptureImageStorage, XRayRadiationDoseSRStorage

from router.eligibility import axial_candidates


def instance(sop_class: str = CTImageStorage, image_type: str = "AXIAL", **elements: object) -> Dataset:
    ds = Dataset()
    ds.SOPClassUID = sop_class
    ds.ImageType = ["ORIGINAL", "PRIMARY", image_type]
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


def test_enough_axial_ct_images_are_candidates() -> None:
    slices, obstacles = axial_candidates([instance()] * 20, 8, 2000)
    assert len(slices) == 20
    assert obstacles == ()


def test_a_localizer_is_not_eligible() -> None:
    assert "localizer: 2 scout images" in axial_candidates([instance(image_type="LOCALIZER")] * 2, 8, 2000)[1][0]


def test_a_scout_within_an_axial_series_is_set_aside() -> None:
    slices, obstacles = axial_candidates([instance(image_type="LOCALIZER")] + [instance()] * 8, 8, 2000)
    assert len(slices) == 8
    assert obstacles == ()


def test_a_screen_capture_is_named_as_what_it_is() -> None:
    reasons = axial_candidates([instance(SecondaryCaptureImageStorage)] * 2, 8, 2000)[1]
    assert reasons == ("not a CT image: 2 x Secondary Capture Image Storage",)


def test_a_dose_report_is_not_eligible() -> None:
    assert "Dose SR" in axial_candidates([instance(XRayRadiationDoseSRStorage)], 8, 2000)[1][0]


def test_two_slices_are_too_few_and_the_setting_is_named() -> None:
    reason = axial_candidates([instance()] * 2, 8, 2000)[1][0]
    assert "too few slices: 2" in reason
    assert "router.min_slices" in reason


def test_the_frames_of_an_enhanced_instance_count_as_slices() -> None:
    assert axial_candidates([instance(EnhancedCTImageStorage, NumberOfFrames=30)], 8, 2000)[1] == ()


def test_an_empty_series_says_so() -> None:
    assert "no instance" in axial_candidates([], 8, 2000)[1][0]


def test_an_instance_without_image_type_counts_as_a_slice() -> None:
    ds = Dataset()
    ds.SOPClassUID = CTImageStorage
    assert axial_candidates([ds] * 8, 8, 2000)[1] == ()


def test_the_frames_of_all_instances_are_counted_against_the_most_images_and_scouts_are_not() -> None:
    scout = instance(EnhancedCTImageStorage, "LOCALIZER", NumberOfFrames=9000)
    volumes = [instance(EnhancedCTImageStorage, NumberOfFrames=1000)] * 2
    assert axial_candidates([scout, *volumes], 8, 2000) == (volumes, ())
    reason = axial_candidates([scout, *volumes, instance()], 8, 2000)[1]
    assert reason == ("too many images: 2001, a head scan has at most 2000 (router.most_images)",)
