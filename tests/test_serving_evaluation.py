"""Figures against the literature and slow implementations; the page against what a reader of it needs."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO, StringIO
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from herald.discrimination import auc, delong_difference, delong_interval, delong_variance, newcombe_auc_interval
from herald.errors import ConfigError
from serving.evaluation import (
    bootstrap_interval,
    calibration_curve,
    clustered_share,
    dice,
    expected_calibration_error,
    predictive_values,
    wilson,
)
from serving.evaluation_report import Case, check_report_path, picture, report, worst_cases, write_report

# --- figures ---------------------------------------------------------------------------------------------------------

# Hanley and McNeil 1982, table I: 109 readings of CT rated 1 (surely normal) to 5
NORMAL, ABNORMAL = (33, 6, 6, 11, 2), (3, 2, 2, 11, 33)


def hanley_mcneil():
    scores = np.concatenate([np.repeat(np.arange(1.0, 6.0), NORMAL), np.repeat(np.arange(1.0, 6.0), ABNORMAL)])
    return scores, np.repeat([False, True], [sum(NORMAL), sum(ABNORMAL)])


def correlated(seed: int, positives: int = 23, negatives: int = 31):
    """Two scores of the same cases with ties."""
    rng = np.random.default_rng(seed)
    truth = np.repeat([True, False], [positives, negatives])
    shared = rng.normal(size=len(truth)) + 1.2 * truth
    first, second = (np.round(shared + rng.normal(0, s, len(truth)), 1) for s in (0.5, 1.0))
    return first, second, truth


def jackknife_covariance(scores, truth):
    """Covariance of AUCs from leaving out one case after the other (Arvesen 1969): what DeLong's sums amount to."""
    total = np.zeros((len(scores), len(scores)))
    for group in (truth, ~truth):
        n = group.sum()
        left_out = [[auc(np.delete(s, i), np.delete(truth, i)) for i in np.flatnonzero(group)] for s in scores]
        total += np.cov(left_out) * (n - 1) ** 2 / n
    return total


def test_delong_gives_the_published_error_and_interval_of_the_ratings_of_hanley_and_mcneil():
    scores, truth = hanley_mcneil()
    error = np.sqrt(delong_variance([scores], truth)[0, 0])
    assert auc(scores, truth) == pytest.approx(0.8932, abs=5e-5)
    assert error == pytest.approx(0.0307, abs=5e-5)
    plain = auc(scores, truth) + np.array([-1, 1]) * stats.norm.ppf(0.975) * error
    assert plain == pytest.approx([0.83295, 0.95339], abs=5e-6)
    low, high = delong_interval(scores, truth)  # on the logit scale: shifted away from 1
    assert low < plain[0]
    assert high < plain[1]


@pytest.mark.parametrize("seed", range(3))
def test_delong_equals_the_jackknife_of_both_classes(seed):
    first, second, truth = correlated(seed)
    np.testing.assert_allclose(
        delong_variance([first, second], truth), jackknife_covariance([first, second], truth), rtol=1e-9
    )


def test_the_difference_of_two_aucs_knows_that_the_cases_are_the_same():
    first, second, truth = correlated(5)
    found = delong_difference(first, second, truth)
    covariance = jackknife_covariance([first, second], truth)
    error = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert found.value == pytest.approx(auc(first, truth) - auc(second, truth))
    assert (found.high - found.low) / 2 == pytest.approx(1.959964 * error, rel=1e-6)
    assert found.p == pytest.approx(2 * stats.norm.sf(abs(found.value) / error), rel=1e-6)
    assert error < np.sqrt(covariance[0, 0] + covariance[1, 1])
    same = delong_difference(first, first * 3 + 1, truth)
    assert (same.value, same.p) == (0.0, 1.0)


def test_delong_s_interval_covers_the_true_auc():
    rng = np.random.default_rng(11)
    truth = np.repeat([True, False], [15, 25])
    true = float(stats.norm.cdf(2.2 / np.sqrt(2)))  # 0.94
    intervals = [delong_interval(rng.normal(size=40) + 2.2 * truth, truth) for _ in range(600)]
    known = [(low, high) for low, high in intervals if not np.isnan(low)]
    assert 0.92 < np.mean([low <= true <= high for low, high in known]) < 0.985


def test_where_delong_has_no_variance_it_says_so_and_newcombe_has_an_interval():
    scores, truth = np.arange(14.0), np.arange(14) >= 8
    assert np.isnan(delong_interval(scores, truth)).all()
    assert np.isnan(delong_interval(scores, np.arange(14) == 13)).all()
    low, high = newcombe_auc_interval(1.0, 6, 8)
    assert 0.6 < low < 0.8
    assert high == 1.0
    assert newcombe_auc_interval(0.0, 6, 8) == pytest.approx((0.0, 1 - low), abs=1e-6)
    assert newcombe_auc_interval(1.0, 60, 80)[0] > low
    assert np.isnan(delong_difference(scores, -scores, truth).low)


def test_newcombe_s_interval_solves_the_equation_it_is_defined_by():
    z, positives, negatives = stats.norm.ppf(0.975), 12, 20
    for true in newcombe_auc_interval(0.85, positives, negatives):
        n = (positives + negatives) / 2
        spread = true * (1 - true) * (1 + (n - 1) * ((1 - true) / (2 - true) + true / (1 + true)))
        assert abs(0.85 - true) == pytest.approx(z * np.sqrt(spread / (positives * negatives)), rel=1e-6)


def test_wilson_s_interval_is_that_of_newcombe_1998_and_of_scipy():
    assert wilson(81, 263) == pytest.approx([0.3080, 0.2553, 0.3662], abs=5e-5)
    assert wilson(15, 148) == pytest.approx([0.1014, 0.0624, 0.1605], abs=5e-5)
    assert wilson(0, 20) == pytest.approx([0.0, 0.0, 0.1611], abs=5e-5)
    assert wilson(1, 29) == pytest.approx([0.0345, 0.0061, 0.1718], abs=5e-5)
    for successes, n in ((0, 1), (7, 7), (3, 50)):
        reference = stats.binomtest(successes, n).proportion_ci(0.9, method="wilson")
        assert wilson(successes, n, 0.9)[1:] == pytest.approx([reference.low, reference.high], abs=1e-12)


def test_slices_of_one_patient_count_for_less_than_as_many_patients():
    rng = np.random.default_rng(4)
    hits, owner = rng.random(300) < 0.8, np.arange(300)
    assert clustered_share(hits, owner) == wilson(int(hits.sum()), 300)
    alike = np.repeat(rng.random(30) < 0.8, 10)  # ten slices that say the same
    widths = [np.ptp(clustered_share(alike, o)[1:]) for o in (owner, owner // 10)]
    assert widths[1] > 2.5 * widths[0]
    assert clustered_share(alike, owner // 10) == pytest.approx(wilson(alike[::10].sum(), 30), abs=5e-3)
    assert clustered_share(np.ones(300, bool), owner // 10) == wilson(30, 30)
    low, high = bootstrap_interval(alike, np.ones(300, bool), owner // 10, metric=lambda v, _: float(v.mean()))
    assert clustered_share(alike, owner // 10)[1:] == pytest.approx([low, high], abs=0.06)


def test_predictive_values_follow_bayes_at_the_prevalence_stated():
    ppv, npv = predictive_values(wilson(90, 100), wilson(160, 200), 0.1)
    assert ppv[0] == pytest.approx(0.9 * 0.1 / (0.9 * 0.1 + 0.2 * 0.9))
    assert npv[0] == pytest.approx(0.8 * 0.9 / (0.8 * 0.9 + 0.1 * 0.1))
    assert ppv[1] < ppv[0] < ppv[2]
    assert npv[1] < npv[0] < npv[2]
    ppv, npv = predictive_values(wilson(6, 6), wilson(8, 8), 0.1)
    assert ppv[0] == npv[0] == ppv[2] == npv[2] == 1.0
    assert 0.1 < ppv[1] < 0.5
    assert 0.9 < npv[1] < 1.0
    assert np.isnan(predictive_values(wilson(0, 5), wilson(5, 5), 0.1)[0]).all()


@pytest.mark.parametrize("prevalence", [0.05, 0.4])
def test_intervals_of_predictive_values_cover_in_all_possible_outcomes(prevalence):
    sensitivity, specificity, positives, negatives = 0.9, 0.85, 25, 30
    true_ppv = sensitivity * prevalence / (sensitivity * prevalence + (1 - specificity) * (1 - prevalence))
    true_npv = specificity * (1 - prevalence) / (specificity * (1 - prevalence) + (1 - sensitivity) * prevalence)
    covered = np.zeros(2)
    for found in range(positives + 1):
        for cleared in range(negatives + 1):
            weight = stats.binom.pmf(found, positives, sensitivity) * stats.binom.pmf(cleared, negatives, specificity)
            if weight < 1e-7:
                continue
            ends = predictive_values(wilson(found, positives), wilson(cleared, negatives), prevalence)
            covered += [weight * (e[1] <= t <= e[2]) for e, t in zip(ends, (true_ppv, true_npv), strict=True)]
    assert (covered > 0.93).all()
    assert (covered < 0.98).all()


def test_calibration_is_read_in_bins_and_its_error_weighs_them_by_their_cases():
    probability = np.array([0.05, 0.05, 0.95, 0.95, 0.95, 1.0])
    truth = np.array([False, True, True, True, True, True])
    curve = calibration_curve(probability, truth)
    assert [(len(b.members), b.seen) for b in curve] == [(2, 0.5), (4, 1.0)]
    assert curve[1].said == pytest.approx(0.9625)
    assert expected_calibration_error(probability, truth) == pytest.approx((2 * 0.45 + 4 * 0.0375) / 6)
    rng = np.random.default_rng(2)
    said = rng.random(20000)
    assert expected_calibration_error(said, rng.random(20000) < said) < 0.02
    assert expected_calibration_error(said, rng.random(20000) < said**3) > 0.15


def test_dice_is_one_for_the_same_none_for_two_empty_masks():
    truth = np.zeros((3, 8, 8), bool)
    truth[:2, 2:6, 2:6] = True
    predicted = truth.copy()
    predicted[1] = np.roll(truth[1], 2, axis=0)
    np.testing.assert_array_equal(dice(predicted, truth), [1.0, 0.5, np.nan])


# --- report ----------------------------------------------------------------------------------------------------------

KINDS = ("iph", "ivh", "sah", "edh_sdh")
PLANES = ("axial", "coronal", "sagittal")


def slice_picture(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    mask = np.zeros((64, 64), bool)
    mask[20:30, 20:30] = True
    return picture(rng.normal(40, 10, (64, 64)), [(mask, (70, 170, 255))])


def bleeding_case(source: str, i: int, probability: float, bleeds: bool, **known) -> Case:
    return Case("any bleeding", source, f"{i:03d}", "bleeding" if bleeds else "none",
                {"none": 1 - probability, "bleeding": probability}, **known)  # fmt: skip


def made_up_cases() -> list[Case]:
    rng = np.random.default_rng(0)
    cases = []
    for source, count, simulated in (("simulated", 24, True), ("ct-ich", 30, False), ("phe-sich", 8, False)):
        for i in range(count):
            bleeds = source == "phe-sich" or i % 2 == 0
            child = i % 3 == 0 if source == "ct-ich" else None
            said = float(1 / (1 + np.exp(-(3 * bleeds - 1.5 + rng.normal(0, 1.5)))))
            cases.append(
                bleeding_case(
                    source,
                    i,
                    said,
                    bleeds,
                    simulated=simulated,
                    child=child,
                    thickness_mm=1.0 + 4 * (i % 2),
                    kinds=(KINDS[i % 4],) if bleeds else (),
                    volume_ml=0.4 * i if bleeds else None,
                    kernel="bone" if i % 5 == 0 else "soft",
                    picture=slice_picture(i),
                    picture_shows="blue: truth",
                )
            )
            for k in range(5):
                here = bleeds and k == 2
                cases.append(
                    replace(
                        bleeding_case(source, i, float(np.clip(0.6 * here + 0.4 * rng.random(), 0, 1)), here),
                        task="any bleeding, by slice",
                        unit="slice",
                        name=str(k),
                        simulated=simulated,
                        child=child,
                        dice=0.5 if here else None,
                    )
                )
            if simulated:
                plane = PLANES[i % 3]
                shares = rng.dirichlet(np.where(np.array(PLANES) == plane, 4.0, 0.5))
                header = {0: "", 1: "axial"}.get(i % 6, plane)
                cases.append(Case("orientation", source, f"{i:03d}", plane, dict(zip(PLANES, shares, strict=True)),
                                  unit="series", simulated=True, header=header))  # fmt: skip
                kernel, sharp = ("soft", "bone")[i % 2], float(np.clip(i % 2 + rng.normal(0, 0.4), 0.01, 0.99))
                cases.append(Case("kernel", source, f"{i:03d}", kernel, {"soft": 1 - sharp, "bone": sharp},
                                  unit="series", simulated=True, header=kernel if i % 4 else ""))  # fmt: skip
    return cases


@pytest.fixture(scope="module")
def made():
    return report(made_up_cases(), "Evaluation of made-up cases", {"Weights": "none <b>"})


def find(result, source, population, task):
    (one,) = [s for s in result["sets"] if s["source"] == source]
    (some,) = [p for p in one["populations"] if p["population"] == population]
    (found,) = [t for t in some["tasks"] if t["task"] == task]
    return found


def test_sets_and_ages_are_never_mixed(made):
    result, _ = made
    assert [(s["source"], s["patients"]) for s in result["sets"]] == [
        ("ct-ich", 30),
        ("phe-sich", 8),
        ("simulated", 24),
    ]
    populations = {s["source"]: {p["population"]: p["patients"] for p in s["populations"]} for s in result["sets"]}
    assert populations["ct-ich"] == {"adults": 20, "children": 10, "all ages together": 30}
    assert populations["simulated"] == {"age not known": 24}
    cases = [c for c in made_up_cases() if c.task == "any bleeding" and c.source == "ct-ich" and c.child]
    children = find(result, "ct-ich", "children", "any bleeding")["questions"][0]
    scores, truth = (
        np.array([c.probability["bleeding"] for c in cases]),
        np.array([c.truth == "bleeding" for c in cases]),
    )
    assert children["auc"]["value"] == pytest.approx(auc(scores, truth))
    assert children["sensitivity"] | {"method": 0} == {
        **dict(zip(("value", "low", "high"), wilson(int((scores[truth] >= 0.5).sum()), int(truth.sum())), strict=True)),
        "method": 0, "hits": int((scores[truth] >= 0.5).sum()), "of": int(truth.sum()),
    }  # fmt: skip


def test_patients_that_were_trained_on_stand_apart_and_are_called_so():
    cases = [bleeding_case("ct-ich", i, i / 12, i > 5, trained_on=i % 2 == 0) for i in range(12)]
    result, page = report(cases, "t", {})
    assert [(s["trained_on"], s["patients"]) for s in result["sets"]] == [(False, 6), (True, 6)]
    assert page.count("The model learned from these patients") == 1


def test_each_interval_names_where_it_is_from(made):
    result, _ = made
    by_study = find(result, "ct-ich", "adults", "any bleeding")["questions"][0]
    by_slice = find(result, "ct-ich", "adults", "any bleeding, by slice")["questions"][0]
    assert (by_study["auc"]["method"], by_study["sensitivity"]["method"]) == ("DeLong", "Wilson")
    assert by_slice["auc"]["method"] in ("bootstrap over patients", "Newcombe")
    assert by_slice["specificity"]["method"] == "Wilson, effective number"


def test_one_bleeding_patient_gives_no_narrow_interval():
    cases = [bleeding_case("a", i, i / 10, i == 9) for i in range(10)]
    figure = report(cases, "t", {})[0]["sets"][0]["populations"][0]["tasks"][0]["questions"][0]["auc"]
    assert figure["value"] == 1.0
    assert figure["low"] < 0.5


def test_a_set_with_bleeding_patients_only_has_no_auc_and_is_valid_json(made):
    result, _ = made
    phe = find(result, "phe-sich", "age not known", "any bleeding")["questions"][0]
    assert phe["auc"]["value"] is None
    assert phe["specificity"]["value"] is None
    assert phe["sensitivity"]["of"] == 8
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_bleeds_are_told_apart_by_type_and_volume_beside_all_negatives(made):
    result, _ = made
    question = find(result, "ct-ich", "all ages together", "any bleeding")["questions"][0]
    groups = {g["by"]: g["rows"] for g in question["subgroups"]}
    assert {row["name"] for row in groups["bleed type"]} == {"iph", "sah"}
    assert [row["name"] for row in groups["volume"]] == ["under 1 ml", "1 to 5 ml", "5 to 30 ml"]
    for by in ("bleed type", "volume"):
        assert sum(row["positive"] for row in groups[by]) == 15
        assert all(row["negative"] == 15 and "specificity" not in row for row in groups[by])
    for by in ("kernel", "slice thickness"):
        assert sum(row["positive"] + row["negative"] for row in groups[by]) == 30


def test_a_volume_nobody_knows_is_counted_as_not_known():
    cases = [
        bleeding_case("a", i, 0.9 if i % 2 else 0.2, i % 2 == 1, volume_ml=3.0 if i == 1 else None) for i in range(8)
    ]
    (group,) = report(cases, "t", {})[0]["sets"][0]["populations"][0]["tasks"][0]["questions"][0]["subgroups"]
    assert [(row["name"], row["positive"]) for row in group["rows"]] == [("1 to 5 ml", 1), ("not known", 3)]


def test_headers_alone_stand_beside_pixels_on_the_same_cases_and_silence_is_not_right(made):
    result, _ = made
    orientation = find(result, "simulated", "age not known", "orientation")
    header = orientation["header"]
    cases = [c for c in made_up_cases() if c.task == "orientation"]
    assert header["silent"] == 4
    assert header["headers"]["hits"] == sum(c.header == c.truth for c in cases) == 16
    both = sum(c.header == c.truth == c.answer for c in cases)
    assert header["only_headers_right"] == 16 - both
    assert header["only_pixels_right"] == orientation["accuracy"]["hits"] - both
    kernel = find(result, "simulated", "age not known", "kernel")["header"]
    scores = [np.array([c.probability["bone"] for c in made_up_cases() if c.task == "kernel"])]
    truth = np.arange(24) % 2 == 1
    scores.append(np.where(np.arange(24) % 4 == 0, 0.5, truth))
    assert kernel["auc_difference"]["value"] == pytest.approx(auc(scores[0], truth) - auc(scores[1], truth))
    assert find(result, "ct-ich", "adults", "any bleeding")["header"] is None


def test_each_of_three_classes_is_measured_against_the_others(made):
    result, _ = made
    task = find(result, "simulated", "age not known", "orientation")
    assert [(q["class"], q["positive"], q["negative"]) for q in task["questions"]] == [(p, 8, 16) for p in PLANES]
    assert sum(q["sensitivity"]["hits"] for q in task["questions"]) == task["accuracy"]["hits"]


def test_the_twenty_worst_are_those_whose_truth_was_thought_least_likely_one_for_each_study():
    cases = made_up_cases()
    worst = worst_cases(c for c in cases if c.source == "simulated")
    assert len(worst) == 20
    assert len({c.patient for c in worst}) == 20
    assert [c.sure_of_truth for c in worst] == sorted(c.sure_of_truth for c in worst)
    assert worst[0].sure_of_truth == min(
        c.sure_of_truth for c in cases if c.source == "simulated" and c.unit != "slice"
    )
    assert all(c.unit != "slice" for c in worst)


def test_half_is_positive_as_it_is_for_the_node():
    assert bleeding_case("a", 1, 0.5, True).answer == "bleeding"
    assert bleeding_case("a", 1, 0.4999, True).answer == "none"


def test_cases_that_make_no_sense_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"ct-ich 007, contrast: its truth 'maybe'"):
        Case("contrast", "ct-ich", "007", "maybe", {"no": 0.5, "yes": 0.5})
    with pytest.raises(ConfigError, match="not a number"):
        Case("contrast", "ct-ich", "007", "no", {"no": float("nan"), "yes": 0.5})
    with pytest.raises(ConfigError, match="there is no case"):
        report([], "t", {})
    with pytest.raises(ConfigError, match="different classes"):
        report([bleeding_case("a", 1, 0.5, True), Case("any bleeding", "a", "2", "b", {"a": 0.5, "b": 0.5})], "t", {})


# --- page ------------------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """Every element with its attributes, and that each is closed in turn."""

    VOID = ("meta", "img", "br", "line", "circle")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.all: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.all.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.all.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def named(self, tag):
        return [attributes for name, attributes in self.all if name == tag]


def test_the_same_cases_make_the_same_bytes(made, tmp_path):
    again = report(made_up_cases(), "Evaluation of made-up cases", {"Weights": "none <b>"})
    for name, (result, page) in (("first", made), ("second", again)):
        write_report(tmp_path / name / "report.html", result, page)
    for suffix in ("html", "json"):
        first, second = ((tmp_path / name / f"report.{suffix}").read_bytes() for name in ("first", "second"))
        assert first == second
        assert len(first) > 10_000


def test_the_page_loads_nothing_and_runs_nothing(made):
    elements = Elements(made[1])
    assert not elements.named("script")
    assert not elements.named("link")
    links = [value for _, attributes in elements.all for key, value in attributes.items() if key in ("src", "href")]
    assert links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert not re.search(r"url\(|@import|https?://", made[1])
    policy = [a["content"] for a in elements.named("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_the_page_can_be_read_without_seeing_it(made):
    elements = Elements(made[1])
    levels = [int(tag[1]) for tag, _ in elements.all if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    assert len(elements.named("caption")) == len(elements.named("table"))
    assert all(a.get("scope") in ("row", "col") for a in elements.named("th"))
    assert all(len(a["alt"]) > 20 for a in elements.named("img"))
    ids = [attributes["id"] for _, attributes in elements.all if "id" in attributes]
    assert len(ids) == len(set(ids))
    referred = {a["href"][1:] for a in elements.named("a")}
    referred |= {i for _, a in elements.all for i in (a.get("aria-labelledby") or "").split()}
    assert referred <= set(ids)
    assert all(a["role"] == "img" for a in elements.named("svg"))
    assert len(elements.named("title")) == len(elements.named("svg")) + 1
    assert elements.named("html")[0]["lang"] == "en"


def test_text_that_looks_like_markup_stays_text(made):
    assert "none &lt;b&gt;" in made[1]


def test_pictures_of_patients_are_inlined_whole_and_warned_of(made):
    inlined = [a["src"].partition(",")[2] for a in Elements(made[1]).named("img")]
    assert len(inlined) > 30
    for data in inlined[:3]:
        assert Image.open(BytesIO(base64.b64decode(data))).size == (64, 64)
    assert "Holds pictures of real patients" in made[1]
    _, simulated = report([c for c in made_up_cases() if c.simulated], "t", {})
    assert "Holds pictures of real patients" not in simulated


def test_an_outline_surrounds_what_it_outlines():
    mask = np.zeros((20, 20), bool)
    mask[8:12, 8:12] = True
    pixels = np.asarray(Image.open(BytesIO(picture(np.full((20, 20), 40.0), [(mask, (70, 170, 255))]))))
    assert (pixels[mask] == 127).all()
    blue = (pixels == (70, 170, 255)).all(axis=-1)
    assert blue.sum() == 16
    assert blue[7, 8]


def test_a_report_does_not_replace_the_description_of_the_weights_it_is_about(tmp_path) -> None:
    description = tmp_path / "new.json"
    description.write_text('{"heads": {}, "calibration": {}}')
    with pytest.raises(ConfigError, match=r"new\.json is no earlier report"):
        check_report_path(tmp_path / "new.html")
    with pytest.raises(ConfigError, match="name another"):
        write_report(tmp_path / "new.html", {"title": "", "sets": []}, "page")
    assert description.read_text() == '{"heads": {}, "calibration": {}}'
    write_report(tmp_path / "report.html", {"title": "", "sets": []}, "page")
    write_report(tmp_path / "report.html", {"title": "again", "sets": []}, "page")  # an earlier report is replaced


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_a_telephone_and_a_desk(made, tmp_path, width, chromium):
    write_report(tmp_path / "report.html", *made)
    context = chromium.new_context(viewport={"width": width, "height": 740}, offline=True)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda said: complaints.append(said.text))
    page.goto((tmp_path / "report.html").as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    too_wide = page.evaluate(
        "[document.documentElement, ...document.querySelectorAll('td, th, p, h4, figure, .task, li')]"
        ".filter(e => e.scrollWidth > e.clientWidth + 1 || e.getBoundingClientRect().right > innerWidth + 1)"
        ".map(e => e.outerHTML.slice(0, 120))"
    )
    small = page.evaluate(
        "Math.min(...[...document.querySelectorAll('main *:not(svg *)')]"
        ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    context.close()
    assert complaints == []
    assert too_wide == []
    assert small >= 11


# --- from the models' answers to cases -------------------------------------------------------------------------------


def test_scores_of_the_detector_become_cases_with_volumes_and_pictures_where_the_data_are_there(tmp_path, monkeypatch):
    from herald.signatures import DETECTION_IN_PLANE
    from herald.volume import Volume
    from serving import crops, score_hemorrhage
    from serving.readers import UNKNOWN, LabelledVolume

    hounsfield = np.full((6, 64, 64), -1000, np.int16)
    hounsfield[:, 8:56, 8:56] = 35
    truth = np.zeros((6, 64, 64, 5), np.uint8)
    truth[2:4, 20:30, 20:30, [0, 1]] = 1  # 2 slices of 100 voxels of 5 x 1 x 1 mm
    slice_truth = truth.any(axis=(1, 2)).astype(np.uint8)
    slice_truth[5, 0] = UNKNOWN
    volume = Volume(hounsfield, np.arange(6) * 5.0, (1.0, 1.0))
    labelled = LabelledVolume("ct-ich", "049", volume, truth, slice_truth, child=True)
    monkeypatch.setitem(crops.ALL_SETS, "ct-ich", ("here", lambda folder: ["049"], lambda folder, name: labelled))
    logits = np.where(slice_truth == 1, 3.0, -3.0)
    (tmp_path / "scores" / "fold0").mkdir(parents=True)
    found = np.packbits(np.zeros((7, 6, DETECTION_IN_PLANE, DETECTION_IN_PLANE), bool), axis=-1)
    np.savez(
        tmp_path / "scores" / "fold0" / "ct-ich_049.npz",
        slice=logits,
        pooled=logits,
        slice_truth=slice_truth,
        study_truth=truth.max(axis=(0, 1, 2)),
        child=True,
        dice=np.full((7, 6), 0.5),
        outlined=slice_truth[:, 0] == 1,
        found=found,
    )
    calibration = {"scale": [1.0] * 5, "threshold_of_folds": [0.5] * 5, "mask_offset": [0.0]}

    without = score_hemorrhage.cases(tmp_path / "scores", calibration, tmp_path)
    assert all(c.picture is None and c.volume_ml is None and c.child for c in without)
    (tmp_path / "here").mkdir()
    cases = score_hemorrhage.cases(tmp_path / "scores", calibration, tmp_path)
    studies = {c.task: c for c in cases if c.unit == "study"}
    assert list(studies) == ["any bleeding", "IPH", "IVH", "SAH", "EDH/SDH"]
    assert studies["any bleeding"].kinds == ("IPH",)
    assert studies["any bleeding"].volume_ml == pytest.approx(1.0)
    assert studies["any bleeding"].probability["bleeding"] == pytest.approx(1 / (1 + np.exp(-(1.5 - 0.5))))
    assert (studies["SAH"].truth, studies["SAH"].volume_ml) == ("none", None)
    assert sum(c.picture is not None for c in cases) == 1
    slices = [c for c in cases if c.task == "any bleeding, by slice"]
    assert [(c.name, c.truth) for c in slices] == [("1", "none"), ("2", "none"), ("3", "bleeding"), ("4", "bleeding"),
                                                   ("5", "none")]  # fmt: skip
    assert [c.dice for c in slices] == [None, None, 0.5, 0.5, None]


def test_what_is_known_of_a_study_and_not_of_its_slices_counts_and_what_nobody_knows_does_not(tmp_path):
    from serving.readers import UNKNOWN
    from serving.score_hemorrhage import cases

    slice_truth = np.full((6, 5), UNKNOWN, np.uint8)
    slice_truth[:, 3] = 0
    study_truth = np.array([1, 1, UNKNOWN, 0, UNKNOWN], np.uint8)
    logits = np.full((6, 5), 2.0)
    (tmp_path / "fold0").mkdir()
    np.savez(tmp_path / "fold0" / "cq500_1.npz", slice=logits, pooled=logits, slice_truth=slice_truth, child=False,
             study_truth=study_truth, dice=np.zeros((7, 6)), outlined=np.zeros(6))  # fmt: skip
    calibration = {"scale": [1.0] * 5, "threshold_of_folds": [0.5] * 5, "mask_offset": [0.0]}
    found = cases(tmp_path, calibration, tmp_path)
    assert {(c.task, c.truth, c.kinds) for c in found if c.unit == "study"} == {
        ("any bleeding", "bleeding", ("IPH",)),
        ("IPH", "bleeding", ()),
        ("SAH", "none", ()),
    }
    assert {(c.task, c.truth) for c in found if c.unit == "slice"} == {("SAH, by slice", "none")}


def test_decisions_of_the_protocol_model_become_cases_of_the_heads_whose_label_is_known(monkeypatch):
    from rich.console import Console

    from herald.signatures import HEADS
    from herald.volume import Volume
    from serving import score_protocol

    volume = Volume(np.zeros((8, 64, 64), np.int16), np.arange(8) * 3.0, (1.0, 1.0))
    monkeypatch.setattr(score_protocol, "evaluation_sets", lambda data, sets, **_: iter([
        ("ct-ich, trained on", "049", volume, {"kernel": "soft", "region": "head"}, True, None),
        ("dicom", "phantom/bone-1mm", volume, {"orientation": "axial"}, None, dict.fromkeys(HEADS)),
        ("simulated, held out", "0", volume, {"contrast": "contrast"}, None, None),
    ]))  # fmt: skip
    answer = {head: np.linspace(0.6, 0.4, len(classes), dtype=np.float32) for head, classes in HEADS.items()}
    cases = score_protocol.evaluate(lambda batch: answer, None, ("all",), Console(quiet=True))
    assert [(c.source, c.task, c.trained_on, c.simulated, c.child, c.answer == c.truth) for c in cases] == [
        ("ct-ich, trained on", "kernel", True, False, True, True),
        ("ct-ich, trained on", "region", True, False, True, True),
        ("phantom", "orientation", False, False, None, True),
        ("simulated, held out", "contrast", False, True, None, False),
    ]
    assert [c.header for c in cases] == [None, None, "", None]
    assert [c.kernel for c in cases] == ["", "soft", "", ""]
    assert all(c.thickness_mm == 3.0 and Image.open(BytesIO(c.picture)).size == (384, 384) for c in cases)


def test_a_head_scan_is_told_from_everything_else_by_all_heads_at_once(monkeypatch):
    from rich.console import Console

    from herald.signatures import HEADS
    from herald.volume import Volume
    from serving import score_protocol

    volume = Volume(np.zeros((8, 64, 64), np.int16), np.arange(8) * 3.0, (1.0, 1.0))
    told = StringIO()
    series = [
        ("simulated", "0", volume, score_protocol.HEAD_SCAN, None, None),
        ("simulated", "1", volume, {**score_protocol.HEAD_SCAN, "contrast": "contrast"}, None, None),  # let through
        ("simulated", "2", volume, {"region": "other"}, None, None),  # let through as well
        ("simulated", "3", volume, {"region": "head"}, None, None),  # nobody knows
    ]
    monkeypatch.setattr(score_protocol, "evaluation_sets", lambda data, sets, **_: iter(series))
    answer = {head: np.linspace(0.9, 0.1, len(classes), dtype=np.float32) for head, classes in HEADS.items()}
    score_protocol.evaluate(lambda batch: answer, None, ("all",), Console(file=told, width=160))
    line = next(line for line in told.getvalue().splitlines() if "all at once" in line)
    assert "1/3" in line
