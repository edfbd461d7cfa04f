"""The figures of the report as SVG: drawn from its figures alone, coloured by its style sheet, told in words too."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from textwrap import wrap
from typing import Any

from markupsafe import Markup, escape

Figures = Mapping[str, Any]

SIDE = 240.0
"""Length of the axes of a square chart."""
_LINE = 17


def _svg(x: float, y: float, width: float, height: float, title: str, told: str, parts: Sequence[str]) -> Markup:
    """One picture with its title and description."""
    box = f"{x:g} {y:g} {width:g} {height:g}"
    return Markup(
        f'<svg viewBox="{box}" width="{width:g}" height="{height:g}" role="img"><title>{escape(title)}</title>'
        f"<desc>{escape(told)}</desc>{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, said: object, kind: str = "", anchor: str = "start") -> str:
    of_kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{of_kind}>{escape(said)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _path(points: Sequence[tuple[float, float]], kind: str) -> str:
    return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _dot(x: float, y: float, radius: float, kind: str) -> str:
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>'


# --- flow ------------------------------------------------------------------------------------------------------------


def flow_diagram(flow: Figures) -> Markup:
    """Every series received, down to the cells of the 2x2; what leaves the way stands at the right."""
    main, side, gap = 300.0, 400.0, 60.0
    parts: list[str] = []
    y = 0.0
    bottom = 0.0  # of the last box in the middle

    def box(x: float, top: float, width: float, lines: Sequence[str], kind: str = "box") -> float:
        height = _LINE * len(lines) + 14
        parts.append(f'<rect class="{kind}" x="{x:g}" y="{top:g}" width="{width:g}" height="{height:g}" rx="5"/>')
        for i, said in enumerate(lines):
            parts.append(_text(x + 12, top + _LINE * (i + 1) + 1, said, "strong" if i == 0 else ""))
        return top + height

    def down(top: float, to: float, x: float = main / 2) -> None:
        parts.append(_line(x, top, x, to - 6, "arrow"))
        parts.append(f'<path class="head" d="M{x - 4:.1f} {to - 7:.1f}h8l-4 7z"/>')

    received = [f"{flow['received']} series revisions received", f"of {flow['studies']} studies"]
    bottom = box(0, 0, main, received)
    left = flow["received"]
    for title, n, lines in _exits(flow):
        y = bottom + 16
        end = box(main + gap, y, side, [f"{n} {title}", *lines], "box aside")
        middle = y + (_LINE + 14) / 2
        parts.append(_line(main / 2, middle, main + gap - 6, middle, "arrow"))
        parts.append(f'<path class="head" d="M{main + gap - 7:.1f} {middle - 4:.1f}v8l7 -4z"/>')
        left -= n
        parts.append(_line(main / 2, bottom, main / 2, end + 2, "arrow"))
        bottom = end + 2
    y = bottom + 16
    down(bottom, y)
    note = [f"{flow['uncertain']} of them marked uncertain"] if flow["uncertain"] else []
    bottom = box(0, y, main, [f"{left} analysed", *note])
    parts_x = (0.0, (main + gap + side) / 2 + 10)
    width = (main + gap + side) / 2 - 10
    y = bottom + 40
    ends = []
    for x, answer, right, wrong in (
        (parts_x[0], "positive", ("haemorrhage", "true positive"), ("no_haemorrhage", "false positive")),
        (parts_x[1], "negative", ("no_haemorrhage", "true negative"), ("haemorrhage", "false negative")),
    ):
        arm = flow[answer]
        parts.append(_path([(main / 2, bottom), (main / 2, bottom + 18), (x + main / 2, bottom + 18)], "arrow"))
        down(bottom + 18, y, x + main / 2)
        end = box(x, y, width, [f"{arm['n']} {answer}"])
        told = arm["haemorrhage"] + arm["no_haemorrhage"]
        down(end, end + 22, x + main / 2)
        lines = [
            f"{told} with a reference standard",
            f"{arm[right[0]]} {right[1]}",
            f"{arm[wrong[0]]} {wrong[1]}",
        ]
        end = box(x, end + 22, width, lines, "box cell")
        missing = [f"{arm['without_reference']} without any reference", f"{arm['disputed']} with answers that differ"]
        ends.append(box(x, end + 10, width, missing, "box aside"))
    height = max(ends)
    told = ", ".join(f"{n} {title}" for title, n, _ in _exits(flow))
    return _svg(
        -2,
        -2,
        main + gap + side + 4,
        height + 4,
        "Flow of the series",
        f"{flow['received']} received; {told}; {flow['analysed']} analysed, {flow['positive']['n']} of them positive.",
        parts,
    )


def _exits(flow: Figures) -> list[tuple[str, int, list[str]]]:
    """What leaves the way on the way, in order: title, how many, and of what they are made."""
    exits: list[tuple[str, int, list[str]]] = [
        ("superseded by a later revision", flow["superseded"], []),
        ("unfinished: no result in time", flow["unfinished"], []),
    ]
    for title, name in (
        ("failed: input cannot be read", "failed_by_input"),
        ("failed: software or network", "failed_by_software"),
        ("excluded: input quality", "excluded_by_input"),
        ("excluded: protocol", "excluded_by_protocol"),
    ):
        lines = [part for b in flow[name] for part in wrap(f"{b['n']} {b['name']}", 54)]
        exits.append((title, sum(b["n"] for b in flow[name]), lines))
    return exits


# --- square charts ---------------------------------------------------------------------------------------------------


def _unit_axes(across: str, up: str) -> list[str]:
    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        at = SIDE * tick
        parts.append(_line(at, 0, at, SIDE, "grid"))
        parts.append(_line(0, SIDE - at, SIDE, SIDE - at, "grid"))
        parts.append(_text(at, SIDE + 16, f"{tick:g}", "tick", "middle"))
        parts.append(_text(-7, SIDE - at + 4, f"{tick:g}", "tick", "end"))
    parts.append(_text(SIDE / 2, SIDE + 34, across, "axis", "middle"))
    turned = f"translate(-38 {SIDE / 2:g}) rotate(-90)"
    parts.append(f'<text class="axis" text-anchor="middle" transform="{turned}">{escape(up)}</text>')
    return parts


def roc_chart(found: Figures, auc: Figures) -> Markup:
    """The ROC curve with the operating point."""
    points = [(SIDE * x, SIDE * (1 - y)) for x, y in found["points"]]
    parts = [*_unit_axes("1 − specificity", "sensitivity"), _line(0, SIDE, SIDE, 0, "ideal"), _path(points, "curve")]
    told = f"AUC {auc['value']:.3f}."
    if found["operating_point"]:
        x, y = found["operating_point"]
        parts.append(_dot(SIDE * x, SIDE * (1 - y), 5.5, "point"))
        parts.append(_text(SIDE * x + 11, SIDE * (1 - y) + 15, "operating point", "label"))
        told += f" The node works at sensitivity {y:.3f} and specificity {1 - x:.3f}."
    return _svg(-54, -12, SIDE + 76, SIDE + 54, "ROC curve", told, parts)


def reliability_chart(calibration: Figures) -> Markup:
    """Share of haemorrhage against the probability given; bars are 95 % intervals, areas numbers of cases."""
    parts = [*_unit_axes("probability given", "share with haemorrhage"), _line(0, SIDE, SIDE, 0, "ideal")]
    total = sum(b["seen"]["n"] for b in calibration["bins"])
    told = []
    for b in calibration["bins"]:
        x, seen = SIDE * b["said"], b["seen"]
        parts.append(_line(x, SIDE * (1 - seen["low"]), x, SIDE * (1 - seen["high"]), "bar"))
        parts.append(_dot(x, SIDE * (1 - seen["value"]), 3 + 7 * (seen["n"] / total) ** 0.5, "dot"))
        told.append(f"{b['said']:.2f} given, {seen['value']:.2f} seen in {seen['n']}")
    return _svg(-54, -12, SIDE + 76, SIDE + 54, "Reliability diagram", "; ".join(told) + ".", parts)


# --- charts over time ------------------------------------------------------------------------------------------------


def control_chart(weeks: Sequence[Figures], overall: float) -> Markup:
    """PPV of each week with its 3 sigma limits; weeks outside are marked."""
    width, height = max(320.0, 74.0 * len(weeks)), 210.0
    step = width / len(weeks)

    def up(value: float) -> float:
        return height * (1 - value)

    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts += [_line(0, up(tick), width, up(tick), "grid"), _text(-7, up(tick) + 4, f"{tick:.0%}", "tick", "end")]
    centres = [step * (i + 0.5) for i in range(len(weeks))]
    line = []
    for x, week in zip(centres, weeks, strict=True):
        point = week["point"]
        if point["low"] is not None:
            for limit in ("low", "high"):
                parts.append(_line(x - step / 2, up(point[limit]), x + step / 2, up(point[limit]), "limit"))
        parts.append(_text(x, height + 17, week["start"][5:10], "tick", "middle"))
        parts.append(_text(x, height + 32, f"n = {point['share']['n']}", "tick", "middle"))
        if point["share"]["value"] is not None:
            line.append((x, up(point["share"]["value"])))
    parts += [_line(0, up(overall), width, up(overall), "centre"), _path(line, "curve")]
    for x, week in zip(centres, weeks, strict=True):
        point = week["point"]
        if point["share"]["value"] is not None:
            outside = point["verdict"] in ("above", "below")
            kind = "point" if outside else "dot faint" if point["verdict"] == "too few" else "dot"
            parts.append(_dot(x, up(point["share"]["value"]), 5.5 if outside else 4, kind))
    parts.append(_text(width + 6, up(overall) + 4, f"{overall:.0%}", "label"))
    told = "; ".join(
        f"week from {week['start'][:10]}: {point['share']['hits']} of {point['share']['n']}, {point['verdict']}"
        for week in weeks
        if (point := week["point"])["share"]["n"]
    )
    return _svg(-48, -10, width + 96, height + 50, "PPV per week", told + ".", parts)


MOST_SCANNERS = 5
"""Lines that can be told apart in one chart."""


def drift_chart(measure: str, drift: Figures, end: str) -> Markup | None:
    """Daily medians of one number, a line for each scanner; the reference is shaded and flagged windows are marked."""
    daily = {name: days for name, days in drift["daily"][measure].items() if days}
    busiest = sorted(daily, key=lambda name: (-sum(day["n"] for day in daily[name]), name))[:MOST_SCANNERS]
    values: list[float] = [day["median"] for name in busiest for day in daily[name]]
    if not values:
        return None
    width, height = 330.0, 110.0
    start = datetime.fromisoformat(drift["reference_start"])
    span = (datetime.fromisoformat(end) - start).total_seconds()
    least, most = min(values), max(values)
    margin = 0.08 * (most - least) or max(abs(most), 1.0) * 0.1
    least, most = least - margin, most + margin

    def across(at: str) -> float:
        return width * (datetime.fromisoformat(at) - start).total_seconds() / span

    def up(value: float) -> float:
        return height * (1 - (value - least) / (most - least))

    parts = [
        f'<rect class="reference" x="0" y="0" width="{across(drift["reference_end"]):.1f}" height="{height:g}"/>',
    ]
    for comparison in drift["comparisons"]:
        if comparison["flagged"] and comparison["measure"] == measure and comparison["scanner"] in busiest:
            left, right = across(comparison["start"]), across(comparison["end"])
            line = busiest.index(comparison["scanner"])
            parts.append(
                f'<rect class="flag line{line}" x="{left:.1f}" y="{height - 5 - 6 * line:.1f}" '
                f'width="{right - left:.1f}" height="5"/>'
            )
    for tick in (least + margin, most - margin):
        parts += [_line(0, up(tick), width, up(tick), "grid"), _text(-6, up(tick) + 4, f"{tick:.3g}", "tick", "end")]
    for i, name in enumerate(busiest):
        points = [(across(day["day"]), up(day["median"])) for day in daily[name]]
        parts.append(_path(points, f"series line{i}"))
        parts += [_line(i * 110, height + 30, i * 110 + 18, height + 30, f"series line{i}")]
        parts.append(_text(i * 110 + 23, height + 34, name[:13], "tick"))
    parts += [
        _line(0, height, width, height, "grid"),
        _text(0, height + 15, drift["reference_start"][:10], "tick"),
        _text(width, height + 15, end[:10], "tick", "end"),
    ]
    wide = max(width, 110.0 * len(busiest))
    title = f"Daily medians of {measure}"
    return _svg(-48, -6, wide + 60, height + 46, title, f"Scanners: {', '.join(busiest)}.", parts)
