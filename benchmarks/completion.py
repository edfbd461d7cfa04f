"""How long after its last C-STORE response is a series announced, and how often was it closed too early?

    python benchmarks/completion.py [--series 30] [--simulated 12000] [--seed 1]

Measured: senders of six behaviours, at once and each under its own AE title, against the real receiver with its
default settings: real associations, files, ledger rows. Images are small, so that not the network is measured.
`seconds` is from the last C-STORE response of a series to the SeriesReceived that holds all of it.

Simulated: the same behaviours drive the receiver's state machine with a simulated clock, over senders that are drawn
at random, for enough series to see one premature close in a thousand; without the time for commits and publishing.

All times are drawn as the docstring of `Habits` states. Series whose sender had sent fewer than ten before
(`learning`) are reported apart. Prints one JSON object.
"""

import argparse
import json
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from pydicom.dataset import Dataset  # noqa: E402
from pynetdicom.association import Association  # noqa: E402
from receiver_fakes import ListBus, association, config_under, ct_series, receiving  # noqa: E402

from herald.config import ReceiverConfig  # noqa: E402
from herald.events import SeriesReceived  # noqa: E402
from herald.instance import InstanceHeader, Plane  # noqa: E402
from receiver.assembly import Assembly  # noqa: E402
from receiver.settle import KNOWN_AFTER_SERIES, Settling  # noqa: E402

SETTLE = {"settle_s": ReceiverConfig.settle_s, "quiet_s": ReceiverConfig.quiet_s}
REPAIR_WAIT_S = 40.0
"""A series that is not announced whole by then counts as not repaired."""
PARALLEL = 4
INTERLEAVED = 3


# --- senders ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One thing that a sender does, `pause_s` after what it did before."""

    kind: Literal["open", "image", "release"]
    pause_s: float
    association: int
    series: int = 0
    image: int = 0


Lane = list[Step]
"""What one thread of a sender does in turn."""


@dataclass(frozen=True)
class Habits:
    """Pauses of one sender, log-normal: median (s) and sigma.

    Drawn for each sender of the simulation: fast median 2 to 50 ms, slow median 0.1 to 1 s (both log-uniform), sigma
    0.5; stutter 0.5 to 8 s (uniform), in one place of twenty. Of the measured ones, slow is 0.25 s.
    """

    fast_s: float = 0.01
    slow_s: float = 0.25
    stutter_s: tuple[float, float] = (0.5, 4.0)
    sigma: float = 0.5

    @staticmethod
    def drawn(rng: random.Random) -> "Habits":
        """Those of a simulated sender."""
        return Habits(
            fast_s=math.exp(rng.uniform(math.log(0.002), math.log(0.05))),
            slow_s=math.exp(rng.uniform(math.log(0.1), math.log(1.0))),
            stutter_s=(0.5, 8.0),
        )

    def fast(self, rng: random.Random) -> float:
        """One short pause."""
        return rng.lognormvariate(math.log(self.fast_s), self.sigma)

    def slow(self, rng: random.Random) -> float:
        """One long pause."""
        return rng.lognormvariate(math.log(self.slow_s), self.sigma)

    def stutter(self, rng: random.Random) -> float:
        """Mostly no pause."""
        return rng.uniform(*self.stutter_s) if rng.random() < 0.05 else 0.0


def one_association(count: int, habits: Habits, rng: random.Random) -> list[Lane]:
    images = [Step("image", 0.0, 0, image=i) for i in range(count)]
    return [[Step("open", 0.0, 0), *images, Step("release", 0.0, 0)]]


def one_association_that_stutters(count: int, habits: Habits, rng: random.Random) -> list[Lane]:
    images = [Step("image", habits.stutter(rng), 0, image=i) for i in range(count)]
    return [[Step("open", 0.0, 0), *images, Step("release", habits.stutter(rng), 0)]]


def _association_per_image(count: int, pause: Callable[[], float]) -> list[Lane]:
    lane = []
    for i in range(count):
        lane += [Step("open", pause(), i), Step("image", 0.0, i, image=i), Step("release", 0.0, i)]
    return [lane]


def association_per_image_fast(count: int, habits: Habits, rng: random.Random) -> list[Lane]:
    return _association_per_image(count, lambda: habits.fast(rng))


def association_per_image_with_pauses(count: int, habits: Habits, rng: random.Random) -> list[Lane]:
    return _association_per_image(count, lambda: habits.slow(rng))


def several_series_interleaved(count: int, habits: Habits, rng: random.Random) -> list[Lane]:
    images = [Step("image", 0.0, 0, series=s, image=i) for i in range(count) for s in range(INTERLEAVED)]
    return [[Step("open", 0.0, 0), *images, Step("release", 0.0, 0)]]


def one_series_over_parallel_associations(count: int, habits: Habits, rng: random.Random) -> list[Lane]:
    return [
        [
            Step("open", habits.fast(rng), lane),
            *(Step("image", habits.fast(rng), lane, image=i) for i in range(lane, count, PARALLEL)),
            Step("release", 0.0, lane),
        ]
        for lane in range(PARALLEL)
    ]


BEHAVIOURS: tuple[Callable[[int, Habits, random.Random], list[Lane]], ...] = (
    one_association,
    association_per_image_fast,
    association_per_image_with_pauses,
    several_series_interleaved,
    one_series_over_parallel_associations,
    one_association_that_stutters,
)


# --- outcomes --------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What became of one series."""

    nth_of_sender: int
    count: int
    longest_pause_s: float
    """That its sender made by itself, without the time for handshakes and images."""
    last_response: float = math.inf
    announced: list[tuple[float, int]] = field(default_factory=list)
    """When, and with how many images."""

    @property
    def premature(self) -> int:
        """How often it was closed without all of its images."""
        return sum(images < self.count for _, images in self.announced)

    @property
    def whole_at(self) -> float | None:
        """When all of it was announced."""
        return next((at for at, images in self.announced if images == self.count), None)


def _longest_pause_s(lanes: list[Lane]) -> float:
    return max(step.pause_s for lane in lanes for step in lane)


def summary(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    outcomes = list(outcomes)
    early = [outcome for outcome in outcomes if outcome.nth_of_sender < KNOWN_AFTER_SERIES]
    late = [outcome for outcome in outcomes if outcome.nth_of_sender >= KNOWN_AFTER_SERIES]
    return {"all": _figures(outcomes), "learning": _figures(early), "learned": _figures(late)}


def _figures(outcomes: list[Outcome]) -> dict[str, Any]:
    if not outcomes:
        return {"n": 0}
    seconds = sorted(o.whole_at - o.last_response for o in outcomes if o.whole_at is not None)
    premature = [outcome for outcome in outcomes if outcome.premature]
    return {
        "n": len(outcomes),
        "seconds_median": round(statistics.median(seconds), 3),
        "seconds_p95": round(seconds[math.ceil(0.95 * len(seconds)) - 1], 3),
        "seconds_max": round(seconds[-1], 3),
        "premature_closes": sum(outcome.premature for outcome in outcomes),
        "premature_series": len(premature),
        "premature_share": round(len(premature) / len(outcomes), 5),
        "premature_for_a_pause_beyond_settle_max_s": sum(
            outcome.longest_pause_s >= ReceiverConfig.settle_max_s for outcome in premature
        ),
        "not_repaired": sum(outcome.whole_at is None for outcome in outcomes),
    }


def report(found: dict[str, list[Outcome]]) -> dict[str, Any]:
    return {
        "all_behaviours": summary(outcome for outcomes in found.values() for outcome in outcomes),
        **{name: summary(outcomes) for name, outcomes in found.items()},
    }


# --- measured --------------------------------------------------------------------------------------------------------


class Announcements(ListBus):
    """The receiver's bus: when each series was announced, by its UID."""

    def __init__(self) -> None:
        super().__init__()
        self._of_series: dict[str, list[tuple[float, int]]] = defaultdict(list)

    def __call__(self, event: SeriesReceived) -> None:
        """Take an announcement."""
        with self._changed:
            self._of_series[event.series_instance_uid].append((time.monotonic(), event.instance_count))
            self._changed.notify_all()

    def whole(self, series_instance_uid: str, count: int) -> list[tuple[float, int]]:
        """All announcements of a series, once one holds all of it, or after long enough."""
        with self._changed:
            found = self._of_series[series_instance_uid]
            self._changed.wait_for(lambda: any(images == count for _, images in found), REPAIR_WAIT_S)
            return list(found)


def measured(series: int, seed: int) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = {}
    bus = Announcements()
    with tempfile.TemporaryDirectory() as folder, receiving(config_under(Path(folder), **SETTLE), bus) as receiver:

        def send(behaviour: Callable[[int, Habits, random.Random], list[Lane]], number: int) -> None:
            rng = random.Random(f"{seed}/{number}")
            of_sender: list[Outcome] = []
            while len(of_sender) < series:
                count = rng.randint(20, 40)
                lanes = behaviour(count, Habits(), rng)
                of_sender += _sent(lanes, count, f"SENDER{number}", receiver.port, bus, len(of_sender))
            found[behaviour.__name__] = of_sender

        _all_at_once([(send, behaviour, number) for number, behaviour in enumerate(BEHAVIOURS)])
    return {behaviour.__name__: found[behaviour.__name__] for behaviour in BEHAVIOURS}


def _sent(lanes: list[Lane], count: int, sender: str, port: int, bus: Announcements, nth: int) -> list[Outcome]:
    """Send what the lanes say and wait until all of it was announced."""
    stacks: dict[int, list[Dataset]] = {step.series: [] for lane in lanes for step in lane if step.kind == "image"}
    for number in stacks:
        stacks[number] = ct_series(count)
    responses: dict[int, list[float]] = defaultdict(list)

    def walk(lane: Lane) -> None:
        with ExitStack() as associations:
            is_open: dict[int, tuple[ExitStack, Association]] = {}
            for step in lane:
                time.sleep(step.pause_s)
                if step.kind == "open":
                    held = associations.enter_context(ExitStack())
                    is_open[step.association] = held, held.enter_context(association(port, calling=sender))
                elif step.kind == "image":
                    status = is_open[step.association][1].send_c_store(stacks[step.series][step.image]).Status
                    assert status == 0, f"0x{status:04X}"
                    responses[step.series].append(time.monotonic())
                else:
                    is_open.pop(step.association)[0].close()

    _all_at_once([(walk, lane) for lane in lanes])
    outcomes = []
    for offset, (number, stack) in enumerate(sorted(stacks.items())):
        announced = bus.whole(str(stack[0].SeriesInstanceUID), count)
        outcomes.append(Outcome(nth + offset, count, _longest_pause_s(lanes), max(responses[number]), announced))
    return outcomes


def _all_at_once(calls: list[tuple[Any, ...]]) -> None:
    """Each call (function, arguments) in a thread of its own; the first error is raised."""
    errors: list[BaseException] = []

    def run(function: Callable[..., None], *arguments: Any) -> None:
        try:
            function(*arguments)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


# --- simulated -------------------------------------------------------------------------------------------------------

HANDSHAKE_S = 0.003
IMAGE_S = 0.015, 0.3
"""Median and sigma of the log-normal time that one image takes."""
SERIES_PER_SENDER = 100


def simulated(series: int, seed: int, settling: Settling | None = None) -> dict[str, list[Outcome]]:
    """`series` in all, 100 from each sender, in turn through the behaviours."""
    found: dict[str, list[Outcome]] = {behaviour.__name__: [] for behaviour in BEHAVIOURS}
    config = ReceiverConfig()
    settling = settling or Settling(config.settle_s, config.settle_min_s, config.settle_max_s)
    for number in range(math.ceil(series / SERIES_PER_SENDER)):
        behaviour = BEHAVIOURS[number % len(BEHAVIOURS)]
        rng = random.Random(f"{seed}/{number}")
        sender = SimulatedSender(f"SENDER{number}", behaviour, rng, config, settling)
        found[behaviour.__name__] += sender.outcomes(SERIES_PER_SENDER)
    return found


class SimulatedSender:
    """One sender and the receiver's state machine, on a clock of their own."""

    def __init__(
        self,
        ae_title: str,
        behaviour: Callable[[int, Habits, random.Random], list[Lane]],
        rng: random.Random,
        config: ReceiverConfig,
        settling: Settling,
    ) -> None:
        self._ae_title = ae_title
        self._behaviour = behaviour
        self._rng = rng
        self._habits = Habits.drawn(rng)
        self._config = config
        self._assembly = Assembly(settling, config.quiet_s, config.min_even_slices)
        self._received: dict[tuple[str, str], list[InstanceHeader]] = defaultdict(list)
        self._outcomes: dict[tuple[str, str], Outcome] = {}

    def outcomes(self, series: int) -> list[Outcome]:
        """Send so many series, a few seconds apart."""
        now, sent = 0.0, 0
        while len(self._outcomes) < series:
            count = self._rng.randint(20, 200)
            now = self._send(self._behaviour(count, self._habits, self._rng), count, now, sent)
            sent += 1
        self._close_until(now + 2 * self._config.quiet_s)
        return list(self._outcomes.values())[:series]

    def _send(self, lanes: list[Lane], count: int, now: float, sent: int) -> float:
        """Walk all lanes; returns when the next series starts."""
        first = len(self._outcomes)
        events = sorted((event for lane in lanes for event in self._timed(lane, now)), key=lambda event: event[0])
        for at, step in events:
            self._close_until(at)
            link = sent * 1000 + step.association
            if step.kind == "image":
                key = (f"1.{sent}", f"1.{sent}.{step.series}")
                if key not in self._outcomes:
                    self._outcomes[key] = Outcome(first + step.series, count, _longest_pause_s(lanes))
                self._image(key, step.image, link, at)
            elif step.kind == "release":
                self._assembly.association_ended(link, at)
        return events[-1][0] + self._rng.uniform(0.0, 3.0)

    def _timed(self, lane: Lane, now: float) -> Iterator[tuple[float, Step]]:
        for step in lane:
            now += step.pause_s
            now += self._rng.lognormvariate(math.log(IMAGE_S[0]), IMAGE_S[1]) if step.kind == "image" else HANDSHAKE_S
            yield now, step

    def _image(self, key: tuple[str, str], number: int, link: int, at: float) -> None:
        plane = Plane((0.0, 0.0, 5.0 * number), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0))
        header = InstanceHeader("", f"{key[1]}.{number}", *key, "", "", "CT", "", stacked=True, plane=plane)
        if self._assembly.image(key, header, link, self._ae_title, at):
            self._assembly.earlier(key, self._received[key])
        self._received[key].append(header)
        self._outcomes[key].last_response = at

    def _close_until(self, now: float) -> None:
        while (deadline := self._assembly.deadline()) is not None and deadline <= now:
            for closed in self._assembly.due(deadline):
                self._outcomes[closed.key].announced.append((deadline, len(self._received[closed.key])))


# --- command ---------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=int, default=30, help="measured, of each behaviour; 0 is none")
    parser.add_argument("--simulated", type=int, default=12000, help="simulated, in all; 0 is none")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
        "settings": {
            name: getattr(ReceiverConfig, name)
            for name in ("settle_s", "settle_min_s", "settle_max_s", "quiet_s", "min_even_slices")
        },
    }
    if arguments.series:
        results["measured"] = report(measured(arguments.series, arguments.seed))
    if arguments.simulated:
        results["simulated"] = report(simulated(arguments.simulated, arguments.seed))
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
