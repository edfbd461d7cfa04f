"""The haemorrhage detector over one whole volume, as 2D operations on slices: the same numbers, sooner.

`serving.hemorrhage` defines and trains the network on batches of crops, in five dimensions. Served, it sees one volume
at a time, so that slices can stand where a batch stands and nothing has to be folded, which is where runtimes spend
their time (they turn the layout of the data at every fold). Normalisation is folded into the convolutions, a
convolution over two slices is the sum of two, and the last transposed convolution is one of half the size whose
channels are spread over the pixels. `tests/test_serving_hemorrhage.py` holds both against each other.

Kernels and activations can be rounded to eight bits besides, which CPUs multiply several times as fast: each channel
of a kernel on a scale of its own, an activation between 0 and the highest value seen in heads it learned from (Jacob
et al., CVPR 2018). The rounding stands in the graph, so that every runtime gives the same numbers; OpenVINO makes
integer convolutions of it.
"""

from collections.abc import Callable, Iterable, Mapping

import keras  # type: ignore[import-untyped]
import numpy as np
import tensorflow as tf  # type: ignore[import-untyped]
from numpy.typing import NDArray

from herald.errors import ConfigError
from herald.signatures import CONTEXT_SLICES
from serving.hemorrhage import MODEL_WINDOWS

Forward = Callable[[tf.Tensor], dict[str, tf.Tensor]]

TOP = 6.0
"""What the upper end of a window becomes: relu6 is the clip that OpenVINO does within a convolution."""

INPUT = "windows"
"""The activation that enters the first learned convolution; its range is that of the windows, not of any data."""


class Exact:
    """Leaves kernels and activations as they are."""

    def convolve(self, x: tf.Tensor, kernel: NDArray[np.float32], stride: int = 1) -> tf.Tensor:
        """A 2D convolution of slices, padded to the same size."""
        return tf.nn.conv2d(x, self.kernel(kernel), strides=stride, padding="SAME")

    def kernel(self, kernel: NDArray[np.float32]) -> tf.Tensor:
        """What stands for a kernel (rows, columns, in, out)."""
        return tf.constant(kernel, tf.float32)

    def activation(self, x: tf.Tensor, name: str) -> tf.Tensor:
        """What stands for the activation `name`, which is nowhere negative."""
        return x


class Observed(Exact):
    """Keeps the highest value of each activation that passes, in `ranges`; for eager calls."""

    def __init__(self) -> None:
        self.ranges = {INPUT: TOP}

    def activation(self, x: tf.Tensor, name: str) -> tf.Tensor:
        """The activation itself, once its highest value is noted."""
        self.ranges[name] = max(self.ranges.get(name, 0.0), float(tf.reduce_max(x)))
        return x


STEPS = 64
"""Of a kernel on either side of 0, half of what eight bits hold. CPUs without VNNI add two products of activation and
kernel in sixteen bits, which 255 x 64 twice just fits; 255 x 127 does not, and is silently cut off (oneDNN, "Nuances of
int8 computations")."""


class EightBits(Exact):
    """Rounds kernels to STEPS a channel, and activations to 255 steps between 0 and their end of `ranges`."""

    def __init__(self, ranges: Mapping[str, float]) -> None:
        self._ranges = ranges

    def kernel(self, kernel: NDArray[np.float32]) -> tf.Tensor:
        """The kernel on the grid of each output channel, which is symmetric about 0."""
        end = tf.constant(np.maximum(np.abs(kernel).max(axis=(0, 1, 2)), 1e-8) * (127 / STEPS), tf.float32)
        fixed = tf.constant(kernel, tf.float32)
        return tf.quantization.fake_quant_with_min_max_vars_per_channel(fixed, -end, end, narrow_range=True)

    def activation(self, x: tf.Tensor, name: str) -> tf.Tensor:
        """The activation on its grid, cut off at the end of its range; raises ConfigError where it has none."""
        end = self._ranges.get(name, 0.0)
        if not end > 0:
            raise ConfigError(
                f"the ranges of activations are of another model: {name} has none; "
                "write them: python -m serving.train hemorrhage --score-shipped --evaluate"
            )
        return tf.quantization.fake_quant_with_min_max_args(x, 0.0, end)


def observed_ranges(model: keras.Model, volumes: Iterable[NDArray[np.int16]]) -> dict[str, float]:
    """The highest value of each activation over `volumes` (D, N, N) of Hounsfield units, by its name."""
    observed = Observed()
    run = forward(model, observed)
    for volume in volumes:
        run(padded(tf.constant(volume, tf.float32)))
    return observed.ranges


def padded(volume: tf.Tensor) -> tf.Tensor:
    """A volume (D, N, N) with its outermost slices repeated to lend context, (D + 4, N, N)."""
    return tf.concat([volume[:1], volume[:1], volume, volume[-1:], volume[-1:]], axis=0)


def forward(model: keras.Model, rounding: Exact | None = None) -> Forward:
    """The model of `serving.hemorrhage.build` as a function of (D + 4, N, N) Hounsfield units, float32.

    It returns logits: `mask` (D, 128, 128, 4 * C), as `tf.nn.depth_to_space` takes them; `slice` and `pooled` (D, C).
    """
    rounding = rounding or Exact()
    levels = CONTEXT_SLICES - 1
    names = {layer.name for layer in model.layers}
    downs = []
    for level in range(1, CONTEXT_SLICES):
        blocks = [f"down{level}_block{block}" for block in range(len(names))]
        residual = [_Convolution(model, rounding, name) for name in blocks if f"{name}_conv" in names]
        downs.append((_Convolution(model, rounding, f"down{level}", TOP if level == 1 else 1.0), residual))
    ups = [
        (
            _transposed(model, f"up{level}"),
            _projection(model, rounding, f"up{level}"),
            _Convolution(model, rounding, f"up{level}_refine"),
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
        x = rounding.activation(x, INPUT)
        skips = [x]
        for down, blocks in downs:
            x = rounding.activation(tf.nn.relu(down(x, stride=2)), down.name)
            for block in blocks:
                x = rounding.activation(x + tf.nn.relu(block(x)), block.name)
            skips.append(x)
        summary = tf.concat([tf.reduce_mean(x, axis=(1, 2)), tf.reduce_max(x, axis=(1, 2))], axis=-1)
        slice_logits = tf.matmul(summary, dense) + dense_bias
        for level, (transposed, projection, refine, beyond) in zip(reversed(range(1, levels)), ups, strict=True):
            skip = skips[level]
            if beyond:
                skip = _slices(skip, beyond, tf.shape(skip)[0] - 2 * beyond)
            x = tf.nn.relu(tf.nn.depth_to_space(rounding.convolve(x, transposed), 2) + projection(skip))
            x = rounding.activation(x, f"up{level}")
            x = rounding.activation(tf.nn.relu(refine(x)), refine.name)
        logits = rounding.convolve(x, mask_kernel) + mask_bias  # (D, 128, 128, 4 * C), pixels first
        pooled = tf.nn.avg_pool2d(logits, top_mean.pool // 2, top_mean.pool // 2, "VALID")
        pooled = tf.reduce_mean(tf.reshape(pooled, (-1, pooled.shape[1] * pooled.shape[2], 4, classes)), axis=2)
        flat = tf.transpose(pooled, (0, 2, 1))
        top = tf.reduce_mean(tf.math.top_k(flat, top_mean.top, sorted=False).values, axis=-1)
        return {"mask": logits, "slice": slice_logits, "pooled": top}

    return run


class _Convolution:
    """A convolution over one or two neighbouring slices with its normalisation folded in, of inputs `times` theirs."""

    def __init__(self, model: keras.Model, rounding: Exact, name: str, times: float = 1.0) -> None:
        self.name = name
        self._rounding = rounding
        kernel = np.asarray(model.get_layer(f"{name}_conv").get_weights()[0])
        factor, self.bias = _normalisation(model, f"{name}_norm")
        kernel = kernel * factor / np.float32(times)
        self.kernels = [kernel] if kernel.ndim == 4 else list(kernel)

    def __call__(self, x: tf.Tensor, stride: int = 1) -> tf.Tensor:
        return _over_slices(self._rounding, x, self.kernels, stride) + self.bias


def _over_slices(rounding: Exact, x: tf.Tensor, kernels: list[NDArray[np.float32]], stride: int = 1) -> tf.Tensor:
    if len(kernels) == 1:
        return rounding.convolve(x, kernels[0], stride)
    count = tf.shape(x)[0] - 1
    parts = [rounding.convolve(_slices(x, z, count), kernel, stride) for z, kernel in enumerate(kernels)]
    return parts[0] + parts[1]


def _slices(x: tf.Tensor, start: int, count: tf.Tensor) -> tf.Tensor:
    """x[start : start + count], by the op that OpenVINO moves its changes of layout past."""
    return tf.ensure_shape(tf.slice(x, (start, 0, 0, 0), (count, *x.shape[1:])), (None, *x.shape[1:]))


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


def _projection(model: keras.Model, rounding: Exact, name: str) -> Callable[[tf.Tensor], tf.Tensor]:
    weights = model.get_layer(f"{name}_project").get_weights()
    factor, addend = _normalisation(model, f"{name}_norm")
    kernels = list(np.asarray(weights[0]) * factor)
    bias = addend + (np.asarray(weights[1]) * factor if len(weights) > 1 else 0.0)
    return lambda x: _over_slices(rounding, x, kernels) + bias


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
