"""The main line of Herald: one series in, one disposition out."""

from collections.abc import Sequence
from functools import partial

from pydicom.dataset import Dataset

from herald import __version__
from herald.config import RouterConfig
from herald.cranium import detector_view
from herald.errors import StoreError
from herald.events import SeriesReceived, SeriesTriaged, utc_now
from herald.header import header_claim
from herald.outline import outlined
from herald.signatures import FINDINGS
from herald.store import StudyStore
from herald.volume import detection_input, protocol_batch, read_datasets, slabs, volume_from_datasets
from router.decision import decide
from router.eligibility import axial_candidates, too_few, too_many
from router.facts import series_facts
from router.findings import findings, prediction
from router.inference import InferenceClient


def triage_series(
    received: SeriesReceived, store: StudyStore, client: InferenceClient, config: RouterConfig
) -> SeriesTriaged:
    """Load, judge eligibility, classify the protocol, detect haemorrhage.

    Raises DicomError when the series cannot be read, StoreError and ServingError as they come; the caller retries or
    makes it `failed`.
    """
    triaged = partial(_about(received), started_at=utc_now())
    if obstacles := too_many(received.instance_count, config.most_images):  # reading it could exhaust the memory
        return triaged(disposition="not_eligible", reasons=obstacles)
    datasets = read_datasets(store.series_paths(received.study_instance_uid, received.series_instance_uid))
    _require_whole(received, datasets, store)
    slices, obstacles = axial_candidates(datasets, config.min_slices, config.most_images)
    if obstacles:
        claim = header_claim(datasets[0], "") if datasets else {}
        return triaged(disposition="not_eligible", reasons=obstacles, header=claim, **series_facts(datasets))

    volume = volume_from_datasets(slices)
    triaged = partial(triaged, **series_facts(slices, volume))
    claim = header_claim(slices[0], volume.orientation)
    if obstacles := too_few(volume.slice_count, config.min_slices):  # several images of each position: perfusion, 4D
        return triaged(disposition="not_eligible", reasons=obstacles, header=claim, notes=volume.notes)
    classified = client.classify_protocol(protocol_batch(volume))
    decision = decide(classified.heads, claim, config)
    triaged = partial(
        triaged,
        protocol=decision.protocol,
        header=claim,
        disagreements=decision.disagreements,
        notes=volume.notes,
        slice_count=volume.slice_count,
        classified_at=utc_now(),
        model_versions={"protocol": classified.version},
    )
    if not decision.eligible:
        return triaged(disposition="not_eligible", reasons=decision.reasons)

    thick = slabs(volume, config.slab_thickness_mm)
    seen, placement = detection_input(thick.volume)
    detected = client.detect_hemorrhage(detector_view(seen))
    answer = (outlined(detected.mask), detected.slice_probability, detected.probability)
    store.write_prediction(
        received.study_instance_uid,
        received.series_instance_uid,
        received.revision,
        prediction(thick, seen, placement, *answer),
    )
    triaged = partial(
        triaged,
        findings=findings(thick, placement, *answer),
        notes=thick.volume.notes,
        detected_at=utc_now(),
        model_versions={"protocol": classified.version, "hemorrhage": detected.version},
    )
    positive = float(detected.probability[FINDINGS.index("any")]) >= config.operating_point
    unreadable = [f"{len(volume.unreadable)} images left out, {why}" for why in volume.unreadable[:1]]
    lacking = [*received.missing, *unreadable, *filter(None, [volume.left_out])]
    incomplete = tuple(f"incomplete: {what}" for what in lacking)
    return triaged(
        disposition="positive" if positive else "negative",
        reasons=decision.reasons + incomplete,
        uncertain=decision.uncertain or bool(incomplete),
    )


def _require_whole(received: SeriesReceived, datasets: Sequence[Dataset], store: StudyStore) -> None:
    """Raise StoreError where the store shows less than was received: a lost mount looks like an empty folder."""
    found = len({str(ds.get("SOPInstanceUID")) for ds in datasets})  # not files: one instance may have conflicting ones
    if found < received.instance_count:
        raise StoreError(
            f"series {received.series_instance_uid}: {found} of {received.instance_count} instances are under "
            f"{store.root}; check store.root, its mount and the rights on it, and run `herald reconcile`"
        )


def failed(received: SeriesReceived, error: BaseException) -> SeriesTriaged:
    """The disposition of a series that could not be triaged, with the error in words."""
    return _about(received)(disposition="failed", reasons=(f"{type(error).__name__}: {error}",))


def _about(received: SeriesReceived) -> partial[SeriesTriaged]:
    """What every disposition repeats of the series it is about."""
    return partial(
        SeriesTriaged,
        study_instance_uid=received.study_instance_uid,
        series_instance_uid=received.series_instance_uid,
        revision=received.revision,
        accession_number=received.accession_number,
        modality=received.modality,
        scanner=received.scanner,
        calling_ae_title=received.calling_ae_title,
        instance_count=received.instance_count,
        close_reason=received.close_reason,
        first_image_at=received.first_image_at,
        last_image_at=received.last_image_at,
        received_at=received.occurred_at,
        software_version=__version__,
    )
