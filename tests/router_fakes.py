"""What comes to the router and what it asks, for tests that need neither a receiver nor a model server."""

from typing import Any

import numpy as np

from herald.events import SeriesReceived, utc_now
from herald.signatures import FINDINGS, HEADS
from router.inference import HemorrhagePrediction, ProtocolProbabilities


def received(**changes: Any) -> SeriesReceived:
    """A series of one image that the receiver has closed, with these fields changed."""
    now = utc_now()
    fields = {
        "study_instance_uid": "1.2.3",
        "series_instance_uid": "1.2.3.4",
        "revision": 1,
        "accession_number": "",
        "modality": "CT",
        "scanner": "",
        "calling_ae_title": "CT1",
        "instance_count": 1,
        "close_reason": "quiet",
        "first_image_at": now,
        "last_image_at": now,
    }
    return SeriesReceived(**{**fields, **changes})


class FixedModels:
    """Stands for the model server: every series is a non-contrast axial head of soft kernel, bleeding or not."""

    def __init__(self, *, bleeds: bool) -> None:
        self.bleeds = bleeds

    def classify_protocol(self, _volumes: Any) -> ProtocolProbabilities:
        sure = {
            head: {name: 0.96 if name == classes[0] else 0.02 for name in classes} for head, classes in HEADS.items()
        }
        return ProtocolProbabilities(sure, "1")

    def detect_hemorrhage(self, volume: Any) -> HemorrhagePrediction:
        mask = np.zeros((*volume.shape, len(FINDINGS)), np.uint8)
        chance = np.full((len(volume), len(FINDINGS)), 0.1, np.float32)
        if self.bleeds:
            mask[len(volume) // 2, 100:140, 120:160, :2] = 250
            chance[len(volume) // 2, :2] = 0.97
        return HemorrhagePrediction(mask, chance, chance.max(axis=0), "1")
