import re
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from math import nan
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from notifier_fakes import FINDINGS, configured, triaged

from herald.events import Finding, Label
from herald.links import TOKEN_LENGTH
from notifier.message import DISCLAIMER, accession_suffix, likelihood, page_text, short_text

GSM_BASIC_SET = set(
    "@£$¥èéùìòÇ\nØø\rÅåΔ_ΦΓΛΩΠΨΣΘΞÆæßÉ !\"#¤%&'()*+,-./0123456789:;<=>?"
    "¡ABCDEFGHIJKLMNOPQRSTUVWXYZÄÖÑÜ§¿abcdefghijklmnopqrstuvwxyzäöñüà"
)
"""3GPP TS 23.038, 6.2.1."""


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_the_subject_names_the_finding_its_probability_and_the_leading_kind() -> None:
    assert page_text(triaged(), configured()).subject == "Intracranial haemorrhage very likely 0.97 (IPH)"


def test_a_kind_below_the_operating_point_is_not_named() -> None:
    text = page_text(triaged(findings=FINDINGS[:1] + FINDINGS[3:]), configured())
    assert text.subject == "Intracranial haemorrhage very likely 0.97"
    assert "IVH" not in text.body + text.short


@pytest.mark.parametrize(
    ("probability", "said"),
    [(0.5, "possible 0.50"), (0.66, "likely 0.66"), (0.9, "very likely 0.90"), (0.9996, "very likely >0.99")],
)
def test_a_probability_is_said_in_words_and_as_a_number_that_never_claims_certainty(
    probability: float, said: str
) -> None:
    text = page_text(triaged(findings=(replace(FINDINGS[0], probability=probability),)), configured())
    assert text.subject == f"Intracranial haemorrhage {said}"
    assert f"Any haemorrhage: {said}, 12.3 ml" in text.body
    assert text.short.startswith((f"Intracranial haemorrhage {said}. ", f"Haemorrhage {said}. "))
    assert likelihood(probability) in said


@pytest.mark.usefixtures("berlin")
def test_the_body_says_what_a_reader_needs_at_three_in_the_morning() -> None:
    text = page_text(triaged(), configured())
    *lines, link = text.body.splitlines()
    assert lines == [
        "Suspected intracranial haemorrhage",
        "AI triage, not a diagnosis",
        "",
        "Any haemorrhage: very likely 0.97, 12.3 ml, slice 14 of 32",
        "Intraparenchymal (IPH): very likely 0.95, 11.8 ml, slice 14 of 32",
        "Subarachnoid (SAH): possible 0.61, 0.5 ml, slice 9 of 32",
        "Scanner: CT-EAST",
        "Last image: 2026-03-29 01:15:30 UTC = 03:15:30 CEST (UTC+0200)",  # a quarter after the change of clocks
        "Accession: ...0329",
        "Series: non-contrast, soft, 32 slices",
        "",
        "Review and acknowledge:",
    ]
    assert link == text.link
    assert len(link.removeprefix("https://herald.example/page/")) == TOKEN_LENGTH


def test_local_time_is_that_of_the_configured_zone() -> None:
    text = page_text(triaged(), configured(time_zone="Asia/Kolkata"))
    assert "Last image: 2026-03-29 01:15:30 UTC = 06:45:30 IST (UTC+0530)" in text.body
    assert "CT-EAST 06:45" in text.short


def test_a_later_revision_says_so() -> None:
    assert "Series: non-contrast, soft, 32 slices, revision 3\n" in page_text(triaged(revision=3), configured()).body


def test_an_uncertain_protocol_is_mentioned_with_the_doubtful_head() -> None:
    protocol = {"contrast": Label("contrast", 0.55), "kernel": Label("soft", 0.97)}
    body = page_text(triaged(uncertain=True, protocol=protocol), configured()).body
    assert "Protocol uncertain: contrast contrast 0.55\n" in body


@pytest.mark.parametrize(
    ("number", "shown"), [("ACC20260329", "...0329"), ("1234", "...34"), ("7", "none"), ("", "none")]
)
def test_never_more_than_half_of_an_accession_number_is_shown(number: str, shown: str) -> None:
    assert accession_suffix(number) == shown


def test_a_result_without_findings_volume_or_times_still_makes_a_page() -> None:
    bare = triaged(findings=(), last_image_at=None, scanner="", calling_ae_title="", accession_number="", protocol=None)
    text = page_text(replace(bare, uncertain=True), configured())
    assert text.subject == "Intracranial haemorrhage suspected"
    assert text.short == f"Intracranial haemorrhage suspected. {DISCLAIMER}. {text.link}"
    assert "Last image: unknown" in text.body
    assert "Scanner: unknown" in text.body
    assert "nan" not in page_text(triaged(findings=(replace(FINDINGS[0], volume_ml=nan),)), configured()).body


@settings(deadline=None)
@given(scanner=st.text(max_size=16), accession=st.text(min_size=2, max_size=16))
def test_what_a_scanner_sends_neither_breaks_a_line_nor_gives_the_accession_number_away(
    scanner: str, accession: str
) -> None:
    plain = page_text(triaged(), configured())
    text = page_text(triaged(scanner=scanner, accession_number=accession), configured())
    assert len(text.body.splitlines()) == len(plain.body.splitlines())
    assert text.subject == plain.subject
    suffix = re.search(r"^Accession: (.*)$", text.body, re.MULTILINE)
    assert suffix is not None
    assert len(suffix[1].removeprefix("...").replace("none", "")) <= max(4, len(accession) // 2)


# --- 160 characters --------------------------------------------------------------------------------------------------


def short_at(public_url: str, **changes: Any) -> str:
    config = configured(time_zone="Europe/Berlin")
    config = replace(config, webui=replace(config.webui, public_url=public_url))
    text = page_text(triaged(**changes), config)
    return text.short.replace(text.link, "LINK")


def test_what_gives_way_in_160_characters_is_never_the_finding_its_probability_or_what_it_is_not() -> None:
    where = "CT-EAST 29 Mar 03:15. Acc ...0329"
    assert short_at("http://ct") == f"Intracranial haemorrhage very likely 0.97 (IPH). {where}. {DISCLAIMER}. LINK"
    where = "CT-EAST 03:15. Acc ...0329"
    finding = "Haemorrhage very likely 0.97 (IPH)"
    assert short_at("https://herald.example") == f"{finding}. {where}. {DISCLAIMER}. LINK"
    assert short_at("https://herald.hospital.example") == f"{finding}. {where}. AI, not a diagnosis. LINK"
    brief = short_at("https://herald.hospital.example", scanner="SIEMENS-EAST-WING")
    assert brief == f"{finding}. SIEMENS- 03:15. Acc ...0329. AI, not a diagnosis. LINK"
    where = "CT-EAST 29 Mar 03:15. Acc ...0329"
    without_link = short_at("https://herald.department-of-radiology.hospital.example")
    assert without_link == f"Intracranial haemorrhage very likely 0.97 (IPH). {where}. {DISCLAIMER}."


anything = st.text(max_size=80)


@settings(deadline=None)
@given(
    scanner=anything,
    calling=anything,
    accession=anything,
    kind=st.one_of(st.sampled_from(["any", "iph", "edh_sdh"]), anything),
    probability=st.floats(0, 1),
    host=st.from_regex(r"https?://[a-z.~é-]{1,90}(/[a-z]{1,9})?", fullmatch=True),
    at=st.one_of(st.none(), st.datetimes(datetime(1990, 1, 1), datetime(2090, 1, 1), timezones=st.just(UTC))),
)
def test_the_short_text_has_160_characters_of_the_basic_set_at_most_whatever_a_scanner_sends(
    scanner: str, calling: str, accession: str, kind: str, probability: float, host: str, at: datetime | None
) -> None:
    config = configured()
    config = replace(config, webui=replace(config.webui, public_url=host))
    event = triaged(
        scanner=scanner,
        calling_ae_title=calling,
        accession_number=accession,
        last_image_at=at,
        findings=(Finding(kind, probability, nan, 1, "1.2"),),
    )
    text = page_text(event, config)
    assert len(text.short) <= 160
    assert set(text.short) <= GSM_BASIC_SET - {"\n", "\r"}
    assert "AI" in text.short
    assert "not a diagnosis" in text.short
    assert likelihood(probability) in text.short
    assert ("http" in text.short.lower().rpartition("diagnosis")[2]) == text.short.endswith(text.link)


@settings(deadline=None)
@given(st.text(max_size=400))
def test_any_text_becomes_160_characters_without_control_characters(text: str) -> None:
    short = short_text(text)
    assert len(short) <= 160
    assert set(short) <= GSM_BASIC_SET - {"\n", "\r"}


def test_accents_are_left_out_rather_than_their_letters() -> None:
    assert short_text("Zürich\r\n Évian {CT}") == "Zurich Evian CT"
