"""The heads of a protocol model as data: what each answers, and how the answers for one series become one.

Training reads them from a TOML file (`serving/heads/*.toml`); an exported model carries them in its card, from which
the router learns what the served model answers.
"""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from herald.errors import ConfigError
from herald.signatures import CARD, HEADS

NAME = re.compile(r"[a-z][a-z0-9_]*")
RESERVED = frozenset({CARD, "volume", "path", "patient"})
"""Tensors of the model and columns of a site's table that a head would be taken for."""

Scores = NDArray[np.float32]
Aggregation = Literal["mean", "median", "max", "middle"]


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One question to the model and its possible answers."""

    classes: tuple[str, ...]
    """In output order."""
    loss_weight: float = 1.0
    reads: Literal["features", "texture"] = "features"
    """All features of the trunk, or the texture of the noise alone."""
    aggregation: Aggregation = "mean"
    """How the scores of several chunks of a series become one."""
    given: dict[str, str] = {}
    """Earlier heads and the answer that each must have for this question to make sense; empty for always."""


Heads = Mapping[str, Head]

TRIAGE_HEADS: Heads = {name: Head(classes) for name, classes in HEADS.items()}
"""What a served model without a card is taken for."""


def parse_heads(content: Mapping[str, Any], where: str) -> dict[str, Head]:
    """Heads by name, in order, from a table for each; raises ConfigError that names `where`, head and cure."""
    if not content:
        raise ConfigError(f"{where} has no head; write a table for each, as in serving/heads/default.toml")
    heads: dict[str, Head] = {}
    for name, table in content.items():
        if not NAME.fullmatch(name) or name in RESERVED:
            raise ConfigError(
                f"{where}: {name!r} cannot be a head; use lower case, digits and _, and none of "
                f"{', '.join(sorted(RESERVED))}"
            )
        try:
            head = msgspec.convert(table, Head)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{where}, head {name}: {error}; see serving/heads/default.toml") from error
        if len(set(head.classes)) < max(2, len(head.classes)):
            raise ConfigError(f"{where}, head {name}: {list(head.classes)} are not at least two different classes")
        if not head.loss_weight > 0:
            raise ConfigError(f"{where}, head {name}: loss_weight must be above 0; leave the head out instead")
        for other, answer in head.given.items():
            if other not in heads or answer not in heads[other].classes:
                raise ConfigError(f"{where}, head {name}: given names {other} = {answer!r}, which no head above has")
        heads[name] = head
    return heads


def read_heads(path: Path) -> dict[str, Head]:
    """The heads of a TOML file; raises ConfigError."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"heads {path} cannot be read ({error}); correct the file or its name") from error
    return parse_heads(content, path.name)


def aggregate(scores: Scores, how: Aggregation) -> Scores:
    """Softmaxes (N, C) of the N chunks of a series to one (C,) that sums to 1.

    `middle` is the mean of the middle half of each class' scores, which one odd chunk cannot move.
    """
    if how == "mean":
        one = scores.mean(axis=0)
        return np.asarray(one, np.float32)  # a mean of softmaxes sums to 1 already
    if how == "median":
        one = np.median(scores, axis=0)
    elif how == "max":
        one = scores.max(axis=0)
    else:
        cut = len(scores) // 4
        one = np.sort(scores, axis=0)[cut : len(scores) - cut].mean(axis=0)
    return np.asarray(one / one.sum(), np.float32)


def answers(scores: Mapping[str, Scores], heads: Heads) -> dict[str, dict[str, float]]:
    """Head -> class -> probability of a series, from softmaxes (N, C) of its chunks by head.

    A head whose `given` the other answers do not meet is left out: its question makes no sense for this series.
    """
    found: dict[str, dict[str, float]] = {}
    for name, head in heads.items():
        if all(other in found and best(found[other]) == answer for other, answer in head.given.items()):
            found[name] = dict(zip(head.classes, aggregate(scores[name], head.aggregation).tolist(), strict=True))
    return found


def best(probabilities: Mapping[str, float]) -> str:
    """The likeliest class."""
    return max(probabilities, key=lambda label: probabilities[label])
