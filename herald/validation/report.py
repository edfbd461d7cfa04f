"""The validation report: rows of the record in, figures and one HTML file out.

    found = figures(rows, start, end, config, Head(entries, sha256))
    Path("report.html").write_text(page(found))

The file is drawn from the figures alone, and these are what the JSON holds. Same rows, period and settings, same bytes:
nothing of it is of now or of chance. It names no patient: series are links, for who may follow them.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from datetime import date, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from sqlalchemy import Connection

from herald import __version__
from herald.config import Config, version
from herald.validation import accuracy, charts, drift, statistics, turnaround
from herald.validation.accuracy import Case
from herald.validation.chain import latest
from herald.validation.flow import flow
from herald.validation.period import Head, head, period
from herald.validation.protocol import agreement
from herald.validation.row import ValidationRow

TEMPLATES = Path(__file__).parent / "templates"
STYLE = TEMPLATES / "report.css"

Figures = dict[str, Any]

SIMULATED = "simulated"
"""Version of the configuration in rows that nobody measured; a report of any such row says so."""


@dataclass(frozen=True)
class Discordant:
    """A study whose answer is not that of the reference, or whose reference is disputed."""

    what: str
    day: date
    scanner: str
    probability: float
    said_by: str
    link: str


def from_record(
    connection: Connection,
    config: Config,
    first: date,
    last: date,
    readers: int | None = None,
    read_minutes: float | None = None,
) -> Figures:
    """Figures of the series that came from one day to another, both included; raises what the connection raises."""
    start, end = period(first, last)
    record = head(connection)
    return figures(latest(connection, start, end), start, end, config, record, readers, read_minutes)


def figures(
    rows: Iterable[ValidationRow],
    start: datetime,
    end: datetime,
    config: Config,
    record: Head,
    readers: int | None = None,
    read_minutes: float | None = None,
) -> Figures:
    """Everything that the report says of rows between two times, as what JSON can hold.

    `readers` and `read_minutes` are those of the queue simulation; None lets the rows tell.
    """
    rows = sorted(rows, key=lambda row: (row.study_instance_uid, row.series_instance_uid, row.revision))
    studies, series = accuracy.study_cases(rows), accuracy.series_cases(rows)
    overall, weeks = accuracy.ppv_by_week(studies, start, end)
    reference_days, window_days = config.validation.reference_days, config.validation.window_days
    plain: Figures = _plain(
        {
            "period": {"start": start, "end": end, "days": (end - start).days},
            "record": record,
            "made_by": {"software": __version__, "config": version(config)},
            "versions": _versions(rows),
            "simulated": sum(row.config_version == SIMULATED for row in rows),
            "rules": _rules(config),
            "flow": flow(rows),
            "study": accuracy.two_by_two(studies),
            "series": accuracy.two_by_two(series),
            "discrimination": accuracy.discrimination(studies),
            "kinds": accuracy.by_kind(studies),
            "groups": {
                "scanner": accuracy.by_group(studies, lambda case: case.scanner),
                "kernel": accuracy.by_group(studies, lambda case: case.kernel),
                "site": accuracy.by_group(studies, lambda case: case.site),
            },
            "references": accuracy.by_reference(studies),
            "protocol": agreement(rows),
            "ppv": {"overall": overall, "weeks": weeks},
            "drift": drift.drift(rows, start, end, reference_days, window_days),
            "steps": turnaround.steps(rows),
            "queue": turnaround.queue(rows, readers, read_minutes),
            "discordant": _discordant(studies, config),
        }
    )
    return plain


def as_json(found: Figures) -> str:
    """The figures as JSON, keys sorted."""
    return json.dumps(found, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def page(found: Figures) -> str:
    """The report as one HTML file that loads nothing."""
    return _environment().get_template("report.html").render(found, style=Markup(STYLE.read_text("utf-8")))


def body(found: Figures) -> Markup:
    """The report's sections alone, for a page that brings the style sheet and the frame."""
    return Markup(_environment().get_template("sections.html").render(found))


# --- what it is made of ----------------------------------------------------------------------------------------------


def _versions(rows: Sequence[ValidationRow]) -> dict[str, list[tuple[str, int]]]:
    """By which versions the series were decided, and how many by each; several in one period are not one study."""
    found: dict[str, Counter[str]] = {"software": Counter(), "configuration": Counter(), "mode": Counter()}
    for row in rows:
        for name, value in (
            ("software", row.software_version),
            ("configuration", row.config_version),
            ("mode", row.mode),
        ):
            if value:
                found[name][value] += 1
        for model, value in row.model_versions.items():
            found.setdefault(f"model {model}", Counter())[value] += 1
    return {name: sorted(counts.items()) for name, counts in sorted(found.items()) if counts}


def _rules(config: Config) -> dict[str, Any]:
    """Every limit by which the report judges, so that its words say what was done."""
    return {
        "level": statistics.LEVEL,
        "few": accuracy.FEW,
        "sigmas": statistics.SIGMAS,
        "least_of_week": statistics.LEAST_OF_WEEK,
        "reference_days": config.validation.reference_days,
        "window_days": config.validation.window_days,
        "alpha": drift.ALPHA,
        "ks_distance": drift.KS_DISTANCE,
        "psi": drift.PSI,
        "least_of_window": drift.LEAST,
        "rounds": turnaround.ROUNDS,
        "resamples": turnaround.RESAMPLES,
        "operating_point": config.router.operating_point,
    }


def _discordant(studies: Sequence[Case], config: Config) -> list[Discordant]:
    """Missed bleeds first, then false alarms, then disputes; the surest answers first."""
    address = (config.webui.public_url or config.notifier.webui_url).rstrip("/")
    found = []
    for case in studies:
        if case.truth is not None and case.truth != case.positive:
            what = "false negative" if case.truth else "false positive"
        elif case.disputed:
            what = "answers differ"
        else:
            continue
        said_by = [name for name in accuracy.REFERENCES if case.truth_by(name) is not None]
        link = f"{address}/series/{case.series_instance_uid}/{case.revision}"
        found.append(
            Discordant(what, case.at.date(), case.scanner, case.probability, ", ".join(said_by) or "several", link)
        )
    order = {"false negative": 0, "false positive": 1, "answers differ": 2}

    def place(one: Discordant) -> tuple[int, float, str]:
        return order[one.what], one.probability if one.what == "false negative" else -one.probability, one.link

    return sorted(found, key=place)


def _plain(value: Any) -> Any:
    """What JSON holds: no dataclasses, times as text, floats of ten digits and none that is no number."""
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.10g}") if math.isfinite(value) else None
    return value.isoformat() if isinstance(value, datetime | date) else value


# --- how it is written -----------------------------------------------------------------------------------------------

FINDINGS = {
    "any": "any haemorrhage",
    "iph": "intraparenchymal",
    "ivh": "intraventricular",
    "sah": "subarachnoid",
    "edh_sdh": "epidural or subdural",
}


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., str]] = {"percent": _percent, "lasts": _lasts, "number": _number, "p": _p}
    environment.filters.update(filters)
    environment.globals.update(
        charts=charts, findings=FINDINGS, before=_day_before, last_day=lambda span: _day_before(span["end"])
    )
    return environment


def _day_before(end: str) -> str:
    """The last day of what ends at a time."""
    return (datetime.fromisoformat(end) - timedelta(microseconds=1)).date().isoformat()


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _lasts(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
