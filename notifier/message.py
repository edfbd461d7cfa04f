"""The text of a page: what a reader needs at 3 a.m. on a small screen, and no identity of the patient."""

import math
import unicodedata
from dataclasses import dataclass
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

from herald.config import Config
from herald.events import Finding, SeriesTriaged
from herald.links import page_link
from notifier.record import page_id

DISCLAIMER = "AI triage, not a diagnosis"
BRIEF_DISCLAIMER = "AI, not a diagnosis"

LINK_INTRODUCTION = "Review and acknowledge:"
"""Line of the body before the link, which is its last."""

WORDS = {
    "any": "any haemorrhage",
    "iph": "intraparenchymal (IPH)",
    "ivh": "intraventricular (IVH)",
    "sah": "subarachnoid (SAH)",
    "edh_sdh": "epidural or subdural (EDH/SDH)",
}
"""Finding kinds in words."""

LIKELIHOODS = ((0.9, "very likely"), (0.66, "likely"), (0.0, "possible"))
"""Least probability for each word; the bounds are those of the IPCC's guidance note on uncertainty (2010)."""

LONGEST_SHORT = 160
"""Characters of one SMS in the 7-bit alphabet."""

_SHORT_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789 !\"#$%&'()*+,-./:;<=>?@_")
"""What ASCII and the basic set of GSM 03.38 share: a mail gateway must change none of it."""

_SUFFIX_LENGTH = 4
_SCANNER_LENGTH = 16  # of StationName and of an AE title, value representations SH and AE
_BRIEF_SCANNER_LENGTH = 8
_KIND_LENGTH = 8


@dataclass(frozen=True)
class PageText:
    """Subject and plain-text body of one page, the same in 160 characters, and the signed link that both hold.

    `short` has no link where that would not fit.
    """

    subject: str
    body: str
    short: str
    link: str


def page_text(event: SeriesTriaged, config: Config) -> PageText:
    """The page for a positive result; raises ConfigError when the link cannot be signed."""
    overall, subtypes = _listed(event, config)
    link = page_link(config.webui, page_id(event.study_instance_uid, 0))
    conclusion = _conclusion(overall, subtypes)
    lines = [
        "Suspected intracranial haemorrhage",
        DISCLAIMER,
        "",
        *(_finding(finding, event.slice_count) for finding in [*([overall] if overall else []), *subtypes]),
        *_uncertainty(event, config),
        f"Scanner: {_scanner(event) or 'unknown'}",
        f"Last image: {_time(event.last_image_at, config)}",
        f"Accession: {accession_suffix(event.accession_number)}",
        f"Series: {_series(event)}",
        "",
        LINK_INTRODUCTION,
        link,
    ]
    return PageText(
        subject=f"Intracranial {conclusion}",
        body="\n".join(lines) + "\n",
        short=_short(event, conclusion, link, config),
        link=link,
    )


def accession_suffix(accession_number: str) -> str:
    """The last four characters, and never more than half, so that a short number is not given away whole."""
    number = _one_line(accession_number)
    length = min(_SUFFIX_LENGTH, len(number) // 2)
    return f"...{number[-length:]}" if length else "none"


def likelihood(probability: float) -> str:
    """A probability in words."""
    return next((word for least, word in LIKELIHOODS if probability >= least), LIKELIHOODS[-1][1])


def short_text(text: str) -> str:
    """At most 160 characters that ASCII and the basic set of GSM 03.38 share, without accents and line breaks."""
    plain = unicodedata.normalize("NFKD", " ".join(text.split()))
    return "".join(c for c in plain if c in _SHORT_CHARACTERS).strip()[:LONGEST_SHORT]


def _short(event: SeriesTriaged, conclusion: str, link: str, config: Config) -> str:
    """Gives way in this order until it fits: the day, `intracranial`, words of the disclaimer, the end of the
    scanner's name, and at last the link, without which there is room for all the rest.

    A pager without a browser needs scanner, time and accession number to find the patient, so that the link goes first.
    """
    moment = event.last_image_at.astimezone(_zone(config)) if event.last_image_at else None
    dated, clock = (f"{moment:%d %b %H:%M}", f"{moment:%H:%M}") if moment else ("", "")
    suffix = short_text(accession_suffix(event.accession_number))
    accession = f"Acc {suffix}" if suffix != "none" else ""
    scanner = short_text(_scanner(event))[:_SCANNER_LENGTH].strip()
    brief = scanner[:_BRIEF_SCANNER_LENGTH].strip()
    address = link if set(link) <= _SHORT_CHARACTERS else ""
    long, whole = f"Intracranial {conclusion}", conclusion[:1].upper() + conclusion[1:]
    for finding, source, time, disclaimer, url in (
        (long, scanner, dated, DISCLAIMER, address),
        (long, scanner, clock, DISCLAIMER, address),
        (whole, scanner, clock, DISCLAIMER, address),
        (whole, scanner, clock, BRIEF_DISCLAIMER, address),
        (whole, brief, clock, BRIEF_DISCLAIMER, address),
    ):
        text = _sentences(finding, f"{source} {time}".strip(), accession, disclaimer, url)
        if len(text) <= LONGEST_SHORT:
            return text
    return _sentences(long, f"{scanner} {dated}".strip(), accession, DISCLAIMER, "")


def _sentences(finding: str, source: str, accession: str, disclaimer: str, url: str) -> str:
    text = ". ".join(part for part in (finding, source, accession, disclaimer) if part) + "."
    return f"{text} {url}" if url else text


def _listed(event: SeriesTriaged, config: Config) -> tuple[Finding | None, list[Finding]]:
    """Any haemorrhage, or the likeliest kind where that is missing, and the other kinds from the operating point."""
    by_kind = {finding.kind: finding for finding in event.findings}
    overall = by_kind.get("any") or max(event.findings, key=lambda finding: finding.probability, default=None)
    subtypes = [
        f
        for f in event.findings
        if f is not overall and f.kind != "any" and f.probability >= config.router.operating_point
    ]
    return overall, sorted(subtypes, key=lambda finding: -finding.probability)


def _conclusion(overall: Finding | None, subtypes: list[Finding]) -> str:
    if overall is None:
        return "haemorrhage suspected"
    named = overall if overall.kind != "any" else next(iter(subtypes), None)
    kind = f" ({short_text(_abbreviation(named))[:_KIND_LENGTH]})" if named else ""
    return f"haemorrhage {likelihood(overall.probability)} {_number(overall.probability)}{kind}"


def _finding(finding: Finding, slice_count: int) -> str:
    words = WORDS.get(finding.kind, finding.kind)
    volume = f", {finding.volume_ml:.1f} ml" if math.isfinite(finding.volume_ml) else ""
    of = f" of {slice_count}" if slice_count else ""
    chance = f"{likelihood(finding.probability)} {_number(finding.probability)}"
    return f"{words[:1].upper()}{words[1:]}: {chance}{volume}, slice {finding.slice}{of}"


def _number(probability: float) -> str:
    """Two digits, but never 1.00, which no model may claim."""
    return ">0.99" if probability >= 0.995 else f"{probability:.2f}"


def _abbreviation(finding: Finding) -> str:
    return finding.kind.upper().replace("_", "/")


def _scanner(event: SeriesTriaged) -> str:
    return _one_line(event.scanner) or _one_line(event.calling_ae_title)


def _series(event: SeriesTriaged) -> str:
    """What the pixels say it is; its description and its UIDs stay here, since both may identify (PS3.15 Annex E)."""
    said = [_one_line(answer.label).replace("_", "-") for answer in (event.protocol or {}).values()]
    said += [f"{event.slice_count} slices"] if event.slice_count else []
    said += [f"revision {event.revision}"] if event.revision > 1 else []
    return ", ".join(said) or "unknown"


def _uncertainty(event: SeriesTriaged, config: Config) -> list[str]:
    if not event.uncertain:
        return []
    doubtful = ", ".join(
        f"{head} {answer.label} {answer.probability:.2f}"
        for head, answer in (event.protocol or {}).items()
        if answer.probability < config.router.certain_probability
    )
    return [f"Protocol uncertain: {doubtful or 'see the series page'}"]


def _zone(config: Config) -> ZoneInfo | None:
    return ZoneInfo(config.notifier.time_zone) if config.notifier.time_zone else None


def _time(moment: datetime | None, config: Config) -> str:
    """UTC and, where it differs, local time, each named."""
    if moment is None:
        return "unknown"
    utc, local = moment.astimezone(UTC), moment.astimezone(_zone(config))
    text = f"{utc:%Y-%m-%d %H:%M:%S} UTC"
    return text if not local.utcoffset() else f"{text} = {local:%H:%M:%S %Z (UTC%z)}"


def _one_line(text: str) -> str:
    """Without control characters: a header of a page must not be split by what a scanner sent."""
    return "".join(c if c.isprintable() else " " for c in text).strip()
