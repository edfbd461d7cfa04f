"""Drift of inputs and scores: each window of the period against its first days, by scanner and all together.

Numbers are compared by the two-sample Kolmogorov-Smirnov test, categories by the chi-square test of independence; p is
corrected by Holm's method over every test of the report. A difference is flagged only where p says that it is there
and the size of the effect that it matters: many series make any difference significant.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests  # type: ignore[import-untyped]

from herald.validation.accuracy import arrived_at
from herald.validation.row import ValidationRow

ALPHA = 0.05
"""Of Holm's corrected p."""
KS_DISTANCE = 0.2
"""Distance of the two cumulative shares from which a number has drifted: a shift of half a standard deviation."""
PSI = 0.25
"""Population stability index from which categories have drifted; the usual limit of a major change (Siddiqi 2006)."""
LEAST = 20
"""Series without which neither side of a comparison tells anything."""
LEAST_EXPECTED = 5.0
"""Categories expected more rarely than this are taken together, so that chi-square holds (Cochran 1954)."""

ALL = "all scanners"

NUMBERS: Mapping[str, Callable[[ValidationRow], float | None]] = {
    "probability": lambda row: row.probability if row.analysed else None,
    "tissue_hounsfield": lambda row: row.tissue_hounsfield,
    "noise_hounsfield": lambda row: row.noise_hounsfield,
    "slice_thickness_mm": lambda row: row.slice_thickness_mm,
    "slice_count": lambda row: row.slice_count or None,
}
CATEGORIES: Mapping[str, Callable[[ValidationRow], str]] = {
    "disposition": lambda row: row.disposition,
    "convolution_kernel": lambda row: row.convolution_kernel,
    "scanner": lambda row: scanner_of(row),
}


@dataclass(frozen=True)
class Comparison:
    """One measure of one scanner in one window against the reference; p is None where it was not tested."""

    scanner: str
    start: datetime
    end: datetime
    measure: str
    test: str
    n_reference: int
    n: int
    reference_says: str
    """Median of a number, the commonest of categories; here and next."""
    says: str
    effect: float | None
    effect_limit: float
    p: float | None
    p_holm: float | None = None
    flagged: bool = False


@dataclass(frozen=True)
class DailyMedian:
    """A number of one scanner on one day."""

    day: datetime
    median: float
    n: int


@dataclass(frozen=True)
class Drift:
    """Every comparison, and the daily medians to draw."""

    reference_start: datetime
    reference_end: datetime
    comparisons: list[Comparison]
    daily: dict[str, dict[str, list[DailyMedian]]]
    """By measure and scanner."""

    @property
    def flagged(self) -> list[Comparison]:
        """Those that have drifted."""
        return [comparison for comparison in self.comparisons if comparison.flagged]


def scanner_of(row: ValidationRow) -> str:
    """Its station name, else who sent it."""
    return row.scanner or row.calling_ae_title or "not known"


def drift(
    rows: Sequence[ValidationRow], start: datetime, end: datetime, reference_days: float, window_days: float
) -> Drift:
    """Compare windows of `window_days` after the first `reference_days` of the period with those first days."""
    current = [(at, row) for row in rows if not row.superseded and (at := arrived_at(row)) is not None]
    current.sort(key=lambda item: (item[0], item[1].series_instance_uid, item[1].revision))
    reference_end = min(start + timedelta(days=reference_days), end)
    windows = []
    opens = reference_end
    while opens < end:
        closes = min(opens + timedelta(days=window_days), end)
        windows.append((opens, closes))
        opens = closes
    scanners = sorted({scanner_of(row) for _, row in current})
    comparisons = []
    for scope in [ALL, *(scanners if len(scanners) > 1 else ())]:
        of_scope = [(at, row) for at, row in current if scope in (ALL, scanner_of(row))]
        reference = [row for at, row in of_scope if start <= at < reference_end]
        for opens, closes in windows:
            window = [row for at, row in of_scope if opens <= at < closes]
            comparisons += _compare(scope, opens, closes, reference, window)
    return Drift(start, reference_end, _corrected(comparisons), _daily(current, scanners, start, end))


def _compare(
    scope: str, opens: datetime, closes: datetime, reference: Sequence[ValidationRow], window: Sequence[ValidationRow]
) -> list[Comparison]:
    found = []
    for measure, number in NUMBERS.items():
        before = np.array([value for row in reference if (value := number(row)) is not None], dtype=float)
        after = np.array([value for row in window if (value := number(row)) is not None], dtype=float)
        effect = p = None
        if min(len(before), len(after)) >= LEAST:
            effect, p = ks(before, after)
        says = [f"{np.median(values):.3g}" if len(values) else "" for values in (before, after)]
        sizes = (len(before), len(after))
        found.append(
            Comparison(
                scope, opens, closes, measure, "Kolmogorov-Smirnov", *sizes, says[0], says[1], effect, KS_DISTANCE, p
            )
        )
    for measure, category in CATEGORIES.items():
        if measure == "scanner" and scope != ALL:
            continue
        counts = [Counter(filter(None, map(category, side))) for side in (reference, window)]
        effect = p = None
        if min(counts[0].total(), counts[1].total()) >= LEAST:
            effect, p = psi(*counts), chi_square(*counts)
        says = [_commonest(side) for side in counts]
        totals = (counts[0].total(), counts[1].total())
        found.append(Comparison(scope, opens, closes, measure, "chi-square", *totals, says[0], says[1], effect, PSI, p))
    return found


def _commonest(counts: Counter[str]) -> str:
    if not counts:
        return ""
    name, n = min(counts.items(), key=lambda item: (-item[1], item[0]))
    return f"{name} {n / counts.total():.0%}"


def ks(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """Largest distance of the cumulative shares of two samples (N,) and (M,), and its asymptotic p."""
    found = stats.ks_2samp(before, after, method="asymp")
    return float(found.statistic), float(found.pvalue)


def chi_square(before: Counter[str], after: Counter[str]) -> float | None:
    """p of the two sides having the same shares, rare categories taken together; None with a single category."""
    total = before.total() + after.total()
    smaller = min(before.total(), after.total())
    columns, rest = [], [0, 0]
    for name in sorted(set(before) | set(after)):
        if smaller * (before[name] + after[name]) / total < LEAST_EXPECTED:
            rest[0] += before[name]
            rest[1] += after[name]
        else:
            columns.append([before[name], after[name]])
    if sum(rest):
        columns.append(rest)
    if len(columns) < 2:
        return None
    return float(stats.chi2_contingency(np.array(columns).T, correction=False).pvalue)


def psi(before: Counter[str], after: Counter[str]) -> float:
    """Population stability index; half a case is added to each category so that a new one counts and is finite."""
    names = sorted(set(before) | set(after))
    a, b = (np.array([side[name] + 0.5 for name in names]) for side in (before, after))
    a, b = a / a.sum(), b / b.sum()
    return float(((b - a) * np.log(b / a)).sum())


def _corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """With Holm's p over all that were tested, and flagged where p and effect both say so."""
    tested = [comparison.p for comparison in comparisons if comparison.p is not None]
    if not tested:
        return list(comparisons)
    holm = iter(multipletests(tested, ALPHA, method="holm")[1])
    out = []
    for comparison in comparisons:
        if comparison.p is None or comparison.effect is None:
            out.append(comparison)
            continue
        p = float(next(holm))
        out.append(replace(comparison, p_holm=p, flagged=p < ALPHA and comparison.effect >= comparison.effect_limit))
    return out


def _daily(
    current: Sequence[tuple[datetime, ValidationRow]], scanners: Sequence[str], start: datetime, end: datetime
) -> dict[str, dict[str, list[DailyMedian]]]:
    values: dict[tuple[str, str, int], list[float]] = {}
    for at, row in current:
        if start <= at < end:
            for measure, number in NUMBERS.items():
                if (value := number(row)) is not None:
                    values.setdefault((measure, scanner_of(row), (at - start).days), []).append(value)
    daily: dict[str, dict[str, list[DailyMedian]]] = {m: {scanner: [] for scanner in scanners} for m in NUMBERS}
    for (measure, scanner, day), of_day in sorted(values.items()):
        median = DailyMedian(start + timedelta(days=day), float(np.median(of_day)), len(of_day))
        daily[measure][scanner].append(median)
    return daily
