"""TensorProto to NumPy and back without TensorFlow: the wire format of tensorflow/core/framework/tensor.proto.

The messages are taken and filled by their field names, so that this module imports no generated code.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_TENSOR_BYTES = 2**31
"""No protobuf message can hold more, so a larger tensor is a broken or hostile request."""

Array = NDArray[Any]


@dataclass(frozen=True)
class DataType:
    """One entry of types.proto: its number, TensorFlow's word for it, the NumPy dtype and the typed field."""

    number: int
    word: str
    dtype: np.dtype[Any]
    field: str


DATA_TYPES = tuple(
    DataType(number, word, np.dtype(dtype), field)
    for number, word, dtype, field in (
        (1, "float", "float32", "float_val"),
        (2, "double", "float64", "double_val"),
        (3, "int32", "int32", "int_val"),
        (4, "uint8", "uint8", "int_val"),
        (5, "int16", "int16", "int_val"),
        (6, "int8", "int8", "int_val"),
        (7, "string", "object", "string_val"),
        (9, "int64", "int64", "int64_val"),
        (10, "bool", "bool", "bool_val"),
        (17, "uint16", "uint16", "int_val"),
        (19, "half", "float16", "half_val"),
        (22, "uint32", "uint32", "uint32_val"),
        (23, "uint64", "uint64", "uint64_val"),
    )
)
BY_NUMBER = {t.number: t for t in DATA_TYPES}
BY_DTYPE = {t.dtype: t for t in DATA_TYPES}


def data_type_word(number: int) -> str:
    """TensorFlow's word for a data type, as in its error messages."""
    return BY_NUMBER[number].word if number in BY_NUMBER else f"data type {number}"


def read_shape(shape: Any) -> tuple[int | None, ...] | None:
    """A TensorShapeProto as a tuple, free dimensions as `None`; `None` for an unknown rank."""
    if shape.unknown_rank:
        return None
    return tuple(None if dim.size < 0 else int(dim.size) for dim in shape.dim)


def read_tensor(proto: Any) -> Array:
    """The array that a TensorProto stands for; read-only where it shares the message's bytes.

    Reads `tensor_content` as well as the typed fields, where the last value repeats up to the shape. Raises ValueError
    for an unknown data type, an incomplete shape or content of another size.
    """
    data_type = BY_NUMBER.get(proto.dtype)
    if data_type is None:
        raise ValueError(f"data type {proto.dtype} is not supported")
    shape = read_shape(proto.tensor_shape)
    if shape is None or None in shape:
        raise ValueError("the shape is not fully known")
    sizes = tuple(size for size in shape if size is not None)
    count = math.prod(sizes)
    if count * data_type.dtype.itemsize > MAX_TENSOR_BYTES:
        raise ValueError(f"shape {sizes} is larger than a message can hold")
    if data_type.word == "string":
        values = np.array(list(proto.string_val) or [b""], dtype=object)
        return _repeated(values, count).reshape(sizes)
    content: bytes = proto.tensor_content  # one access: each copies
    if content:
        if len(content) != count * data_type.dtype.itemsize:
            raise ValueError(f"{len(content)} bytes of content for shape {sizes} of {data_type.word}")
        return np.frombuffer(content, dtype=data_type.dtype).reshape(sizes)
    field = getattr(proto, data_type.field)
    wide = {"int_val": np.int32, "half_val": np.int32}.get(data_type.field, data_type.dtype)
    values = np.fromiter(field, dtype=wide, count=min(len(field), count)) if field else np.zeros(1, dtype=wide)
    if data_type.field == "half_val":
        values = values.astype(np.uint16).view(np.float16)
    return _repeated(values.astype(data_type.dtype, copy=False), count).reshape(sizes)


def _repeated(values: Array, count: int) -> Array:
    """The first `count` values, the last one repeated where there are fewer (Tensor::FromProto)."""
    if len(values) >= count:
        return values[:count]
    return np.concatenate([values, np.broadcast_to(values[-1:], (count - len(values),))])


def write_tensor(proto: Any, array: Array) -> None:
    """Fill an empty TensorProto with `array` by `tensor_content`; raises TypeError for a dtype that has no number."""
    data_type = BY_DTYPE.get(array.dtype if array.dtype.kind not in "SU" else np.dtype(object))
    if data_type is None:
        raise TypeError(f"{array.dtype} has no TensorFlow data type here")
    proto.dtype = data_type.number
    for size in array.shape:
        proto.tensor_shape.dim.add().size = size
    if data_type.word == "string":
        proto.string_val.extend(v if isinstance(v, bytes) else str(v).encode() for v in array.ravel().tolist())
    else:
        proto.tensor_content = array.tobytes()
