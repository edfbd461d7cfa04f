"""From the protocol model's probabilities to: analyse, analyse but uncertain, or not eligible."""

from collections.abc import Mapping
from dataclasses import dataclass

from herald.config import RouterConfig
from herald.events import Label
from herald.signatures import HEADS

REQUIRED: Mapping[str, str] = {"contrast": "non_contrast", "orientation": "axial", "kernel": "soft", "region": "head"}
"""What a series must be to be searched for haemorrhage."""

WORDS: Mapping[str, str] = {
    "non_contrast": "without contrast medium",
    "contrast": "with contrast medium",
    "axial": "axial",
    "coronal": "coronal",
    "sagittal": "sagittal",
    "soft": "soft-tissue kernel",
    "bone": "bone kernel",
    "head": "head",
    "other": "not a head",
}


@dataclass(frozen=True)
class Decision:
    """What the pixels say, whether to analyse, and why not; `uncertain` marks answers below the certain probability."""

    protocol: dict[str, Label]
    eligible: bool
    uncertain: bool
    reasons: tuple[str, ...]
    disagreements: tuple[str, ...]


def decide(
    probabilities: Mapping[str, Mapping[str, float]], claim: Mapping[str, str | None], config: RouterConfig
) -> Decision:
    """Decide from the pixels; the header's claim is only compared.

    `probabilities` maps head -> label -> softmax. A head that surely differs from what is required makes the series
    not eligible. An unsure answer does not: missing a bleed is worse than an extra look (`analyse_uncertain`).
    """
    protocol = {head: _label(probabilities[head]) for head in HEADS}
    wrong = [head for head, answer in protocol.items() if answer.label != REQUIRED[head]]
    unsure = [head for head, answer in protocol.items() if answer.probability < config.certain_probability]
    blocking = [head for head in wrong if head not in unsure or not config.analyse_uncertain]
    reasons = tuple(_reason(head, protocol[head], claim.get(head)) for head in blocking)
    if not blocking and unsure:
        reasons = tuple(f"uncertain: {_reason(head, protocol[head], claim.get(head))}" for head in unsure)
    return Decision(
        protocol=protocol,
        eligible=not blocking,
        uncertain=bool(unsure) and not blocking,
        reasons=reasons,
        disagreements=tuple(head for head in HEADS if claim.get(head) not in (None, protocol[head].label)),
    )


def _label(probabilities: Mapping[str, float]) -> Label:
    best = max(probabilities, key=lambda label: probabilities[label])
    return Label(best, float(probabilities[best]))


def _reason(head: str, answer: Label, claim: str | None) -> str:
    says = f"the header says {WORDS.get(claim, claim)}" if claim else "the header says nothing"
    return f"{head}: {WORDS[answer.label]} ({answer.probability:.2f}) from the pixels, {says}"
