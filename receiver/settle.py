"""How long a released series rests before it is closed: learned, per sender, from the pauses that it has shown.

A pause is the time from the moment when nobody sent a series any more to its next new image. Modalities that open an
association per image, or stop between two, show pauses in every series; others never do. A rest that is longer than
the longest pause closes no series too early.
"""

import math
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Final

MARGIN: Final = 3.0
"""A rest is the longest pause times 1 + MARGIN / sqrt(n), of n series with pauses: the fewer were seen, the more the
longest understates. Where pauses have a long tail (log-normal, sigma 0.5) about one series of a thousand then closes
too early, elsewhere fewer; see benchmarks/completion.py."""
REMEMBERED_SERIES: Final = 200
"""So many series of a sender are looked back on. A pause in one of n series is forgotten, and then costs a premature
close, in less than 1 of 200 e = 540 series whatever n is; a pause that was a person's is forgotten in some days."""
KNOWN_AFTER_SERIES: Final = 10
"""So many series must have come before a sender's rest may be shorter than the first."""
MOST_SENDERS: Final = 1000
"""Senders heard of longest ago are forgotten: who calls may name itself anything."""


@dataclass
class _Sender:
    longest_s: float = 0.0
    paused: int = 0
    """How many of the last series showed a pause."""
    pauses: OrderedDict[Hashable, float] = field(default_factory=OrderedDict)
    """Longest pause in each of the last series, newest last."""

    def note(self, series: Hashable, pause_s: float) -> None:
        before_s = self.pauses.pop(series, 0.0)
        self.pauses[series] = max(pause_s, before_s)
        self.paused += before_s == 0.0 < pause_s
        self.longest_s = max(self.longest_s, pause_s)
        if len(self.pauses) > REMEMBERED_SERIES:
            _, forgotten_s = self.pauses.popitem(last=False)
            self.paused -= forgotten_s > 0.0
            if forgotten_s >= self.longest_s:
                self.longest_s = max(self.pauses.values())


class Settling:
    """Rests in seconds: `first_s` for senders not yet known, `min_s` to `max_s` for the others."""

    def __init__(self, first_s: float, min_s: float, max_s: float) -> None:
        self._first_s = first_s
        self._min_s = min_s
        self.max_s = max_s
        self._senders: OrderedDict[str, _Sender] = OrderedDict()

    def note(self, sender: str, series: Hashable, pause_s: float) -> None:
        """A series of this sender has shown this pause, at once when it is seen, or has closed without (0).

        A pause beyond `max_s` could not be bridged, so that resting longer for it would only delay; it is not noted.
        """
        if pause_s > self.max_s:
            return
        self._senders.setdefault(sender, _Sender()).note(series, pause_s)
        self._senders.move_to_end(sender)
        if len(self._senders) > MOST_SENDERS:
            self._senders.popitem(last=False)

    def rest_s(self, senders: Iterable[str], pause_s: float = 0.0) -> float:
        """The rest of a series that came from `senders` and has shown `pause_s` itself: the longest that one needs."""
        return max((self._rest_of(sender, pause_s) for sender in senders), default=self._first_s)

    def _rest_of(self, name: str, pause_s: float) -> float:
        sender = self._senders.get(name) or _Sender()
        longest_s = max(sender.longest_s, pause_s)
        bridging_s = min(longest_s * (1 + MARGIN / math.sqrt(max(sender.paused, 1))), self.max_s)
        return max(self._min_s if len(sender.pauses) >= KNOWN_AFTER_SERIES else self._first_s, bridging_s)
