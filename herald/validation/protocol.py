"""Header against pixels: how often they agree, and who was right where a reader has said so."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy import stats

from herald.signatures import HEADS
from herald.validation.row import ValidationRow
from herald.validation.statistics import Estimate, share

WANTED = {head: classes[0] for head, classes in HEADS.items()}
"""The class of each head that a series must have to be searched; its first one."""


@dataclass(frozen=True)
class HeadAgreement:
    """One head: how often the header speaks, agrees, and what either said."""

    head: str
    n: int
    silent: int
    agreement: Estimate
    """Of those where the header speaks."""
    labels: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    """Rows are the header's label, columns the pixels'; the last row is the silent header."""
    known: int
    """Series whose truth a reader's verdict implies."""
    pixels: Estimate
    headers: Estimate
    """A silent header has not answered rightly."""
    p: float | None
    """Exact McNemar test of whether either is right more often."""


def agreement(rows: Sequence[ValidationRow]) -> list[HeadAgreement]:
    """Every head that the protocol model answered, of the series that no later revision replaced."""
    asked = [row for row in rows if row.protocol and not row.superseded]
    heads = [*HEADS, *sorted({head for row in asked for head in row.protocol} - set(HEADS))]
    return [_head(head, [row for row in asked if head in row.protocol]) for head in heads]


def _head(head: str, rows: Sequence[ValidationRow]) -> HeadAgreement:
    pairs = Counter((row.header.get(head), row.protocol[head].label) for row in rows)
    speaking = sum(n for (claim, _), n in pairs.items() if claim)
    labels = tuple(sorted({label for pair in pairs for label in pair if label}, key=_order(head)))
    right = []  # of each series whose truth is known: whether the pixels were, and whether the header was
    for row in rows:
        wanted = implied(row, head)
        if wanted is not None:
            claim = row.header.get(head)
            said = row.protocol[head].label == WANTED[head]
            right.append((said == wanted, bool(claim) and (claim == WANTED[head]) == wanted))
    only_pixels = sum(pixels and not header for pixels, header in right)
    only_header = sum(header and not pixels for pixels, header in right)
    differ = only_pixels + only_header
    return HeadAgreement(
        head=head,
        n=len(rows),
        silent=len(rows) - speaking,
        agreement=share(sum(n for (claim, label), n in pairs.items() if claim == label), speaking),
        labels=labels,
        confusion=tuple(tuple(pairs[claim, label] for label in labels) for claim in (*labels, None)),
        known=len(right),
        pixels=share(sum(pixels for pixels, _ in right), len(right)),
        headers=share(sum(header for _, header in right), len(right)),
        p=float(stats.binomtest(only_pixels, differ).pvalue) if differ else None,
    )


def implied(row: ValidationRow, head: str) -> bool | None:
    """Whether the series has the wanted class of `head`, as far as verdicts on its exclusion say so.

    Who disagrees with an exclusion says that the series should have been searched: every head is as wanted. Who agrees
    with one that a single head decided says that this head is not. A verdict on haemorrhage says nothing of the
    protocol: readers judge contrast and bone series too. None where verdicts are missing or differ.
    """
    if row.disposition != "not_eligible" or head not in WANTED or head not in row.protocol:
        return None
    verdicts = {reading.action for reading in row.readings} & {"agree", "disagree"}
    if len(verdicts) != 1:
        return None
    if verdicts == {"disagree"}:
        return True
    unwanted = [h for h, label in WANTED.items() if h in row.protocol and row.protocol[h].label != label]
    return False if unwanted == [head] else None


def _order(head: str) -> Callable[[str], tuple[int, str]]:
    known = HEADS.get(head, ())
    return lambda label: (known.index(label) if label in known else len(known), label)
