"""The validation report: flow, accuracy, protocol, drift, turnaround, and the file that it becomes."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_rows import END, ROOT, START, WANTED, analysed, excluded, label, reading, received

from herald.config import Config, LedgerConfig, ValidationConfig, WebuiConfig
from herald.errors import ConfigError
from herald.events import Label
from herald.ledger import open_ledger
from herald.validation.accuracy import by_kind, by_reference, ppv_by_week, series_cases, study_cases, two_by_two
from herald.validation.chain import append
from herald.validation.drift import ALL, drift
from herald.validation.flow import flow, place
from herald.validation.period import Head, period
from herald.validation.protocol import WANTED as WANTED_OF_REPORT
from herald.validation.protocol import agreement, implied
from herald.validation.report import as_json, figures, from_record, page
from herald.validation.row import ValidationRow
from herald.validation.turnaround import queue, steps
from router.decision import REQUIRED

CONFIG = Config(
    webui=WebuiConfig(public_url="https://herald.hospital.example"),
    validation=ValidationConfig(reference_days=14, window_days=7),
)
HEAD = Head(12, "ab" * 32)


def report(rows: Sequence[ValidationRow], config: Config = CONFIG):
    return figures(rows, START, END, config, HEAD)


# --- flow ------------------------------------------------------------------------------------------------------------

REASONS = (
    "too few slices: 5, a head scan has at least 8 (router.min_slices)",
    "the series has no instance in the store",
    "localizer: 2 scout images, no axial scan",
    "not a CT image: 3 x Secondary Capture Image Storage",
    "kernel: bone kernel (0.98) from the pixels, the header says nothing",
    "contrast: with contrast medium (1.00) from the pixels, the header says without contrast medium",
    "VolumeError",
    "PixelDataError: 12 images",
    "ServingUnavailable: model server",
    "something that nobody foresaw",
)

arbitrary_rows = st.lists(
    st.builds(
        received,
        number=st.integers(0, 8),
        disposition=st.sampled_from(["positive", "negative", "not_eligible", "failed", "unfinished"]),
        day=st.integers(0, 30),
        superseded=st.booleans(),
        reasons=st.lists(st.sampled_from(REASONS), max_size=2).map(tuple),
        probability=st.none() | st.floats(0, 1),
        readings=st.lists(
            st.builds(reading, st.sampled_from([True, False, None]), reader=st.sampled_from("abc")), max_size=2
        ).map(tuple),
        labels=st.lists(st.builds(label, st.booleans(), st.sampled_from("xy")), max_size=2).map(tuple),
        adjudicated=st.sampled_from([None, None, True, False]),
        protocol=st.sampled_from([{}, {head: Label(wanted, 0.9) for head, wanted in WANTED.items()}]),
        scanner=st.sampled_from(["", "A", "B"]),
        first_image_at=st.none() | st.datetimes(datetime(2026, 3, 1), datetime(2026, 3, 31), timezones=st.just(UTC)),
    ),
    max_size=30,
).map(lambda rows: [replace(row, series_instance_uid=f"{ROOT}.9.{i}") for i, row in enumerate(rows)])


@settings(max_examples=60, deadline=None)
@given(arbitrary_rows)
def test_every_row_is_in_exactly_one_box_and_each_box_is_the_sum_of_what_follows_it(rows: list[ValidationRow]) -> None:
    found = flow(rows)
    sides = (found.failed_by_input, found.failed_by_software, found.excluded_by_input, found.excluded_by_protocol)
    left = found.superseded + found.unfinished + sum(box.n for boxes in sides for box in boxes)
    assert found.received == len(rows) == left + found.analysed
    assert found.analysed == found.positive.n + found.negative.n
    for arm in (found.positive, found.negative):
        assert arm.n == arm.haemorrhage + arm.no_haemorrhage + arm.disputed + arm.without_reference
    assert sum(Counter(place(row) for row in rows).values()) == len(rows)
    # told again from the definitions, not from the code that counts
    current = [row for row in rows if not row.superseded]
    assert found.superseded == len(rows) - len(current)
    assert found.positive.haemorrhage == sum(r.disposition == "positive" and r.reference is True for r in current)
    assert found.negative.disputed == sum(r.disposition == "negative" and r.needs_adjudication for r in current)


@settings(max_examples=15, deadline=None)
@given(arbitrary_rows)
def test_whatever_the_rows_the_report_is_written_and_its_counts_agree(rows: list[ValidationRow]) -> None:
    found = report(rows)
    assert "None" not in re.sub(r"<style>.*?</style>|None\.", "", page(found), flags=re.DOTALL)
    assert json.loads(as_json(found)) == found
    for unit in ("study", "series"):
        c = found[unit]
        assert c["n"] == sum(
            c[name] for name in ("tp", "fp", "fn", "tn", "unverified_positives", "unverified_negatives")
        )


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (received(1, "not_eligible", reasons=(REASONS[0],)), ("not eligible", "input quality", "too few slices")),
        (received(1, "not_eligible", reasons=(REASONS[2],)), ("not eligible", "protocol", "localizer")),
        (received(1, "not_eligible", reasons=(REASONS[4],)), ("not eligible", "protocol", "kernel: bone kernel")),
        (received(1, "failed", reasons=("PixelDataError",)), ("failed", "input", "PixelDataError")),
        (received(1, "failed", reasons=(REASONS[8],)), ("failed", "software", "ServingUnavailable")),
        (received(1, "failed"), ("failed", "software", "error of no known class")),
        (received(1, "positive", superseded=True), ("superseded",)),
        (analysed(1, True, False), ("analysed", "positive", "no haemorrhage")),
        (analysed(1, False, True, labels=(label(False),)), ("analysed", "negative", "disputed")),
        (analysed(1, False), ("analysed", "negative", "none")),
    ],
)
def test_input_quality_is_told_apart_from_protocol_and_from_software(row, expected) -> None:
    assert place(row) == expected


# --- accuracy --------------------------------------------------------------------------------------------------------


def test_a_study_is_positive_if_any_of_its_series_is_and_has_the_highest_probability() -> None:
    thick = analysed(1, positive=False, truth=True, probability=0.3)
    thin = replace(analysed(1, positive=True, probability=0.8), series_instance_uid=f"{ROOT}.1.2")
    (study,) = study_cases([thick, thin])
    assert (study.positive, study.probability, study.series_instance_uid) == (True, 0.8, f"{ROOT}.1.2")
    assert study.truth is True  # the verdict on the other series is about this study
    assert len(series_cases([thick, thin])) == 2
    by_series = two_by_two(series_cases([thick, thin]))
    assert (by_series.fn, by_series.unverified_positives) == (1, 1)


def test_a_reader_who_sees_blood_in_one_series_has_seen_it_in_the_study() -> None:
    bleeding = analysed(1, positive=True, truth=True, probability=0.8)
    clean = replace(analysed(1, positive=False, truth=False), series_instance_uid=f"{ROOT}.1.2")
    (study,) = study_cases([bleeding, clean])
    assert study.truth is True
    other = replace(clean, readings=(reading(False, reader="rudi"),))
    (study,) = study_cases([bleeding, other])
    assert study.disputed


def test_superseded_and_excluded_series_are_in_no_table() -> None:
    assert study_cases([analysed(1, superseded=True), excluded(2), received(3, "failed")]) == []


def cohort(tp: int, fp: int, fn: int, tn: int, unverified: tuple[int, int] = (0, 0)) -> list[ValidationRow]:
    kinds = [(True, True)] * tp + [(True, False)] * fp + [(False, True)] * fn + [(False, False)] * tn
    kinds += [(True, None)] * unverified[0] + [(False, None)] * unverified[1]
    return [analysed(i, answer, truth, day=i % 28) for i, (answer, truth) in enumerate(kinds)]


def test_the_2x2_and_its_shares_are_those_of_the_cohort() -> None:
    found = two_by_two(study_cases(cohort(81, 9, 182, 700)))
    assert (found.tp, found.fp, found.fn, found.tn) == (81, 9, 182, 700)
    assert (found.sensitivity.low, found.sensitivity.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert found.ppv.value == 0.9
    assert found.accuracy.value == pytest.approx(781 / 972)
    assert found.corrected is None
    assert found.warnings == ()


def test_where_only_positives_have_verdicts_sensitivity_is_not_estimable_and_the_words_say_why() -> None:
    found = report(cohort(30, 10, 0, 0, (2, 200)))
    study = found["study"]
    for name in ("sensitivity", "specificity", "npv", "accuracy", "auc"):
        assert study[name]["value"] is None, name
    assert study["ppv"]["value"] == 0.75
    assert study["corrected"] is None
    assert study["warnings"][0] == "2 of 42 positives have no reference standard."
    assert "verification bias" in study["warnings"][1]
    html = page(found)
    assert "No negative has a reference standard (verification bias)" in html
    assert re.search(r"Sensitivity</th><td><span class=\"none\">not estimable", html)
    assert "<svg" in html
    assert "ROC by study" not in html


def test_where_few_negatives_have_verdicts_the_figures_are_corrected_and_marked() -> None:
    found = two_by_two(study_cases(cohort(45, 5, 5, 95, (0, 900))))
    assert found.sensitivity.value == 0.9  # of those with a reference
    assert found.corrected is not None
    assert found.corrected.sensitivity.value == pytest.approx(45 / (45 + 1000 * 0.05))
    assert "partial verification" in found.warnings[0]


def test_blind_readings_are_told_apart_from_those_of_who_saw_the_prediction() -> None:
    rows = [
        analysed(n, positive=True, readings=(reading(n % 2 == 0, shown=n < 20, agrees=n % 2 == 0),)) for n in range(30)
    ]
    rows += [analysed(n, positive=False, labels=(label(False),)) for n in range(30, 40)]
    found = {group.name: group.counts for group in by_reference(study_cases(rows))}
    assert found["blind readings"].ppv.n == 10
    assert found["unblinded readings"].ppv.n == 20
    assert found["imported labels"].npv.n == 10
    assert "report text by rule" not in found


def test_sensitivity_by_kind_is_of_what_readers_saw() -> None:
    def seen(n: int, positive: bool, kind: str) -> ValidationRow:
        return analysed(n, positive, readings=(reading(True, agrees=positive, kind=kind),))

    rows = [seen(n, n < 8, "sah") for n in range(10)] + [seen(n, True, "iph") for n in range(10, 13)]
    rows += [analysed(n, False, False) for n in range(13, 40)]
    found = {kind.name: kind for kind in by_kind(study_cases(rows))}
    assert (found["sah"].sensitivity.hits, found["sah"].sensitivity.n) == (8, 10)
    assert found["iph"].few
    assert found["iph"].sensitivity.n == 3


def test_groups_of_fewer_than_five_carry_a_warning() -> None:
    rows = cohort(8, 2, 2, 30) + [analysed(90 + n, True, True, scanner="CT-RARE") for n in range(4)]
    rare = [g for g in report(rows)["groups"]["scanner"] if g["name"] == "CT-RARE"]
    assert rare[0]["few"]
    assert "⚠ fewer than 5" in page(report(rows))


def test_a_week_whose_ppv_falls_is_an_alarm_in_words() -> None:
    rows = [analysed(n, True, n % 28 < 21 or n % 5 == 0, day=n % 28) for n in range(280)]
    overall, weeks = ppv_by_week(study_cases(rows), START, END)
    assert overall == pytest.approx(sum(n % 28 < 21 or n % 5 == 0 for n in range(280)) / 280)
    assert [week.point.verdict for week in weeks] == ["above", "above", "above", "below", "too few"]
    assert "in the week from 2026-03-22 the PPV was" in page(report(rows))


# --- protocol --------------------------------------------------------------------------------------------------------


def test_the_report_wants_of_a_series_what_the_router_requires() -> None:
    assert dict(REQUIRED) == WANTED_OF_REPORT


def test_a_verdict_on_an_exclusion_implies_the_truth_of_a_head_and_one_on_haemorrhage_does_not() -> None:
    assert implied(excluded(1, verdict="agree"), "kernel") is False
    assert implied(excluded(1, verdict="agree"), "contrast") is None
    assert implied(excluded(1, verdict="disagree"), "contrast") is True
    assert implied(excluded(1), "kernel") is None
    assert implied(analysed(1, True, True), "kernel") is None
    two = excluded(1, verdict="agree")
    two = replace(two, protocol={**two.protocol, "contrast": Label("contrast", 0.9)})
    assert implied(two, "kernel") is None  # either may be the reason that the reader agrees with


def test_header_and_pixels_are_compared_where_the_header_speaks() -> None:
    rows = [analysed(n) for n in range(6)]
    rows += [analysed(n, header={**WANTED, "kernel": "bone"}) for n in range(6, 8)]
    rows += [excluded(8, verdict="agree"), excluded(9, verdict="disagree", header=dict(WANTED))]
    kernel = next(head for head in agreement(rows) if head.head == "kernel")
    assert (kernel.n, kernel.silent) == (10, 1)
    assert (kernel.agreement.hits, kernel.agreement.n) == (6, 9)
    assert kernel.labels == ("soft", "bone")
    assert kernel.confusion == ((6, 1), (2, 0), (0, 1))
    assert kernel.known == 2
    assert kernel.pixels.value == 0.5  # the bone kernel was one, once
    assert kernel.headers.value == 0.5  # silent is not right


# --- drift -----------------------------------------------------------------------------------------------------------


def stream(shift_of_b: float = 0.0, kernel_of_b: str = "H30s") -> list[ValidationRow]:
    """Two scanners, 24 days, eight series a day each; the second changes on day 14."""
    rows = []
    for n in range(24 * 16):
        day, second = n // 16, n % 2 == 1
        changed = second and day >= 14
        noise = 4 + ((n * 7919) % 101 - 50) / 50 + (shift_of_b if changed else 0)
        rows.append(
            analysed(
                n,
                positive=n % 11 == 0,
                day=day,
                scanner="B" if second else "A",
                noise_hounsfield=noise,
                convolution_kernel=kernel_of_b if changed else "H30s",
            )
        )
    return rows


def test_drift_is_flagged_for_the_scanner_that_drifts_and_not_for_the_other() -> None:
    found = drift(stream(shift_of_b=1.0, kernel_of_b="H40s"), START, START + timedelta(days=24), 14, 7)
    flagged = {(c.scanner, c.measure) for c in found.flagged}
    assert {("B", "noise_hounsfield"), ("B", "convolution_kernel")} <= flagged
    assert "A" not in {scanner for scanner, _ in flagged}
    assert {c.scanner for c in found.comparisons} == {ALL, "A", "B"}


def test_nothing_is_flagged_where_nothing_drifts() -> None:
    assert drift(stream(), START, START + timedelta(days=24), 14, 7).flagged == []


def test_a_difference_that_is_significant_and_small_is_not_flagged() -> None:
    rows = []
    for n in range(4000):
        shift = 0.15 if n >= 2000 else 0.0
        noise = 4 + ((n * 7919) % 1009 - 504) / 504 + shift
        rows.append(analysed(n, day=(n // 2000) * 14 + 1, noise_hounsfield=noise))
    found = drift(rows, START, START + timedelta(days=21), 14, 7)
    noise = next(c for c in found.comparisons if c.measure == "noise_hounsfield" and c.n)
    assert noise.p_holm is not None
    assert noise.p_holm < 0.01
    assert noise.effect is not None
    assert noise.effect < noise.effect_limit
    assert not noise.flagged


def test_a_period_within_its_reference_days_tests_nothing_and_says_so() -> None:
    found = figures(stream(), START, START + timedelta(days=10), CONFIG, HEAD)
    assert found["drift"]["comparisons"] == []
    assert "Nothing could be tested" in page(found)


# --- turnaround ------------------------------------------------------------------------------------------------------


def test_steps_have_percentiles_and_leave_out_what_ends_before_it_starts() -> None:
    rows = [analysed(n, triaged_at=START + timedelta(days=1, seconds=n)) for n in range(100)]
    rows = [replace(row, last_image_at=START + timedelta(days=1)) for row in rows]
    rows.append(analysed(200, last_image_at=START + timedelta(hours=1), triaged_at=START))
    found = {step.name: step for step in steps(rows)}["last image to result"]
    assert (found.n, found.negative) == (100, 1)
    assert (found.p50_s, found.p90_s) == pytest.approx((49.5, 89.1))


def test_a_page_is_counted_once_for_each_study() -> None:
    paged = START + timedelta(hours=1)
    first = analysed(1, triaged_at=START + timedelta(minutes=59), paged_at=paged)
    later = replace(first, series_instance_uid=f"{ROOT}.1.2", triaged_at=START + timedelta(hours=2))
    negative = analysed(2, positive=False, paged_at=paged)
    found = {step.name: step for step in steps([first, later, negative])}["result to page sent"]
    assert (found.n, found.negative, found.p50_s) == (1, 0, 60.0)


def busy_site() -> list[ValidationRow]:
    """Ten days on which a study comes every seven minutes by day, each tenth a bleed that is found."""
    rows = []
    for n in range(600):
        at = START + timedelta(days=n // 60, hours=8, minutes=7 * (n % 60))
        times = {"first_image_at": at, "last_image_at": at, "triaged_at": at + timedelta(seconds=8)}
        rows.append(analysed(n, positive=n % 10 == 3, truth=n % 10 == 3, **times))
    return rows


def test_moving_positives_forward_saves_them_time_and_costs_the_others_some() -> None:
    found = queue(busy_site(), readers=1, read_minutes=6.5)
    saving = {s.name: s for s in found.savings}
    positive, negative = saving["positive"], saving["negative"]
    assert positive.n == 60
    assert positive.saved_low is not None
    assert positive.saved_low > 0
    assert negative.saved is not None
    assert negative.saved < 0
    # readings last as long for all, so that on average nobody gains: what is saved here is lost there
    assert positive.saved is not None
    assert positive.saved * 60 == pytest.approx(-negative.saved * 540, rel=0.15)
    assert found == queue(busy_site(), readers=1, read_minutes=6.5)


def test_readers_who_cannot_keep_up_are_told() -> None:
    found = queue(busy_site(), readers=1, read_minutes=60)
    assert "cannot keep up" in found.warnings[0]


def test_without_verdicts_readers_and_times_are_assumed_and_said_to_be() -> None:
    rows = [replace(row, readings=()) for row in busy_site()]
    found = queue(rows).reading
    assert found.readers_from == "assumed; give --readers"
    assert found.minutes_from == "assumed; give --read-minutes"


def test_reading_times_are_estimated_from_the_verdicts_of_a_reader_with_work_waiting() -> None:
    rows = [
        replace(row, last_image_at=START, readings=(reading(False, day=1 + n * 5 / 1440),))
        for n, row in enumerate(busy_site()[:40])
    ]
    found = queue(rows).reading
    assert found.minutes == pytest.approx(5.0)
    assert found.minutes_from.startswith("mean of 39 gaps")


# --- the file --------------------------------------------------------------------------------------------------------


def test_same_rows_in_any_order_give_the_same_bytes() -> None:
    rows = [*cohort(20, 5, 3, 60), excluded(200, verdict="agree"), received(201, "failed", reasons=("VolumeError",))]
    first, second = report(rows), report(rows[::-1])
    assert page(first) == page(second)
    assert as_json(first) == as_json(second)


def test_the_file_loads_nothing_and_names_no_patient() -> None:
    html = page(report([replace(row, accession_number="ACC-SECRET") for row in cohort(20, 5, 3, 60)]))
    assert not re.search(r"<script|<link|<img|@import|url\(|src=", html)
    assert set(re.findall(r'href="([^"]*)"', html)) == {
        f"https://herald.hospital.example/series/{ROOT}.{n}.1/1" for n in range(20, 28)
    }
    assert "ACC-SECRET" not in html
    assert "rita" not in html


def test_what_a_header_says_is_escaped() -> None:
    html = page(report([analysed(n, True, False, scanner="<script>alert(1)</script>") for n in range(30)]))
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_discordant_studies_are_listed_missed_bleeds_first() -> None:
    rows = [*cohort(5, 2, 3, 20), analysed(90, True, True, labels=(label(False),))]
    assert [d["what"] for d in report(rows)["discordant"]] == (
        ["false negative"] * 3 + ["false positive"] * 2 + ["answers differ"]
    )


def test_the_report_says_from_which_record_settings_and_versions_it_is() -> None:
    rows = [analysed(n, software_version="1.0" if n < 5 else "1.1") for n in range(10)]
    html = page(report(rows))
    assert HEAD.sha256 in html
    assert "several in one period" in html
    assert [list(found) for found in report(rows)["versions"]["software"]] == [["1.0", 5], ["1.1", 5]]


def test_an_empty_period_is_a_report_too() -> None:
    html = page(report([]))
    assert "0 series revisions received" in html


def test_a_period_is_of_whole_days_and_its_last_is_included() -> None:
    assert period(date(2026, 3, 1), date(2026, 3, 31)) == (START, END)
    with pytest.raises(ConfigError, match="ends before it starts"):
        period(date(2026, 3, 2), date(2026, 3, 1))


# --- command ---------------------------------------------------------------------------------------------------------


def herald(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "HERALD_LEDGER__URL": f"sqlite:///{folder / 'ledger.sqlite'}", "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-m", "herald", "report", "--from", "2026-03-01", "--to", "2026-03-31", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)


def test_the_command_writes_the_same_bytes_as_the_library_and_verifies_the_record(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.sqlite'}"
    ledger = open_ledger(LedgerConfig(url=url))
    try:
        append(ledger, cohort(20, 5, 3, 60), END)
        with ledger.read() as connection:
            expected = from_record(connection, Config(), date(2026, 3, 1), date(2026, 3, 31))
        done = herald(tmp_path, "--html", "out/report.html", "--json", "out/report.json", "--verify")
        assert done.returncode == 0, done.stderr
        assert "88 entries hold" in done.stderr
        head = expected["record"]["sha256"]
        figures_of_command = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
        assert figures_of_command["record"] == {"entries": 88, "sha256": head}
        for told in (figures_of_command, expected):
            del told["made_by"], told["discordant"]  # of the settings, which differ by where the command runs
        assert as_json(figures_of_command) == as_json(json.loads(as_json(expected)))
        with ledger.begin() as connection:  # as who may write to the file could
            triggers = "select name from sqlite_master where type = 'trigger' and tbl_name = 'validation'"
            for (trigger,) in connection.exec_driver_sql(triggers).all():
                connection.exec_driver_sql(f"drop trigger {trigger}")
            connection.exec_driver_sql("update validation set row = replace(row, 'CT-1', 'CT-2') where entry = 40")
        broken = herald(tmp_path, "--html", "never.html", "--verify", "--head", head, "--entries", "88")
        assert broken.returncode == 1
        assert "entry 40" in broken.stderr
        assert not (tmp_path / "never.html").exists()
    finally:
        ledger.close()
