"""The protocol decision: pixels decide, headers are compared, doubt is analysed."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herald.config import RouterConfig
from herald.errors import SignatureMismatch
from herald.signatures import HEADS
from router.decision import REQUIRED, decide

CONFIG = RouterConfig()
NOTHING: Mapping[str, str | None] = dict.fromkeys(HEADS)


def answers(**given_: tuple[str, float]) -> dict[str, dict[str, float]]:
    """Softmaxes: what is required with 0.99, except for the heads that are given as (label, probability)."""
    result = {}
    for head, labels in HEADS.items():
        label, probability = given_.get(head, (REQUIRED[head], 0.99))
        rest = (1 - probability) / (len(labels) - 1)
        result[head] = {name: probability if name == label else rest for name in labels}
    return result


def test_a_sure_non_contrast_soft_axial_head_is_analysed() -> None:
    decision = decide(answers(), NOTHING, CONFIG)
    assert decision.eligible
    assert not decision.uncertain
    assert decision.reasons == ()


@pytest.mark.parametrize(
    ("head", "label"),
    [
        ("contrast", "contrast"),
        ("orientation", "coronal"),
        ("orientation", "sagittal"),
        ("kernel", "bone"),
        ("region", "other"),
    ],
)
def test_a_sure_other_answer_makes_it_not_eligible_with_pixels_and_header_in_the_reason(head: str, label: str) -> None:
    decision = decide(answers(**{head: (label, 0.97)}), {**NOTHING, head: label}, CONFIG)
    assert not decision.eligible
    assert len(decision.reasons) == 1
    assert decision.reasons[0].startswith(f"{head}: ")
    assert "0.97" in decision.reasons[0]
    assert "the header says" in decision.reasons[0]


def test_an_unsure_other_answer_is_analysed_and_marked_because_a_missed_bleed_is_worse() -> None:
    decision = decide(answers(contrast=("contrast", 0.6)), NOTHING, CONFIG)
    assert decision.eligible
    assert decision.uncertain
    assert decision.reasons[0].startswith("uncertain: contrast")


def test_an_unsure_right_answer_is_marked_too() -> None:
    assert decide(answers(kernel=("soft", 0.6)), NOTHING, CONFIG).uncertain


def test_a_site_may_leave_unsure_series_out() -> None:
    decision = decide(answers(contrast=("contrast", 0.6)), NOTHING, RouterConfig(analyse_uncertain=False))
    assert not decision.eligible


def test_the_header_never_decides_but_its_disagreement_is_told() -> None:
    decision = decide(answers(), {**NOTHING, "kernel": "bone", "region": "head"}, CONFIG)
    assert decision.eligible
    assert decision.disagreements == ("kernel",)


@given(st.data())
def test_every_answer_gives_one_decision_and_a_refusal_has_a_reason(data: st.DataObject) -> None:
    probabilities = {}
    for head, labels in HEADS.items():
        raw = [data.draw(st.floats(0.001, 1)) for _ in labels]
        probabilities[head] = {name: value / sum(raw) for name, value in zip(labels, raw, strict=True)}
    decision = decide(probabilities, NOTHING, CONFIG)
    assert decision.eligible or decision.reasons
    assert not (decision.uncertain and not decision.eligible)
    assert set(decision.protocol) == set(HEADS)


def test_further_heads_are_told_and_decide_nothing() -> None:
    decision = decide({**answers(), "phase": {"arterial": 0.4, "delayed": 0.6}}, NOTHING, CONFIG)
    assert decision.eligible
    assert not decision.uncertain
    assert decision.protocol["phase"].label == "delayed"


def test_a_header_that_names_a_class_the_model_does_not_know_disagrees_with_nothing() -> None:
    regions = {"head": 0.1, "chest": 0.9}
    decision = decide({**answers(), "region": regions}, {**NOTHING, "region": "other"}, CONFIG)
    assert not decision.eligible
    assert decision.reasons[0].startswith("region: chest (0.90)")
    assert decision.disagreements == ()


def test_a_model_that_cannot_tell_what_triage_needs_is_refused_with_what_it_lacks() -> None:
    lacking = {**answers(), "region": {"chest": 0.5, "abdomen": 0.5}}
    del lacking["contrast"]
    with pytest.raises(SignatureMismatch, match=r"no head contrast .*, no class head in its head region"):
        decide(lacking, NOTHING, CONFIG)
