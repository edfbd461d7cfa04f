"""The protocol model: what a series is, from eight of its slices. A 3D residual network after the design's source.

Six stages; each halves the plane and shortens z by one through a 2x3x3 convolution (stride 2 in XY, valid in Z), then
adds a residual block of two 1x3x3 convolutions. The means of every stage feed the heads but one: the kernel is told
from the texture of the noise. A bone kernel makes neighbours differ as much as next neighbours, a soft one less, at
any dose.
"""

from dataclasses import dataclass
from pathlib import Path

import keras  # type: ignore[import-untyped]
from keras import KerasTensor, layers

from herald.errors import SignatureMismatch
from herald.signatures import HEADS, IN_PLANE, PROTOCOL_SLICES

NORM_MOMENTUM = 0.9  # training takes a few hundred steps, which the usual 0.99 would lag behind
WEIGHTS = Path(__file__).parent / "weights" / "protocol.weights.h5"


@dataclass(frozen=True)
class ProtocolSizes:
    """Sizes of the network; the defaults are those of the committed weights."""

    channels: tuple[int, ...] = (8, 16, 32, 48, 64, 96)
    windows: tuple[tuple[float, float], ...] = ((40.0, 160.0), (200.0, 800.0), (500.0, 3000.0))  # (centre, width) in HU
    dropout: float = 0.2
    kernel_units: int = 16


class Windows(layers.Layer):  # type: ignore[misc]
    """Hounsfield units to one channel a window, linear in -1..1 and clipped: (..., 1) -> (..., windows)."""

    def __init__(self, windows: tuple[tuple[float, float], ...], **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.windows = tuple((float(centre), float(width)) for centre, width in windows)

    def call(self, volume: KerasTensor) -> KerasTensor:
        """Apply every window."""
        hounsfield = keras.ops.cast(volume, self.compute_dtype)
        planes = [keras.ops.clip((hounsfield - c) * (2.0 / w), -1.0, 1.0) for c, w in self.windows]
        return keras.ops.concatenate(planes, axis=-1)

    def get_config(self) -> dict[str, object]:
        """Arguments of the constructor."""
        return {**super().get_config(), "windows": self.windows}


class Texture(layers.Layer):  # type: ignore[misc]
    """Noise texture of the soft parts: (B, 8, 256, 256) -> (B, 3).

    Mean absolute difference of neighbouring pixels along a row, and its ratios to that of next neighbours and to the
    second difference, as logarithms. Noise power at high frequencies is what a reconstruction kernel changes.
    """

    SOFT = (-150.0, 400.0)  # Hounsfield units between air and bone, whose edges would outweigh the noise
    LARGEST = 80.0

    def call(self, volume: KerasTensor) -> KerasTensor:
        """Measure the three."""
        ops = keras.ops
        hounsfield = ops.cast(volume, "float32")
        soft = ops.cast((hounsfield > self.SOFT[0]) & (hounsfield < self.SOFT[1]), "float32")
        left, middle, right = hounsfield[..., :-2], hounsfield[..., 1:-1], hounsfield[..., 2:]
        inside = soft[..., :-2] * soft[..., 1:-1] * soft[..., 2:]
        count = ops.sum(inside, axis=(1, 2, 3)) + 1.0

        def mean(difference: KerasTensor) -> KerasTensor:
            clipped = ops.minimum(ops.abs(difference), self.LARGEST)
            return ops.sum(clipped * inside, axis=(1, 2, 3)) / count + 0.5

        near, next_, second = mean(middle - left), mean(right - left), mean(right - 2.0 * middle + left)
        return ops.stack([ops.log(near), ops.log(next_ / near), ops.log(second / near)], axis=-1)


def build(sizes: ProtocolSizes = ProtocolSizes()) -> keras.Model:
    """The untrained model: `volume` int16 (B, 8, 256, 256) Hounsfield units -> dict of softmaxes by head."""
    volume = keras.Input((PROTOCOL_SLICES, IN_PLANE, IN_PLANE), dtype="int16", name="volume")
    x = layers.Reshape((PROTOCOL_SLICES, IN_PLANE, IN_PLANE, 1), name="channel")(volume)  # (B, 8, 256, 256, 1)
    x = Windows(sizes.windows, dtype="float32", name="windows")(x)  # (B, 8, 256, 256, 3)
    means = []
    for stage, channels in enumerate(sizes.channels, start=1):
        x = _down(x, channels, f"stage{stage}_down")  # (B, 8 - stage, 256 / 2**stage, 256 / 2**stage, channels)
        x = _residual(x, channels, f"stage{stage}")
        means.append(layers.GlobalAveragePooling3D(name=f"stage{stage}_mean")(x))
    means.append(layers.GlobalMaxPooling3D(name="coarsest_max")(x))
    texture = Texture(dtype="float32", name="texture")(volume)
    means.append(texture)
    features = layers.Concatenate(name="features")(means)  # (B, sum of channels + 96 + 3)
    features = layers.BatchNormalization(momentum=NORM_MOMENTUM, name="features_norm")(features)
    features = layers.Dropout(sizes.dropout, name="features_dropout")(features)
    # the kernel is judged by its noise alone: what is depicted must not decide it
    noise = layers.BatchNormalization(momentum=NORM_MOMENTUM, name="noise_norm")(texture)
    noise = layers.Dense(sizes.kernel_units, activation="relu", dtype="float32", name="kernel_hidden")(noise)
    outputs = {
        head: layers.Dense(len(labels), activation="softmax", dtype="float32", name=head)(
            noise if head == "kernel" else features
        )
        for head, labels in HEADS.items()
    }
    return keras.Model(volume, outputs, name="protocol")


def _down(x: KerasTensor, channels: int, name: str) -> KerasTensor:
    """2x3x3 convolution: stride 2 in XY with padding, valid in Z, so that z shortens by one."""
    x = layers.ZeroPadding3D((0, 1, 1), name=f"{name}_pad")(x)
    x = layers.Conv3D(channels, (2, 3, 3), strides=(1, 2, 2), use_bias=False, name=f"{name}_conv")(x)
    x = layers.BatchNormalization(momentum=NORM_MOMENTUM, name=f"{name}_norm")(x)
    return layers.ReLU(name=f"{name}_relu")(x)


def _residual(x: KerasTensor, channels: int, name: str) -> KerasTensor:
    """Two 1x3x3 convolutions around which the input is carried unchanged."""
    y = layers.Conv3D(channels, (1, 3, 3), padding="same", use_bias=False, name=f"{name}_conv1")(x)
    y = layers.BatchNormalization(momentum=NORM_MOMENTUM, name=f"{name}_norm1")(y)
    y = layers.ReLU(name=f"{name}_relu1")(y)
    y = layers.Conv3D(channels, (1, 3, 3), padding="same", use_bias=False, name=f"{name}_conv2")(y)
    y = layers.BatchNormalization(momentum=NORM_MOMENTUM, name=f"{name}_norm2")(y)
    return layers.ReLU(name=f"{name}_relu2")(layers.Add(name=f"{name}_add")([x, y]))


def load(weights: Path = WEIGHTS) -> keras.Model:
    """The model with trained weights; its call on int16 (B, 8, 256, 256) gives a dict head -> softmax.

    Raises SignatureMismatch when the weights are missing or are those of another architecture.
    """
    model = build()
    try:
        model.load_weights(weights)
    except (OSError, ValueError) as error:
        raise SignatureMismatch(
            f"{weights.name} does not fit the protocol model ({error}); run python -m serving.train protocol"
        ) from error
    return model
