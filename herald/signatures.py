"""The contract with TensorFlow Serving: model names, tensor names, dtypes, shapes and classes.

Volumes travel as int16 Hounsfield units without identity. Windowing and scaling live inside the exported models, so
that training and serving cannot drift apart. `None` in a shape is a dimension that the caller chooses. An exported
model also answers its card (`CARD`); one without it is taken for what this module says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

SIGNATURE_NAME = "serving_default"

PROTOCOL_IN_PLANE = 256
"""Rows and columns that the protocol model sees."""

DETECTION_IN_PLANE = 384
"""Rows and columns that the haemorrhage model sees; a stored prediction keeps those of its own day."""

PROTOCOL_SLICES = 8
"""Slices that the protocol model sees at a time."""

CONTEXT_SLICES = 5
"""Slices that one output slice of the haemorrhage model depends on: itself and two on either side."""

HEADS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "contrast": ("non_contrast", "contrast"),
        "orientation": ("axial", "coronal", "sagittal"),
        "kernel": ("soft", "bone"),
        "region": ("head", "other"),
    }
)
"""Heads that triage needs of the protocol model and the classes that it knows, in output order.

A model may have others (`herald.heads`); these are what the shipped one has.
"""

CARD = "card"
"""Output with what the model says of itself: the JSON of its model.json, as UTF-8 bytes."""

FINDINGS: tuple[str, ...] = ("any", "iph", "ivh", "sah", "edh_sdh")
"""Channels of the haemorrhage model: any, intraparenchymal, intraventricular, subarachnoid, epidural or subdural."""


@dataclass(frozen=True)
class TensorSpec:
    """Dtype (numpy name) and shape of one tensor; `None` is a free dimension."""

    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Signature:
    """Name, inputs and outputs of one served model."""

    model: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]


def protocol_signature(heads: Mapping[str, Sequence[str]]) -> Signature:
    """The signature of a protocol model with these heads and classes."""
    return Signature(
        model="protocol",
        inputs={"volume": TensorSpec("int16", (None, PROTOCOL_SLICES, PROTOCOL_IN_PLANE, PROTOCOL_IN_PLANE))},
        outputs={head: TensorSpec("float32", (None, len(classes))) for head, classes in heads.items()},
    )


PROTOCOL = protocol_signature(HEADS)

HEMORRHAGE = Signature(
    model="hemorrhage",
    inputs={"volume": TensorSpec("int16", (None, DETECTION_IN_PLANE, DETECTION_IN_PLANE))},
    outputs={
        "mask": TensorSpec("uint8", (None, DETECTION_IN_PLANE, DETECTION_IN_PLANE, len(FINDINGS))),
        "slice_probability": TensorSpec("float32", (None, len(FINDINGS))),
        "probability": TensorSpec("float32", (len(FINDINGS),)),
    },
)

SIGNATURES: Mapping[str, Signature] = MappingProxyType({s.model: s for s in (PROTOCOL, HEMORRHAGE)})
