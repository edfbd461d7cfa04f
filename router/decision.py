"""From the protocol model's probabilities to: analyse, analyse but uncertain, or not eligible."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from herald.config import RouterConfig
from herald.errors import SignatureMismatch
from herald.events import Label
from herald.heads import best

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


def triage_needs(heads: Mapping[str, Collection[str]], model: str) -> None:
    """Raise SignatureMismatch, naming what `model` lacks, unless its heads and classes tell what is `REQUIRED`."""
    missing = [
        f"no class {label} in its head {head}" if head in heads else f"no head {head} that always answers"
        for head, label in REQUIRED.items()
        if label not in heads.get(head, ())
    ]
    if missing:
        raise SignatureMismatch(
            f"{model} has {', '.join(missing)}, which triage needs; it tells {', '.join(heads)}. Serve one trained "
            "with the heads of serving/heads/default.toml, others beside them"
        )


def decide(
    probabilities: Mapping[str, Mapping[str, float]], claim: Mapping[str, str | None], config: RouterConfig
) -> Decision:
    """Decide from the pixels; the header's claim is only compared.

    `probabilities` maps head -> label -> softmax. A head that surely differs from what is required makes the series
    not eligible. An unsure answer does not: missing a bleed is worse than an extra look (`analyse_uncertain`). Heads
    beyond those required are told and decide nothing. Raises SignatureMismatch where a required one is missing.
    """
    triage_needs(probabilities, "the protocol model")
    protocol = {head: _label(probabilities[head]) for head in {**REQUIRED, **probabilities}}
    wrong = [head for head, label in REQUIRED.items() if protocol[head].label != label]
    unsure = [head for head in REQUIRED if protocol[head].probability < config.certain_probability]
    blocking = [head for head in wrong if head not in unsure or not config.analyse_uncertain]
    reasons = tuple(_reason(head, protocol[head], claim.get(head)) for head in blocking)
    if not blocking and unsure:
        reasons = tuple(f"uncertain: {_reason(head, protocol[head], claim.get(head))}" for head in unsure)
    return Decision(
        protocol=protocol,
        eligible=not blocking,
        uncertain=bool(unsure) and not blocking,
        reasons=reasons,
        disagreements=tuple(
            head
            for head, said in claim.items()
            if said in probabilities.get(head, ()) and said != protocol[head].label  # a class that the model knows
        ),
    )


def _label(probabilities: Mapping[str, float]) -> Label:
    label = best(probabilities)
    return Label(label, float(probabilities[label]))


def _reason(head: str, answer: Label, claim: str | None) -> str:
    says = f"the header says {WORDS.get(claim, claim)}" if claim else "the header says nothing"
    return f"{head}: {WORDS.get(answer.label, answer.label)} ({answer.probability:.2f}) from the pixels, {says}"
