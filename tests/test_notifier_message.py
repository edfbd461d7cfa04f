import re
import time
from collections.abc import Iterator
from dataclasses import replace
from math import nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from notifier_fakes import FINDINGS, configured, triaged

from herald.events import Label
from herald.links import verify_link
from notifier.message import accession_suffix, page_text


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_the_subject_names_the_finding_its_probability_and_the_leading_kind() -> None:
    assert page_text(triaged(), configured()).subject == "Herald: suspected intracranial haemorrhage 0.97 (IPH)"


def test_a_kind_below_the_operating_point_is_not_named() -> None:
    text = page_text(triaged(findings=FINDINGS[:1] + FINDINGS[3:]), configured())
    assert text.subject == "Herald: suspected intracranial haemorrhage 0.97"
    assert "IVH" not in text.body


@pytest.mark.usefixtures("berlin")
def test_the_body_says_what_a_reader_needs_at_three_in_the_morning() -> None:
    config = configured()
    body = page_text(triaged(), config).body
    *lines, link = body.splitlines()
    assert lines == [
        "Suspected intracranial haemorrhage",
        "AI triage, not a diagnosis",
        "",
        "Any haemorrhage: 0.97, 12.3 ml, slice 14 of 32",
        "Intraparenchymal (IPH): 0.95, 11.8 ml, slice 14 of 32",
        "Subarachnoid (SAH): 0.61, 0.5 ml, slice 9 of 32",
        "Scanner: CT-EAST",
        "Last image: 2026-03-29 01:15:30 UTC = 03:15:30 CEST (UTC+0200)",  # a quarter after the change of clocks
        "Accession: ...0329",
        "",
        "Review and acknowledge:",
    ]
    target = verify_link(config.webui, link.removeprefix("https://herald.example/page/"))
    assert (target.study_instance_uid, target.series_instance_uid, target.revision) == ("1.2.3", "1.2.3.4", 1)


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
    assert text.subject == "Herald: suspected intracranial haemorrhage"
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
