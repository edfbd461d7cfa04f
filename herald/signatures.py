"""The contract with TensorFlow Serving: model names, tensor names, dtypes, shapes and classes.

Volumes travel as int16 Hounsfield units without identity. Windowing and scaling live inside the exported models, so
that training and serving cannot drift apart. `None` in a shape is a dimension that the caller chooses.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

SIGNATURE_NAME = "serving_default"

IN_PLANE = 256
"""Rows and columns of every model input."""

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
"""Heads of the protocol model and the label of each class, in output order."""

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


PROTOCOL = Signature(
    model="protocol",
    inputs={"volume": TensorSpec("int16", (None, PROTOCOL_SLICES, IN_PLANE, IN_PLANE))},
    outputs={head: TensorSpec("float32", (None, len(labels))) for head, labels in HEADS.items()},
)

HEMORRHAGE = Signature(
    model="hemorrhage",
    inputs={"volume": TensorSpec("int16", (None, IN_PLANE, IN_PLANE))},
    outputs={
        "mask": TensorSpec("uint8", (None, IN_PLANE, IN_PLANE, len(FINDINGS))),
        "slice_probability": TensorSpec("float32", (None, len(FINDINGS))),
        "probability": TensorSpec("float32", (len(FINDINGS),)),
    },
)

SIGNATURES: Mapping[str, Signature] = MappingProxyType({s.model: s for s in (PROTOCOL, HEMORRHAGE)})
