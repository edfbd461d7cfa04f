"""What the headers claim, by the words and kernel names that vendors use."""

import pytest
from pydicom.dataset import Dataset

from herald.header import header_claim


def claim(orientation: str = "axial", **elements: object) -> dict[str, str | None]:
    ds = Dataset()
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return header_claim(ds, orientation)


def test_an_empty_header_claims_nothing_but_the_plane() -> None:
    assert claim() == {"contrast": None, "orientation": "axial", "kernel": None, "region": None}


def test_an_oblique_plane_is_no_claim() -> None:
    assert claim("oblique")["orientation"] is None


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ({"ContrastBolusAgent": "OMNIPAQUE 350"}, "contrast"),
        ({"ContrastBolusAgent": "NONE"}, "non_contrast"),
        ({"ContrastBolusAgent": "", "SeriesDescription": "HEAD"}, None),
        ({"SeriesDescription": "CTA HEAD 0.6"}, "contrast"),
        ({"SeriesDescription": "HEAD W/O CONTRAST"}, "non_contrast"),
        ({"SeriesDescription": "Head without 5mm"}, None),
        ({"SeriesDescription": "NCCT brain"}, "non_contrast"),
        ({"SeriesDescription": "BRAIN POST C"}, "contrast"),
        ({"ProtocolName": "1A TRAUMA/PLAIN HEAD"}, "non_contrast"),
        ({"SeriesDescription": "SERIES NO 3"}, None),
    ],
)
def test_contrast_is_claimed_by_agent_or_description(elements: dict[str, str], expected: str | None) -> None:
    assert claim(**elements)["contrast"] == expected


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("STD+", "soft"),
        ("STANDARD", "soft"),
        ("SOFT", "soft"),
        ("BONE", "bone"),
        ("BONEPLUS", "bone"),
        ("EDGE", "bone"),
        ("H31s", "soft"),
        ("H60f", "bone"),
        (["J40s", "3"], "soft"),
        (["Hr68h", "2"], "bone"),
        ("UB", "soft"),
        ("YA", "bone"),
        ("YB", "bone"),
        ("D", "bone"),
        ("FC26", "soft"),
        ("FC30", "bone"),
        ("FC81", "bone"),
        ("", None),
        ("???", None),
    ],
)
def test_kernel_names_of_every_vendor_are_read(kernel: object, expected: str | None) -> None:
    assert claim(ConvolutionKernel=kernel)["kernel"] == expected


def test_a_kernel_nobody_knows_is_read_from_the_description() -> None:
    assert claim(ConvolutionKernel="X", SeriesDescription="BONE BRAIN 1MM")["kernel"] == "bone"


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ({"BodyPartExamined": "HEAD"}, "head"),
        ({"BodyPartExamined": "BRAIN"}, "head"),
        ({"BodyPartExamined": "CHEST"}, "other"),
        ({"SeriesDescription": "Kopf nativ"}, "head"),
        ({"StudyDescription": "CT ABDOMEN"}, "other"),
        ({"StudyDescription": "CT"}, None),
    ],
)
def test_region_is_claimed_by_body_part_or_description(elements: dict[str, str], expected: str | None) -> None:
    assert claim(**elements)["region"] == expected
