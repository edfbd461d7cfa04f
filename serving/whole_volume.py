"""The haemorrhage detector over one whole volume, as 2D operations on slices: the same numbers, sooner.

`serving.hemorrhage` defines and trains the network on batches of crops, in five dimensions. Served, it sees one volume
at a time, so that slices can stand where a batch stands and nothing has to be folded, which is where runtimes spend
their time (they turn the layout of the data at every fold). Normalisation is folded into the convolutions, a
convolution over two slices is the sum of two, and the last transposed convolution is one of half the size whose
channels are spread over the pixels. `tests/test_serving_hemorrhage.py` holds both against each other.
"""

from collections.abc import Callable

import keras  # type: ignore[import-untyped]
import numpy as np
import tensorflow as tf  # type: ignore[import-untyped]
from numpy.typing import NDArray

from herald.signatures import CONTEXT_SLICES
from serving.hemorrhage import MODEL_WINDOWS

Forward = Callable[[tf.Tensor], dict[str, tf.Tensor]]

TOP = 6.0
"""What the upper end of a window becomes: relu6 is the clip that OpenVINO does within a convolution."""


def forward(model: keras.Model) -> Forward:
    """The model of `serving.hemorrhage.build` as a function of (D + 4, N, N) Hounsfield units, float32.

    It returns logits: `mask` (D, 128, 128, 4 * C), as `tf.nn.depth_to_space` takes them; `slice` and `pooled` (D, C).
    """
    levels = CONTEXT_SLICES - 1
    names = {layer.name for layer in model.layers}
    downs = []
    for level in range(1, CONTEXT_SLICES):
        blocks = [f"down{level}_block{block}" for block in range(len(names))]
        residual = [_Convolution(model, name) for name in blocks if f"{name}_conv" in names]
        downs.append((_Convolution(model, f"down{level}", TOP if level == 1 else 1.0), residual))
    ups = [
        (
            _transposed(model, f"up{level}"),
            _projection(model, f"up{level}"),
            _Convolution(model, f"up{level}_refine"),
            (levels - level) // 2,
        )
        for level in reversed(range(1, levels))
    ]
    mask_kernel, mask_bias = _spread(*(np.asarray(w) for w in model.get_layer("mask_transpose").get_weights()))
    dense, dense_bias = (np.asarray(w) for w in model.get_layer("slice_logits").get_weights())
    scale = np.array([TOP / w.width for w in MODEL_WINDOWS], np.float32)[None, None, None]
    offset = np.array([TOP * (0.5 - w.center / w.width) for w in MODEL_WINDOWS], np.float32)
    classes = dense.shape[1]
    top_mean = model.get_layer("pooled_logits")

    def run(volume: tf.Tensor) -> dict[str, tf.Tensor]:
        x = tf.nn.relu6(tf.nn.conv2d(volume[..., None], scale, 1, "VALID") + offset)  # (D + 4, H, W, 3)
        skips = [x]
        for down, blocks in downs:
            x = tf.nn.relu(down(x, stride=2))
            for block in blocks:
                x = x + tf.nn.relu(block(x))
            skips.append(x)
        summary = tf.concat([tf.reduce_mean(x, axis=(1, 2)), tf.reduce_max(x, axis=(1, 2))], axis=-1)
        slice_logits = tf.matmul(summary, dense) + dense_bias
        for level, (transposed, projection, refine, beyond) in zip(reversed(range(1, levels)), ups, strict=True):
            skip = skips[level]
            if beyond:
                skip = _slices(skip, beyond, tf.shape(skip)[0] - 2 * beyond)
            x = tf.nn.relu(tf.nn.depth_to_space(_convolve(x, transposed, 1), 2) + projection(skip))
            x = tf.nn.relu(refine(x))
        logits = _convolve(x, mask_kernel, 1) + mask_bias  # (D, 128, 128, 4 * C), pixels first
        pooled = tf.nn.avg_pool2d(logits, top_mean.pool // 2, top_mean.pool // 2, "VALID")
        pooled = tf.reduce_mean(tf.reshape(pooled, (-1, pooled.shape[1] * pooled.shape[2], 4, classes)), axis=2)
        flat = tf.transpose(pooled, (0, 2, 1))
        top = tf.reduce_mean(tf.math.top_k(flat, top_mean.top, sorted=False).values, axis=-1)
        return {"mask": logits, "slice": slice_logits, "pooled": top}

    return run


class _Convolution:
    """A convolution over one or two neighbouring slices with its normalisation folded in, of inputs `times` theirs."""

    def __init__(self, model: keras.Model, name: str, times: float = 1.0) -> None:
        kernel = np.asarray(model.get_layer(f"{name}_conv").get_weights()[0])
        factor, self.bias = _normalisation(model, f"{name}_norm")
        kernel = kernel * factor / np.float32(times)
        self.kernels = [kernel] if kernel.ndim == 4 else list(kernel)

    def __call__(self, x: tf.Tensor, stride: int = 1) -> tf.Tensor:
        return _over_slices(x, self.kernels, stride) + self.bias


def _over_slices(x: tf.Tensor, kernels: list[NDArray[np.float32]], stride: int) -> tf.Tensor:
    if len(kernels) == 1:
        return _convolve(x, kernels[0], stride)
    count = tf.shape(x)[0] - 1
    return _convolve(_slices(x, 0, count), kernels[0], stride) + _convolve(_slices(x, 1, count), kernels[1], stride)


def _slices(x: tf.Tensor, start: int, count: tf.Tensor) -> tf.Tensor:
    """x[start : start + count], by the op that OpenVINO moves its changes of layout past."""
    return tf.ensure_shape(tf.slice(x, (start, 0, 0, 0), (count, *x.shape[1:])), (None, *x.shape[1:]))


def _convolve(x: tf.Tensor, kernel: NDArray[np.float32], stride: int) -> tf.Tensor:
    return tf.nn.conv2d(x, tf.constant(kernel, tf.float32), strides=stride, padding="SAME")


def _normalisation(model: keras.Model, name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Factor and addend per channel of a batch normalisation at inference."""
    layer = model.get_layer(name)
    gamma, beta, mean, variance = (np.asarray(w, np.float64) for w in layer.get_weights())
    factor = gamma / np.sqrt(variance + layer.epsilon)
    return factor.astype(np.float32), (beta - mean * factor).astype(np.float32)


def _transposed(model: keras.Model, name: str) -> NDArray[np.float32]:
    """A 2x2 transposed convolution of stride 2 as a 1x1 one with four times the channels, normalisation folded in."""
    kernel = np.asarray(model.get_layer(f"{name}_transpose").get_weights()[0])  # (2, 2, out, in)
    factor, _ = _normalisation(model, f"{name}_norm")
    rows, columns, filters, channels = kernel.shape
    scaled = kernel * factor[:, None]
    spread: NDArray[np.float32] = scaled.transpose(3, 0, 1, 2).reshape(1, 1, channels, rows * columns * filters)
    return spread


def _projection(model: keras.Model, name: str) -> Callable[[tf.Tensor], tf.Tensor]:
    weights = model.get_layer(f"{name}_project").get_weights()
    factor, addend = _normalisation(model, f"{name}_norm")
    kernels = list(np.asarray(weights[0]) * factor)
    bias = addend + (np.asarray(weights[1]) * factor if len(weights) > 1 else 0.0)
    return lambda x: _over_slices(x, kernels, 1) + bias


def _spread(kernel: NDArray[np.float32], bias: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A 6x6 transposed convolution of stride 2 as a 3x3 one with four times the channels, pixel by pixel of each block.

    Output row 2r + p takes input row r + i through kernel row p + 2 - 2i, for i from -1 to 1.
    """
    _, _, filters, channels = kernel.shape
    spread = np.zeros((3, 3, channels, 2, 2, filters), np.float32)
    for p in range(2):
        for q in range(2):
            for i in range(-1, 2):
                for j in range(-1, 2):
                    spread[i + 1, j + 1, :, p, q] = kernel[p + 2 - 2 * i, q + 2 - 2 * j].T
    return spread.reshape(3, 3, channels, 4 * filters), np.tile(bias, 4)
