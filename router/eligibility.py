"""What is decided without a model: which instances can be a head scan at all."""

from collections import Counter
from collections.abc import Sequence

from pydicom.dataset import Dataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    EnhancedCTImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
)

CT_IMAGES = frozenset({CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage})


def axial_candidates(
    datasets: Sequence[Dataset], min_slices: int, most_images: int
) -> tuple[list[Dataset], tuple[str, ...]]:
    """The instances that may make a volume, and the reasons why they cannot: none when eligible so far.

    Frames count as images, by the headers alone: nothing is decoded to count them.
    """
    if not datasets:
        return [], ("the series has no instance in the store",)
    images = [ds for ds in datasets if ds.get("SOPClassUID") in CT_IMAGES]
    if not images:
        kinds = Counter(_described(ds) for ds in datasets)
        return [], (f"not a CT image: {', '.join(f'{count} x {kind}' for kind, count in sorted(kinds.items()))}",)
    slices = [ds for ds in images if not is_localizer(ds)]
    if not slices:
        return [], (f"localizer: {len(images)} scout image{'s' * (len(images) > 1)}, no axial scan",)
    count = sum(int(ds.get("NumberOfFrames") or 1) for ds in slices)
    return slices, too_few(count, min_slices) or too_many(count, most_images)


def too_few(count: int, min_slices: int) -> tuple[str, ...]:
    """The reason why `count` slices are no head scan, if so."""
    if count >= min_slices:
        return ()
    return (f"too few slices: {count}, a head scan has at least {min_slices} (router.min_slices)",)


def too_many(count: int, most_images: int) -> tuple[str, ...]:
    """The reason why a series of `count` images is no head scan, if so."""
    if count <= most_images:
        return ()
    return (f"too many images: {count}, a head scan has at most {most_images} (router.most_images)",)


def is_localizer(ds: Dataset) -> bool:
    """Whether ImageType calls the instance a scout (PS3.3 C.8.2.1.1.1, value 3)."""
    return "LOCALIZER" in [str(value).upper() for value in ds.get("ImageType") or ()]


def _described(ds: Dataset) -> str:
    sop_class = UID(str(ds.get("SOPClassUID", "")))
    return sop_class.name if sop_class else f"object of modality {ds.get('Modality', 'unknown')}"
