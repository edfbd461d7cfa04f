"""What the DICOM headers claim about a series, in the words of the protocol model's heads.

The pixels decide; the claim stands beside the decision, because every disagreement is a result in its own right.
"""

import re

from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

Claim = dict[str, str | None]

_WITHOUT_CONTRAST = re.compile(
    r"\b(w/?o|without|non|no)[ _-]*(c\b|con|iv\b|cm\b)|\b(ncct|nect|unenhanced|plain|nativ\w*|sans|ohne|senza)\b", re.I
)
_WITH_CONTRAST = re.compile(
    r"\bcta\b|angio|venogra|arterial|perfusion|\bc\+|\bpost[ _-]?c|\bw/?c\b|\bwith\b|\benhanced\b|contrast", re.I
)
_NO_AGENT = {"", "no", "none", "n", "without", "non contrast", "no contrast"}

_HEAD_PARTS = {"HEAD", "BRAIN", "SKULL"}
_HEAD_WORDS = re.compile(r"head|brain|skull|cranium|crane|schädel|schadel|kopf|cerebr|stroke", re.I)
_OTHER_WORDS = re.compile(
    r"(chest|thora|abdom|pelvi|spine|lumbar|cervic|neck|lung|\bknee|\bankle|\bhip\b|liver|cardiac)", re.I
)

_BONE_WORDS = re.compile(r"(bone|bony|\bos\b|knochen|sharp|edge|lung)", re.I)
_SOFT_WORDS = re.compile(r"(soft|brain|stand|smooth|\bstd)", re.I)


def header_claim(ds: Dataset, orientation: str) -> Claim:
    """The header's answer for each head, None where it says nothing.

    `orientation` is the name of the plane that ImageOrientationPatient gives.
    """
    return {
        "contrast": _contrast(ds),
        "orientation": orientation if orientation in ("axial", "coronal", "sagittal") else None,
        "kernel": _kernel(ds),
        "region": _region(ds),
    }


def _text(ds: Dataset, *keywords: str) -> str:
    """Described in words: the elements joined, empty where absent."""
    return " ".join(str(ds.get(keyword) or "") for keyword in keywords).strip()


def _contrast(ds: Dataset) -> str | None:
    if "ContrastBolusAgent" in ds:
        agent = str(ds.ContrastBolusAgent or "").strip().lower()
        if agent not in _NO_AGENT:
            return "contrast"
        if agent:
            return "non_contrast"
    described = _text(ds, "SeriesDescription", "ProtocolName")
    if _WITHOUT_CONTRAST.search(described):
        return "non_contrast"
    if _WITH_CONTRAST.search(described):
        return "contrast"
    return None


def _kernel(ds: Dataset) -> str | None:
    value = ds.get("ConvolutionKernel")
    name = str(value[0] if isinstance(value, MultiValue) else value or "").strip()  # Siemens adds a strength
    return _kernel_by_vendor(name.upper()) or _kernel_by_words(name) or _kernel_by_words(_text(ds, "SeriesDescription"))


def _kernel_by_vendor(name: str) -> str | None:
    """Kernel names as the vendors document them: numbers grow with sharpness."""
    if siemens := re.fullmatch(r"[HBJQTU][A-Z]*(\d\d)[A-Z]?(?:\W.*|\d)?", name):
        return "bone" if int(siemens.group(1)) >= 50 else "soft"
    if canon := re.fullmatch(r"FC(\d\d)\w*", name):
        number = int(canon.group(1))
        return "bone" if 30 <= number <= 39 or 50 <= number <= 59 or number >= 80 else "soft"
    if philips := re.fullmatch(r"(U?[A-C]|Y?[A-E]|EB|EC|L)", name):
        return "bone" if philips.group(1) in ("D", "E", "L", "YA", "YB", "YC", "YD", "YE", "EC") else "soft"
    return None


def _kernel_by_words(text: str) -> str | None:
    if _BONE_WORDS.search(text):
        return "bone"
    if _SOFT_WORDS.search(text):
        return "soft"
    return None


def _region(ds: Dataset) -> str | None:
    part = _text(ds, "BodyPartExamined").upper()
    if part:
        return "head" if part in _HEAD_PARTS or _HEAD_WORDS.search(part) else "other"
    described = _text(ds, "SeriesDescription", "ProtocolName", "StudyDescription")
    if _HEAD_WORDS.search(described):
        return "head"
    if _OTHER_WORDS.search(described):
        return "other"
    return None
