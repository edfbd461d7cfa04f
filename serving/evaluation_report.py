"""Cases in, figures and one page out: what the models got right, set by set, with nothing pooled that differs.

    result, page = report(cases, "Haemorrhage", {"Weights": "..."})

Simulated and real sets, patients trained on and kept aside, adults and children are never mixed; adults and children of
one set are counted together once more, under that name. Same cases, same bytes. The page loads nothing from anywhere.
"""

import base64
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined, Template
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage, stats

from herald.discrimination import auc, delong_difference
from herald.errors import ConfigError
from serving.evaluation import (
    FEW,
    auc_interval,
    bootstrap_interval,
    calibration_curve,
    clustered_share,
    expected_calibration_error,
    predictive_values,
)

PREVALENCES = (0.05, 0.15, 0.4)
"""From a ward where few bleed to a stroke unit; what a site has is for the site to say."""

WORST = 20
VOLUMES_ML = ((0.0, "under 1 ml"), (1.0, "1 to 5 ml"), (5.0, "5 to 30 ml"), (30.0, "30 ml and more"))
THICKNESSES_MM = ((0.0, "under 1.5 mm"), (1.5, "1.5 to 3 mm"), (3.0, "3 to 6 mm"), (6.0, "6 mm and more"))

Json = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One answer to one question (`task`) about one study, series or slice (`unit`), with what is known of it.

    `patient` is a pseudonym within `source`, and what the bootstrap draws. `probability` gives the model's probability
    of each class, `truth` is one of them. Of two classes the second is the positive one. `kinds` are the bleeds that
    are there, `volume_ml` the blood that the task asks for; `header` is what the DICOM header says, "" where it is
    silent and None where there is no header. `dice` is the overlap of an outlined slice. `picture` is a PNG. None and
    "" elsewhere are "not known". Raises ConfigError where `truth` is not one of two or more classes.
    """

    task: str
    source: str
    patient: str
    truth: str
    probability: Mapping[str, float]
    unit: str = "study"
    name: str = ""
    simulated: bool = False
    trained_on: bool = False
    child: bool | None = None
    kinds: tuple[str, ...] = ()
    volume_ml: float | None = None
    kernel: str = ""
    thickness_mm: float | None = None
    header: str | None = None
    dice: float | None = None
    picture: bytes | None = field(default=None, repr=False)
    picture_shows: str = ""

    def __post_init__(self) -> None:
        if len(self.probability) < 2 or self.truth not in self.probability:
            raise ConfigError(
                f"case {self.source} {self.patient}, {self.task}: its truth {self.truth!r} is not one of two or more "
                f"classes {list(self.probability)}; give the model's probability of each class"
            )
        if not np.isfinite(list(self.probability.values())).all():
            raise ConfigError(f"case {self.source} {self.patient}, {self.task}: a probability is not a number")

    @property
    def answer(self) -> str:
        """The likeliest class; the later one where two are as likely, so that 0.5 is positive."""
        return max(reversed(list(self.probability)), key=lambda c: self.probability[c])

    @property
    def sure_of_truth(self) -> float:
        """The probability that the model gives to the truth."""
        return self.probability[self.truth]


def report(
    cases: Sequence[Case], title: str, about: Mapping[str, str], prevalences: Sequence[float] = PREVALENCES
) -> tuple[Json, str]:
    """All figures of `cases` as what JSON can hold, and the page that shows them.

    `about` are facts on the model and on how the figures were obtained. Raises ConfigError where there are no cases or
    those of one task differ in their classes.
    """
    if not cases:
        raise ConfigError(f"nothing to report on {title}: there is no case; score some patients first")
    sets = []
    for (trained_on, simulated, source), members in sorted(_grouped(cases, _set_of).items()):
        worst = worst_cases(members)
        sets.append(
            {
                "source": source,
                "simulated": simulated,
                "trained_on": trained_on,
                "patients": len({case.patient for case in members}),
                "populations": [
                    {
                        "population": name,
                        "patients": len({case.patient for case in some}),
                        "tasks": [_task(group, prevalences) for group in _grouped(some, _task_of).values()],
                    }
                    for name, some in _populations(members)
                ],
                "worst": [_worst_entry(case, members) for case in worst],
            }
        )
    result = {"title": title, "about": dict(about), "level": 0.95, "prevalences": list(prevalences), "sets": sets}
    result = _jsonable(result)
    return result, _page(result, {_identity(case): case.picture for case in cases if case.picture})


def check_report_path(path: Path) -> None:
    """Raise ConfigError where the figures of a report at `path` would replace a JSON file that is no report's."""
    figures = path.with_suffix(".json")
    if not figures.exists():
        return
    try:
        known = json.loads(figures.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    if not isinstance(known, dict) or not {"title", "sets"} <= known.keys():
        raise ConfigError(
            f"{figures} is no earlier report, and the figures beside {path} would replace it; name another"
        )


def write_report(path: Path, result: Json, page: str) -> None:
    """Write `page` to `path` and `result` beside it, with the suffix .json; raises as `check_report_path`."""
    check_report_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def worst_cases(cases: Iterable[Case], count: int = WORST) -> list[Case]:
    """Of each study or series its worst answer, those first whose truth was thought least likely; no slices."""
    ranked = sorted((c for c in cases if c.unit != "slice"), key=lambda c: (c.sure_of_truth, *_identity(c)))
    first: dict[tuple[str, ...], Case] = {}
    for case in ranked:
        first.setdefault((case.source, case.patient, case.name), case)
    return list(first.values())[:count]


def picture(
    hounsfield: NDArray[np.integer | np.floating],
    outlines: Sequence[tuple[NDArray[np.bool_], tuple[int, int, int]]] = (),
    center: float = 40,
    width: float = 80,
) -> bytes:
    """One slice (H, W) in a window as PNG, with masks (H, W) outlined in their colours."""
    grey = np.clip((hounsfield - (center - width / 2)) * (255 / width), 0, 255).astype(np.uint8)
    pixels = np.repeat(grey[..., None], 3, axis=-1)
    for mask, colour in outlines:
        pixels[ndimage.binary_dilation(mask) & ~mask] = colour
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return file.getvalue()


# --- groups ----------------------------------------------------------------------------------------------------------


def _set_of(case: Case) -> tuple[bool, bool, str]:
    return case.trained_on, case.simulated, case.source


def _task_of(case: Case) -> tuple[str, str]:
    return case.task, case.unit


def _identity(case: Case) -> tuple[str, ...]:
    return case.source, case.patient, case.name, case.task, case.unit


def _grouped(cases: Iterable[Case], key: Callable[[Case], tuple[Any, ...]]) -> dict[tuple[Any, ...], list[Case]]:
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in cases:
        groups.setdefault(key(case), []).append(case)
    return groups


def _populations(cases: Sequence[Case]) -> list[tuple[str, list[Case]]]:
    names = {"adults": False, "children": True, "age not known": None}
    apart = [(name, [c for c in cases if c.child is child]) for name, child in names.items()]
    apart = [(name, some) for name, some in apart if some]
    return apart if len(apart) == 1 else [*apart, ("all ages together", list(cases))]


def _of_span(value: float | None, spans: Sequence[tuple[float, str]]) -> str:
    return "" if value is None else [name for start, name in spans if value >= start][-1]


# --- figures ---------------------------------------------------------------------------------------------------------


def _task(cases: Sequence[Case], prevalences: Sequence[float]) -> Json:
    """Everything about one task in one population of one set."""
    classes = list(cases[0].probability)
    if any(list(case.probability) != classes for case in cases):
        raise ConfigError(f"task {cases[0].task}: its cases have different classes; give it one name for each set")
    owner = _owners(cases)
    right = np.array([case.answer == case.truth for case in cases])
    asked = classes[1:] if len(classes) == 2 else classes  # of more than two, each against all the others
    overlaps = np.array([case.dice is not None for case in cases])
    return {
        "task": cases[0].task,
        "unit": cases[0].unit,
        "cases": len(cases),
        "patients": len(np.unique(owner)),
        "classes": classes,
        "accuracy": _share(right, owner),
        "dice": _mean(np.array([c.dice for c in cases if c.dice is not None], float), owner[overlaps]),
        "header": _header(cases, classes),
        "questions": [_question(cases, positive, owner, prevalences) for positive in asked],
    }


def _question(cases: Sequence[Case], positive: str, owner: NDArray[np.intp], prevalences: Sequence[float]) -> Json:
    """One class against the others."""
    figures = _figures(cases, positive, owner)
    probability = np.array([case.probability[positive] for case in cases])
    truth = np.array([case.truth == positive for case in cases])
    sensitivity, specificity = (
        [figures[name][end] for end in ("value", "low", "high")] for name in ("sensitivity", "specificity")
    )
    at = []
    for prevalence in prevalences:
        ppv, npv = predictive_values(sensitivity, specificity, prevalence)
        at.append({"prevalence": prevalence, "ppv": _interval(ppv, "MOVER-R"), "npv": _interval(npv, "MOVER-R")})
    bins = [
        {"said": b.said, "seen": _share(truth[b.members], owner[b.members])}
        for b in calibration_curve(probability, truth)
    ]
    return {
        "class": positive,
        **figures,
        "at_prevalence": at,
        "reliability": {"expected_calibration_error": expected_calibration_error(probability, truth), "bins": bins},
        "subgroups": _subgroups(cases, positive) if cases[0].unit != "slice" else [],
    }


def _figures(cases: Sequence[Case], positive: str, owner: NDArray[np.intp]) -> Json:
    score = np.array([case.probability[positive] for case in cases])
    truth = np.array([case.truth == positive for case in cases])
    called = np.array([case.answer == positive for case in cases])
    return {
        "positive": int(truth.sum()),
        "negative": int((~truth).sum()),
        "auc": _auc(score, truth, owner),
        "sensitivity": _share(called[truth], owner[truth]),
        "specificity": _share(~called[~truth], owner[~truth]),
    }


def _subgroups(cases: Sequence[Case], positive: str) -> list[Json]:
    """By bleed type and volume (such positives beside all negatives), by kernel and thickness (those cases alone)."""
    positives = [case for case in cases if case.truth == positive]
    negatives = [case for case in cases if case.truth != positive]
    groupings: list[tuple[str, Callable[[Case], Sequence[str]], bool]] = [
        ("bleed type", lambda c: c.kinds, True),
        ("volume", lambda c: [_of_span(c.volume_ml, VOLUMES_ML)], True),
        ("kernel", lambda c: [c.kernel], False),
        ("slice thickness", lambda c: [_of_span(c.thickness_mm, THICKNESSES_MM)], False),
    ]
    order = [name for _, name in (*VOLUMES_ML, *THICKNESSES_MM)]
    out = []
    for by, labels, of_positives in groupings:
        members = positives if of_positives else cases
        names = {name for case in members for name in labels(case)}
        if not names - {""}:
            continue  # nothing is known
        rows = []
        for name in sorted(names, key=lambda n: (n == "", order.index(n) if n in order else 0, n)):
            some = [case for case in members if name in labels(case)] + (negatives if of_positives else [])
            figures = _figures(some, positive, _owners(some))
            if of_positives:
                del figures["specificity"]  # that of the whole, whatever the bleed
            rows.append({"name": name or "not known", **figures})
        out.append({"by": by, "rows": rows})
    return out


def _header(cases: Sequence[Case], classes: Sequence[str]) -> Json | None:
    """Pixels and headers on the same cases; a silent header has not answered rightly."""
    told = [case for case in cases if case.header is not None]
    if not told:
        return None
    owner = _owners(told)
    pixels = np.array([case.answer == case.truth for case in told])
    header = np.array([case.header == case.truth for case in told])
    only_pixels, only_header = int((pixels & ~header).sum()), int((header & ~pixels).sum())
    differ = only_pixels + only_header
    out: Json = {
        "cases": len(told),
        "silent": sum(case.header == "" for case in told),
        "pixels": _share(pixels, owner),
        "headers": _share(header, owner),
        "only_pixels_right": only_pixels,
        "only_headers_right": only_header,
        "p": float(stats.binomtest(only_pixels, differ).pvalue) if differ else 1.0,  # McNemar, exact
        "auc_difference": None,
    }
    if len(classes) == 2 and len(np.unique(owner)) == len(told):
        claim = {classes[1]: 1.0, classes[0]: 0.0}
        pixel_score = np.array([case.probability[classes[1]] for case in told])
        header_score = np.array([claim.get(case.header or "", 0.5) for case in told])
        truth = np.array([case.truth == classes[1] for case in told])
        out["auc_of_headers"] = _auc(header_score, truth, owner)
        out["auc_difference"] = vars(delong_difference(pixel_score, header_score, truth))
    return out


def _owners(cases: Sequence[Case]) -> NDArray[np.intp]:
    owners: NDArray[np.intp] = np.unique([case.patient for case in cases], return_inverse=True)[1]
    return owners


def _interval(ends: Sequence[float], method: str) -> Json:
    """Value, low and high, and where the latter are from."""
    value, low, high = ends
    return {"value": value, "low": low, "high": high, "method": method}


def _share(hits: NDArray[np.bool_], owner: NDArray[np.intp]) -> Json:
    """Wilson, for an effective number where patients have several cases."""
    clustered = len(np.unique(owner)) < len(hits)
    value = _interval(clustered_share(hits, owner), "Wilson, effective number" if clustered else "Wilson")
    return value | {"hits": int(hits.sum()), "of": len(hits)}


def _auc(score: NDArray[np.floating], truth: NDArray[np.bool_], owner: NDArray[np.intp]) -> Json:
    low, high, method = auc_interval(score, truth, owner)
    return _interval((auc(score, truth), low, high), method)


def _mean(values: NDArray[np.floating], owner: NDArray[np.intp]) -> Json | None:
    """Mean over slices; whole patients are drawn."""
    if not len(values):
        return None
    low = high = float("nan")
    if len(np.unique(owner)) >= FEW:
        everything = np.ones(len(values), bool)
        low, high = bootstrap_interval(values, everything, owner, metric=lambda v, _: float(v.mean()))
    return _interval((float(values.mean()), low, high), "bootstrap over patients") | {"of": len(values)}


def _worst_entry(case: Case, cases: Iterable[Case]) -> Json:
    same = [c for c in cases if (c.patient, c.name) == (case.patient, case.name) and c.unit == case.unit]
    return {
        "identity": list(_identity(case)),
        "patient": case.patient,
        "name": case.name,
        "task": case.task,
        "truth": case.truth,
        "answer": case.answer,
        "probability_of_truth": case.sure_of_truth,
        "also_wrong": [c.task for c in same if c.task != case.task and c.answer != c.truth],
        "child": case.child,
        "kinds": list(case.kinds),
        "volume_ml": case.volume_ml,
        "kernel": case.kernel,
        "thickness_mm": case.thickness_mm,
        "picture_shows": case.picture_shows,
    }


def _jsonable(value: Any) -> Any:
    """NaN and infinity become null, which is what JSON knows."""
    if isinstance(value, dict):
        return {key: _jsonable(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    if isinstance(value, float):
        return float(value) if np.isfinite(value) else None
    return value


# --- page ------------------------------------------------------------------------------------------------------------


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["units"] = _units
    environment.filters["sentence"] = lambda text: text[:1].upper() + text[1:]  # leaves abbreviations alone
    environment.filters["percent"] = lambda share: f"{100 * share:.3g} %"
    return environment.from_string(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))


def _units(count: int, unit: str) -> str:
    """`count` and its unit: 1 study, 2 studies, 2 series."""
    several = unit[:-1] + "ies" if unit.endswith("y") else unit if unit.endswith("s") else unit + "s"
    return f"{count} {unit if count == 1 else several}"


def _page(result: Json, pictures: Mapping[tuple[str, ...], bytes]) -> str:
    shown = {
        entry: base64.b64encode(pictures[entry]).decode("ascii")
        for entry in (tuple(worst["identity"]) for s in result["sets"] for worst in s["worst"])
        if entry in pictures
    }
    real = any(not s["simulated"] and tuple(w["identity"]) in shown for s in result["sets"] for w in s["worst"])
    return _template().render(result, pictures=lambda w: shown.get(tuple(w["identity"])), shows_real_patients=real)
