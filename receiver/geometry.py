"""Whether the planes of a series are whole: every stack in it even and without a gap.

What is odd but whole is taken for a gap, which costs the quiet period; what has a gap must not be taken for whole. One
gap cannot be seen: the last slice of a narrow stack at the joint with a wider one, over which the step is short enough.
"""

from collections.abc import Collection
from typing import Final

import numpy as np
from numpy.typing import NDArray

from herald.instance import MOST_SCOUTS, Plane

SAME_ORIENTATION: Final = 0.05
"""Largest difference of direction cosines within one stack."""
SAME_POSITION_MM: Final = 0.01
EVEN_TOLERANCE: Final = 0.1
"""Steps of one stack differ by less than this fraction,"""
ROUNDED_MM: Final = 0.11
"""or by what positions rounded to a tenth of a millimetre make of one step,"""
MOST_TOLERANCE: Final = 0.4
"""and never by more than this fraction: a missing slice makes a step twice as long."""
MOST_STACKS: Final = 3
"""Head protocols change their spacing or tilt once or twice, as from 4 mm in the posterior fossa to 7 mm above."""
FEWEST_STEPS: Final = 3
"""Fewest equal steps that make a stack of their own."""


def is_even(planes: Collection[Plane | None], fewest: int) -> bool:
    """Whether the planes are even, gap-free stacks, of which the largest has at least `fewest` positions.

    Stacks of one orientation lie end to end; stacks of several orientations (a tilt that changes) are judged each on
    its own. A plane without position, or positions that occur unequally often (a second pass that is half sent), are
    not even.
    """
    known = [plane for plane in planes if plane is not None]
    if len(known) < max(fewest, 2) or len(known) < len(planes):
        return False
    orientations = np.array([plane.orientation for plane in known])
    points = np.array([plane.position for plane in known])
    most = scouts = judged = 0
    while len(points):
        same = np.abs(orientations - orientations[0]).max(axis=1) < SAME_ORIENTATION
        if same.sum() <= MOST_SCOUTS:
            scouts += int(same.sum())
        else:
            positions = _distinct_positions_mm(points[same], orientations[same])
            if positions is None or not _end_to_end([float(step) for step in np.diff(positions)]):
                return False
            judged += 1
            most = max(most, len(positions))
        if scouts > MOST_SCOUTS or judged > MOST_STACKS:
            return False
        orientations, points = orientations[~same], points[~same]
    return most >= max(fewest, 2)


def _distinct_positions_mm(
    points: NDArray[np.float64], orientations: NDArray[np.float64]
) -> NDArray[np.float64] | None:
    """Ascending positions along the common normal; None when they occur unequally often."""
    usual = np.median(orientations, axis=0)
    positions = np.sort(points @ np.cross(usual[:3], usual[3:]))
    starts = np.flatnonzero(np.diff(positions, prepend=-np.inf) > SAME_POSITION_MM)
    times = np.diff(starts, append=len(positions))
    distinct: NDArray[np.float64] = positions[starts]
    return distinct if bool((times == times[0]).all()) else None


def _end_to_end(steps: list[float]) -> bool:
    """Whether the steps are those of one even stack, or of a few that meet without a gap."""
    runs: list[list[float]] = []
    for step in steps:
        if runs and abs(step - runs[-1][0]) <= _tolerance_mm(runs[-1][0]):
            runs[-1].append(step)
        else:
            runs.append([step])
    if len(runs) <= 1:
        return True
    for i, run in enumerate(runs):
        if len(run) >= FEWEST_STEPS:
            continue
        if len(run) > 1 or i in (0, len(runs) - 1) or min(len(runs[i - 1]), len(runs[i + 1])) < FEWEST_STEPS:
            return False
        # where two stacks meet one step is anything up to the wider spacing; a longer one is a gap
        wider = max(runs[i - 1][0], runs[i + 1][0])
        if run[0] > wider + _tolerance_mm(wider):
            return False
    return sum(len(run) >= FEWEST_STEPS for run in runs) <= MOST_STACKS


def _tolerance_mm(step: float) -> float:
    return min(max(EVEN_TOLERANCE * step, ROUNDED_MM), MOST_TOLERANCE * step)
