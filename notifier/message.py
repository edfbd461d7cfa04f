"""The text of a page: what a reader needs at 3 a.m. on a small screen, and no identity of the patient."""

import math
from dataclasses import dataclass
from datetime import UTC, datetime

from herald.config import Config
from herald.events import Finding, SeriesTriaged
from herald.links import sign_link

DISCLAIMER = "AI triage, not a diagnosis"

WORDS = {
    "any": "any haemorrhage",
    "iph": "intraparenchymal (IPH)",
    "ivh": "intraventricular (IVH)",
    "sah": "subarachnoid (SAH)",
    "edh_sdh": "epidural or subdural (EDH/SDH)",
}
"""Finding kinds in words."""

_SUFFIX_LENGTH = 4


@dataclass(frozen=True)
class PageText:
    """Subject and plain-text body of one page."""

    subject: str
    body: str


def page_text(event: SeriesTriaged, config: Config) -> PageText:
    """The page for a positive result; raises ConfigError when the link cannot be signed."""
    by_kind = {finding.kind: finding for finding in event.findings}
    subtypes = sorted(
        (f for f in event.findings if f.kind != "any" and f.probability >= config.router.operating_point),
        key=lambda finding: -finding.probability,
    )
    overall = by_kind.get("any") or max(event.findings, key=lambda finding: finding.probability, default=None)
    subject = "Herald: suspected intracranial haemorrhage"
    if overall is not None:
        subject += f" {overall.probability:.2f}"
    if subtypes:
        subject += f" ({_abbreviation(subtypes[0])})"
    listed = [overall] if overall is not None else []
    listed += [finding for finding in subtypes if finding is not overall]
    lines = [
        "Suspected intracranial haemorrhage",
        DISCLAIMER,
        "",
        *(_finding(finding, event.slice_count) for finding in listed),
        *_uncertainty(event, config),
        f"Scanner: {_one_line(event.scanner or event.calling_ae_title) or 'unknown'}",
        f"Last image: {_time(event.last_image_at)}",
        f"Accession: {accession_suffix(event.accession_number)}",
        "",
        "Review and acknowledge:",
        sign_link(config.webui, event.study_instance_uid, event.series_instance_uid, event.revision),
    ]
    return PageText(subject, "\n".join(lines) + "\n")


def accession_suffix(accession_number: str) -> str:
    """The last four characters, and never more than half, so that a short number is not given away whole."""
    number = _one_line(accession_number)
    length = min(_SUFFIX_LENGTH, len(number) // 2)
    return f"...{number[-length:]}" if length else "none"


def _finding(finding: Finding, slice_count: int) -> str:
    words = WORDS.get(finding.kind, finding.kind)
    volume = f", {finding.volume_ml:.1f} ml" if math.isfinite(finding.volume_ml) else ""
    of = f" of {slice_count}" if slice_count else ""
    return f"{words[:1].upper()}{words[1:]}: {finding.probability:.2f}{volume}, slice {finding.slice}{of}"


def _abbreviation(finding: Finding) -> str:
    return finding.kind.upper().replace("_", "/")


def _uncertainty(event: SeriesTriaged, config: Config) -> list[str]:
    if not event.uncertain:
        return []
    doubtful = ", ".join(
        f"{head} {answer.label} {answer.probability:.2f}"
        for head, answer in (event.protocol or {}).items()
        if answer.probability < config.router.certain_probability
    )
    return [f"Protocol uncertain: {doubtful or 'see the series page'}"]


def _time(moment: datetime | None) -> str:
    """UTC and, where it differs, the node's own zone, each named."""
    if moment is None:
        return "unknown"
    utc, local = moment.astimezone(UTC), moment.astimezone()
    text = f"{utc:%Y-%m-%d %H:%M:%S} UTC"
    return text if not local.utcoffset() else f"{text} = {local:%H:%M:%S %Z (UTC%z)}"


def _one_line(text: str) -> str:
    """Without control characters: a header of a page must not be split by what a scanner sent."""
    return "".join(c if c.isprintable() else " " for c in text).strip()
