"""Technical facts of a series: what its headers say and how its pixels measure."""

from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from herald.volume import Volume
from router.facts import series_facts


def header(**elements: object) -> Dataset:
    ds = Dataset()
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


def head(noise: float, tissue: float = 32.0) -> Volume:
    random = np.random.default_rng(1)
    hounsfield = random.normal(tissue, noise, (9, 64, 64)).round().astype(np.int16)
    hounsfield[:, :, :20] = -1000
    return Volume(hounsfield, np.arange(9) * 5.0, (0.45, 0.45))


def test_acquisition_time_is_the_earliest_of_the_series_in_the_scanner_s_zone() -> None:
    images = [
        header(AcquisitionDate="20261122", AcquisitionTime=f"0301{s}", TimezoneOffsetFromUTC="+0200") for s in (30, 20)
    ]
    assert series_facts(images)["acquired_at"] == datetime(2026, 11, 22, 1, 1, 20, tzinfo=UTC)


def test_acquisition_datetime_comes_before_date_and_time_and_carries_its_own_offset() -> None:
    image = header(AcquisitionDateTime="20261122030120.5-0500", AcquisitionDate="19000101", AcquisitionTime="000000")
    assert series_facts([image])["acquired_at"] == datetime(2026, 11, 22, 8, 1, 20, 500000, tzinfo=UTC)


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
@given(st.text(alphabet="0123456789+-. x", max_size=26))
def test_a_time_that_is_none_is_no_fact_and_no_error(text: str) -> None:
    at = series_facts([header(AcquisitionDateTime=text)])["acquired_at"]
    assert at is None or at.tzinfo is not None


def test_kernel_and_thickness_are_as_the_header_has_them() -> None:
    facts = series_facts([header(ConvolutionKernel=["H31s", "2"], SliceThickness="5.0")])
    assert (facts["convolution_kernel"], facts["slice_thickness_mm"]) == ("H31s", 5.0)


def test_a_header_that_says_nothing_gives_no_facts() -> None:
    assert set(series_facts([header()]).values()) == {None, ""}


@pytest.mark.parametrize("noise", [2.0, 5.0, 9.0])
def test_noise_and_tissue_are_measured_from_the_pixels(noise: float) -> None:
    facts = series_facts([header()], head(noise))
    assert facts["noise_hounsfield"] == pytest.approx(noise, rel=0.12)
    assert facts["tissue_hounsfield"] == pytest.approx(32, abs=0.6)


def test_air_has_no_tissue_to_measure() -> None:
    facts = series_facts([header()], head(0.0, tissue=-900.0))
    assert (facts["tissue_hounsfield"], facts["noise_hounsfield"]) == (None, None)
