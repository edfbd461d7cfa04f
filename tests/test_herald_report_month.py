"""A small simulated month through the real tables: what was put in is what the report finds."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from herald.config import load_config
from herald.errors import ConfigError
from herald.ledger import Ledger, labels, open_ledger, pages, results, reviews, series
from herald.validation import month
from herald.validation.chain import verify
from herald.validation.report import as_json, from_record, page
from webui.record import complete_results

FIRST, LAST = month.START.date(), (month.START + timedelta(days=month.DAYS - 1)).date()


@dataclass(frozen=True)
class Simulated:
    folder: Path
    ledger: Ledger
    figures: dict[str, Any]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulated]:
    folder = tmp_path_factory.mktemp("month")
    month.main(folder, seed=3, series_count=300)
    config = load_config(folder / "herald.toml", {})
    ledger = open_ledger(config.ledger)
    try:
        with ledger.read() as connection:
            yield Simulated(folder, ledger, from_record(connection, config, FIRST, LAST))
    finally:
        ledger.close()


def test_the_drift_of_the_scanner_that_drifts_is_flagged_and_the_other_s_is_not(simulated: Simulated) -> None:
    flagged = {(c["scanner"], c["measure"]) for c in simulated.figures["drift"]["comparisons"] if c["flagged"]}
    assert ("CT-SOUTH", "noise_hounsfield") in flagged
    assert "CT-NORTH" not in {scanner for scanner, _ in flagged}
    first = min(c["start"] for c in simulated.figures["drift"]["comparisons"] if c["flagged"])
    assert first >= (month.START + timedelta(days=month.REFERENCE_DAYS)).isoformat()


def test_the_flow_is_that_of_the_tables(simulated: Simulated) -> None:
    with simulated.ledger.read() as connection:
        received = connection.execute(select(series.c.series_instance_uid, series.c.revision)).all()
        decided = Counter(
            connection.execute(select(results.c.disposition).where(results.c.superseded.is_(False))).scalars()
        )
        superseded = len(connection.execute(select(results).where(results.c.superseded)).all())
    flow = simulated.figures["flow"]
    assert len({uid for uid, _ in received}) == 300
    assert flow["received"] == len(received)
    assert flow["superseded"] == superseded
    assert flow["positive"]["n"] == decided["positive"]
    assert flow["negative"]["n"] == decided["negative"]
    excluded = [*flow["excluded_by_input"], *flow["excluded_by_protocol"]]
    assert sum(box["n"] for box in excluded) == decided["not_eligible"]
    assert sum(box["n"] for box in [*flow["failed_by_input"], *flow["failed_by_software"]]) == decided["failed"]
    assert flow["unfinished"] == len(received) - superseded - sum(decided.values())


def test_what_a_later_revision_hides_is_decided_by_the_rule_of_the_worklist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def analysed_then_failed(a_month: Any, study: Any) -> list[Any]:
        analysed = month._analysed(a_month, study, 1)
        failed = month._event(a_month, study, 1, 2, "failed", reasons=("PixelDataError: simulated",))
        return [month._Decided(analysed, study), month._Decided(failed, study)]

    monkeypatch.setattr(month, "_main_series", analysed_then_failed)
    month.main(tmp_path, seed=3, series_count=60)
    ledger = open_ledger(load_config(tmp_path / "herald.toml", {}).ledger)
    first = select(results.c.disposition, results.c.superseded).where(
        results.c.series_instance_uid.in_(select(results.c.series_instance_uid).where(results.c.revision == 2)),
        results.c.revision == 1,
    )
    with ledger.read() as connection:
        found = {tuple(row) for row in connection.execute(first)}
    assert found == {("positive", False), ("negative", True)}  # nobody has acknowledged the positive
    assert complete_results(ledger) == 0
    ledger.close()


def test_every_kind_of_row_went_through_the_real_tables_and_an_unbroken_record(simulated: Simulated) -> None:
    with simulated.ledger.read() as connection:
        for table in (pages, reviews, labels):
            assert connection.execute(select(table)).first() is not None, table.name
    verified = verify(simulated.ledger)
    assert verified.fault is None
    assert simulated.figures["record"] == {"entries": verified.entries, "sha256": verified.head_sha256}
    references = {group["name"] for group in simulated.figures["references"]}
    assert {"imported labels", "report text by rule", "blind readings", "unblinded readings"} <= references


def test_the_same_seed_gives_the_same_report_and_another_seed_another(simulated: Simulated, tmp_path: Path) -> None:
    found = []
    for seed in (3, 4):
        folder = tmp_path / str(seed)
        month.main(folder, seed=seed, series_count=300)
        config = load_config(folder / "herald.toml", {})
        ledger = open_ledger(config.ledger)
        try:
            with ledger.read() as connection:
                found.append(from_record(connection, config, FIRST, LAST))
        finally:
            ledger.close()
    same = {**found[0], "made_by": simulated.figures["made_by"]}  # the settings name the folder
    assert page(same) == page(simulated.figures)
    assert as_json(same) == as_json(simulated.figures)
    assert found[1]["study"] != found[0]["study"]


def test_a_folder_that_has_a_ledger_is_left_alone(simulated: Simulated) -> None:
    with pytest.raises(ConfigError, match="has a ledger already"):
        month.main(simulated.folder)


def test_the_documentation_repeats_the_figures_of_the_report_beside_it() -> None:
    docs = Path(__file__).parent.parent / "docs"
    text = (docs / "validation-report.md").read_text(encoding="utf-8")
    html = (docs / "validation-report.html").read_text(encoding="utf-8")
    report = " ".join(re.sub(r"<[^>]+>", " ", html).split())
    told = dict(re.findall(r"^\| ([^|]+?) \| ([^|]*\d[^|]*?) \|$", text, re.MULTILINE))
    assert len(told) >= 12
    for what, figures in told.items():
        for figure in figures.split("; "):
            assert re.sub(r"[()]", "", figure) in report, f"{what}: {figure} is not in docs/validation-report.html"
    assert "Simulated: 3031 of these series were drawn, not measured." in report
    assert len(html) < 300_000
