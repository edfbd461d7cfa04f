"""The haemorrhage detector: a hybrid of a 3D contracting and a 2D expanding arm, after P. D. Chang's design.

The contracting arm is built of 1x3x3 convolutions and four 2x3x3 ones, which halve rows and columns and are valid in z
with stride 1. Four of them shrink z by four slices, so every output slice depends on itself and two on either side, and
one pass over a whole volume gives per slice exactly what a window of five slices gives. The skips are projected by
convolutions as deep as what is left of those five slices, and added to the expanding arm, which works slice by slice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import keras  # type: ignore[import-untyped]
from keras import layers, ops

from herald.errors import SignatureMismatch
from herald.signatures import CONTEXT_SLICES, DETECTION_IN_PLANE, FINDINGS
from herald.volume import BRAIN, SUBDURAL, Window

WEIGHTS = Path(__file__).parent / "weights" / "hemorrhage.weights.h5"

WIDE = Window(center=50, width=400)
"""Tells bone, soft tissue, fat and air apart; saturates in bone, whose inside says nothing about bleeding."""

MODEL_WINDOWS = (BRAIN, SUBDURAL, WIDE)
"""The channels the network sees; applied inside it, so that training and serving cannot drift apart."""


NORM_MOMENTUM = 0.95
"""Running statistics must settle within some hundred steps, which is all that a CPU affords."""


VOXEL_PRIOR_LOGIT = -4.0
"""Blood is rare: to start from one half would waste the first hundred steps on learning that."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the network; widths are channels at 1/1 (the windows), 1/2, 1/4, 1/8 and 1/16 of rows and columns."""

    widths: tuple[int, ...] = (len(MODEL_WINDOWS), 16, 48, 96, 160)
    blocks: tuple[int, ...] = (0, 1, 1, 2, 2)  # residual 1x3x3 blocks in the contracting arm, per level
    dropout: float = 0.2  # before the slice head, which overfits first
    pool: int = DETECTION_IN_PLANE // 64  # voxel logits are averaged over pool x pool pixels before ...
    top: int = 8  # ... the mean of so many highest stands for the slice: about 80 mm2 of an adult head


SIZES = Sizes()


class Windows(layers.Layer):  # type: ignore[misc]
    """Hounsfield units (..., 1) to one channel in 0..1 for each of MODEL_WINDOWS."""

    def call(self, hounsfield: keras.KerasTensor) -> keras.KerasTensor:
        """Clip and scale: (B, D, H, W, 1) -> (B, D, H, W, 3)."""
        hounsfield = ops.cast(hounsfield, "float32")
        channels = [ops.clip((hounsfield - (w.center - w.width / 2)) / w.width, 0.0, 1.0) for w in MODEL_WINDOWS]
        return ops.cast(ops.concatenate(channels, axis=-1), self.compute_dtype)


class SliceConvolution(layers.Conv3D):  # type: ignore[misc]
    """A 3D convolution, valid and of stride 1 in z, worked out as a 2D one over all slices at once.

    A kernel of depth k is laid over k neighbouring slices side by side in the channels: the same sums, and on CPUs
    several times faster, since 2D kernels are the ones that the libraries have tuned.
    """

    def call(self, x: keras.KerasTensor) -> keras.KerasTensor:
        """(B, D, H, W, C) -> (B, D - k + 1, H / stride, W / stride, filters); "same" in rows and columns."""
        depth, rows, columns, channels, filters = self.kernel.shape
        count = ops.shape(x)[1] - depth + 1
        if depth > 1:
            x = ops.concatenate([_slices(x, i, count) for i in range(depth)], axis=-1)  # (B, D - k + 1, H, W, k * C)
        kernel = ops.transpose(ops.convert_to_tensor(self.kernel), (1, 2, 0, 3, 4))
        kernel = ops.reshape(kernel, (rows, columns, depth * channels, filters))
        flat = ops.reshape(x, (-1, *x.shape[2:]))
        flat = ops.conv(flat, kernel, strides=self.strides[1:], padding="same")
        flat = ops.reshape(flat, (-1, count, *flat.shape[1:]))
        return self.activation(flat if self.bias is None else flat + self.bias)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Valid in z, "same" in rows and columns."""
        batch, slices, rows, columns, _ = input_shape
        stride = self.strides[1]
        return (
            batch,
            None if slices is None else slices - self.kernel_size[0] + 1,
            rows // stride,
            columns // stride,
            self.filters,
        )


class CropSlices(layers.Layer):  # type: ignore[misc]
    """Leave out `beyond` slices on either side."""

    def __init__(self, beyond: int, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.beyond = beyond

    def call(self, x: keras.KerasTensor) -> keras.KerasTensor:
        """(B, D, H, W, C) -> (B, D - 2 * beyond, H, W, C)."""
        return _slices(x, self.beyond, ops.shape(x)[1] - 2 * self.beyond)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Fewer slices, all else the same."""
        batch, slices, *rest = input_shape
        return (batch, None if slices is None else slices - 2 * self.beyond, *rest)


class FoldSlices(layers.Layer):  # type: ignore[misc]
    """Make every slice an image of its own."""

    def call(self, x: keras.KerasTensor) -> keras.KerasTensor:
        """(B, D, H, W, C) -> (B * D, H, W, C)."""
        return ops.reshape(x, (-1, *x.shape[2:]))

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Slices become the batch."""
        batch, slices, *rest = input_shape
        return (None if None in (batch, slices) else batch * slices, *rest)


class UnfoldSlices(layers.Layer):  # type: ignore[misc]
    """Undo FoldSlices: the second input lends its number of slices."""

    def call(self, inputs: tuple[keras.KerasTensor, keras.KerasTensor]) -> keras.KerasTensor:
        """(B * D, ...), (B, D, ...) -> (B, D, ...)."""
        x, like = inputs
        return ops.reshape(x, (-1, ops.shape(like)[1], *x.shape[1:]))

    def compute_output_shape(self, input_shape: Sequence[tuple[int | None, ...]]) -> tuple[int | None, ...]:
        """Batch and slices of the second, all else of the first."""
        x, like = input_shape
        return (*like[:2], *x[1:])


class TopMean(layers.Layer):  # type: ignore[misc]
    """Mean of the `top` highest logits of each slice, each averaged over `pool` x `pool` pixels before."""

    def __init__(self, pool: int, top: int, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.pool, self.top = pool, top

    def call(self, logits: keras.KerasTensor) -> keras.KerasTensor:
        """(N, H, W, C) -> (N, C)."""
        pooled = ops.average_pool(logits, self.pool, strides=self.pool)  # (N, H/pool, W/pool, C)
        flat = ops.reshape(pooled, (-1, pooled.shape[1] * pooled.shape[2], pooled.shape[3]))
        values, _ = ops.top_k(ops.transpose(flat, (0, 2, 1)), self.top)  # (N, C, top)
        return ops.mean(values, axis=-1)


class BatchNormalization(layers.BatchNormalization):  # type: ignore[misc]
    """As Keras', but learned by TensorFlow's fused kernel: Keras' own is slow on a CPU.

    Keras files weights by the name of their class, so that this one must keep it.
    """

    def call(self, x: keras.KerasTensor, training: bool | None = None) -> keras.KerasTensor:
        """Normalise the last axis of (..., H, W, C); as Keras does on other backends and when not learning."""
        if not training or keras.backend.backend() != "tensorflow":
            return super().call(x, training=training)
        import tensorflow as tf  # type: ignore[import-untyped]

        flat, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            ops.reshape(x, (-1, *x.shape[-3:])),
            tf.cast(self.gamma, tf.float32),
            tf.cast(self.beta, tf.float32),
            epsilon=self.epsilon,
            is_training=True,
        )
        for running, seen in ((self.moving_mean, mean), (self.moving_variance, variance)):
            running.assign(running * self.momentum + seen * (1 - self.momentum))
        return ops.reshape(flat, ops.shape(x))


def build(sizes: Sizes = SIZES, slices: int | None = None, classes: int = len(FINDINGS)) -> keras.Model:
    """The detector on (B, D + 4, N, N) Hounsfield units, N of DETECTION_IN_PLANE; four slices only are neighbours.

    Returns a model with outputs `mask` (B, D, N, N, C) voxel logits, `slice` (B, D, C) logits of the slice head and
    `pooled` (B, D, C), the pooled voxel logits; all uncalibrated.
    """
    plane = (DETECTION_IN_PLANE, DETECTION_IN_PLANE)
    volume = keras.Input((slices, *plane), name="volume")  # int16 or float, (B, D + 4, H, W)
    x = layers.Reshape((-1, *plane, 1), name="channel")(volume)
    x = Windows(name="windows")(x)  # (B, D + 4, H, W, 3)
    levels = [x]  # nothing is learned at full size: there it would cost as much as at all other sizes together
    for level in range(1, CONTEXT_SLICES):
        x = _convolution3d(x, sizes.widths[level], f"down{level}", kernel=(2, 3, 3), stride=2)
        for block in range(sizes.blocks[level]):
            x = _residual3d(x, f"down{level}_block{block}")
        levels.append(x)  # (B, D + 4 - level, H / 2^level, W / 2^level, widths[level])

    deepest = x
    x = FoldSlices(name="fold")(deepest)  # (B * D, H / 16, W / 16, widths[-1])
    summary = layers.Concatenate(name="slice_summary")(
        [layers.GlobalAveragePooling2D(name="slice_mean")(x), layers.GlobalMaxPooling2D(name="slice_max")(x)]
    )
    summary = layers.Dropout(sizes.dropout, name="slice_dropout")(summary)
    slice_logits = layers.Dense(classes, dtype="float32", name="slice_logits")(summary)

    for level in reversed(range(1, CONTEXT_SLICES - 1)):
        width = sizes.widths[level]
        x = layers.Conv2DTranspose(width, 2, strides=2, use_bias=False, name=f"up{level}_transpose")(x)
        beyond = (CONTEXT_SLICES - 1 - level) // 2  # slices to leave out on either side: (B, D or D + 1, ...)
        skip = CropSlices(beyond, name=f"up{level}_crop")(levels[level])
        skip = SliceConvolution(width, (1 + level % 2, 1, 1), name=f"up{level}_project")(skip)
        x = layers.Add(name=f"up{level}_add")([x, FoldSlices(name=f"up{level}_fold")(skip)])
        x = BatchNormalization(momentum=NORM_MOMENTUM, name=f"up{level}_norm")(x)
        x = layers.ReLU(name=f"up{level}_relu")(x)
        x = _convolution2d(x, width, f"up{level}_refine")
    rare = keras.initializers.Constant(VOXEL_PRIOR_LOGIT)
    logits = layers.Conv2DTranspose(
        classes, 6, strides=2, padding="same", bias_initializer=rare, name="mask_transpose"
    )(x)  # each pixel from nine of half the size: smooth outlines, and as served no more work than a kernel of 4
    logits = layers.Activation("linear", dtype="float32", name="mask_logits")(logits)  # (B * D, H, W, C)
    pooled = TopMean(sizes.pool, sizes.top, dtype="float32", name="pooled_logits")(logits)
    outputs = {
        "mask": UnfoldSlices(dtype="float32", name="mask")([logits, deepest]),
        "slice": UnfoldSlices(dtype="float32", name="slice")([slice_logits, deepest]),
        "pooled": UnfoldSlices(dtype="float32", name="pooled")([pooled, deepest]),
    }
    return keras.Model(volume, outputs, name="hemorrhage")


def load(weights: Path = WEIGHTS) -> keras.Model:
    """The model of `build` with trained weights; raises SignatureMismatch where they are missing or do not fit."""
    model = build()
    try:
        model.load_weights(weights)
    except (OSError, ValueError) as error:
        raise SignatureMismatch(
            f"weights {weights.name} do not fit the haemorrhage model ({error}); "
            "train them: python -m serving.train hemorrhage --all"
        ) from error
    return model


def _slices(x: keras.KerasTensor, start: int, count: int) -> keras.KerasTensor:
    """x[:, start : start + count], by the op whose gradient TensorFlow computes thirty times faster."""
    return ops.slice(x, (0, start, 0, 0, 0), (ops.shape(x)[0], count, *x.shape[2:]))


def _convolution3d(
    x: keras.KerasTensor,
    width: int,
    name: str,
    kernel: tuple[int, int, int] = (1, 3, 3),
    stride: int = 1,
) -> keras.KerasTensor:
    """Convolution, normalisation, ReLU; the stride is in rows and columns only."""
    strides = (1, stride, stride)
    x = SliceConvolution(width, kernel, strides=strides, use_bias=False, name=f"{name}_conv")(x)
    return layers.ReLU(name=f"{name}_relu")(BatchNormalization(momentum=NORM_MOMENTUM, name=f"{name}_norm")(x))


def _residual3d(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    """x + ReLU(norm(1x3x3 convolution of x))."""
    return layers.Add(name=f"{name}_add")([x, _convolution3d(x, x.shape[-1], name)])


def _convolution2d(x: keras.KerasTensor, width: int, name: str) -> keras.KerasTensor:
    x = layers.Conv2D(width, 3, padding="same", use_bias=False, name=f"{name}_conv")(x)
    return layers.ReLU(name=f"{name}_relu")(BatchNormalization(momentum=NORM_MOMENTUM, name=f"{name}_norm")(x))
