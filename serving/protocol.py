"""The protocol model: what a series is, from eight of its slices. A 3D residual network after the design's source.

Six stages; each halves the plane and shortens z by one through a 2x3x3 convolution (stride 2 in XY, valid in Z), then
adds a residual block of two 1x3x3 convolutions. Which heads there are is data (`herald.heads`): most read the means of
every stage, and the kernel is told from the texture of the noise. A bone kernel makes neighbours differ as much as next
neighbours, a soft one less, at any dose.

Beside weights NAME.weights.h5 lies NAME.json: heads, sizes of the network and calibration.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras  # type: ignore[import-untyped]
import msgspec
from keras import KerasTensor, layers

from herald.errors import ConfigError, SignatureMismatch
from herald.heads import Head, Heads, parse_heads, read_heads
from herald.signatures import PROTOCOL_IN_PLANE, PROTOCOL_SLICES

NORM_MOMENTUM = 0.9  # training takes a few hundred steps, which the usual 0.99 would lag behind
HERE = Path(__file__).parent
WEIGHTS = HERE / "weights" / "protocol.weights.h5"
DEFAULT_HEADS = HERE / "heads" / "default.toml"
NOT_FITTED = "not fitted"


class ProtocolSizes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of the network; the defaults are those of the committed weights."""

    channels: tuple[int, ...] = (8, 16, 32, 48, 64, 96)
    windows: tuple[tuple[float, float], ...] = ((40.0, 160.0), (200.0, 800.0), (500.0, 3000.0))  # (centre, width) in HU
    dropout: float = 0.2
    texture_units: int = 16


SIZES = ProtocolSizes()


class Calibration(msgspec.Struct, frozen=True):
    """Temperature of each head, by which logits are divided, and how it was obtained; no entry is 1."""

    temperature: dict[str, float] = {}
    obtained: str = NOT_FITTED
    measured: dict[str, Any] = {}
    """By head, log loss and expected calibration error before and after, and whether the temperature was kept."""


class Description(msgspec.Struct, frozen=True):
    """What weights alone do not tell of a model."""

    heads: dict[str, Head]
    sizes: ProtocolSizes = SIZES
    calibration: Calibration = Calibration()


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


def build(heads: Heads | None = None, sizes: ProtocolSizes = SIZES) -> keras.Model:
    """The untrained model: `volume` int16 (B, 8, 256, 256) Hounsfield units -> dict of softmaxes by head.

    Without `heads`, those of serving/heads/default.toml.
    """
    heads = read_heads(DEFAULT_HEADS) if heads is None else heads
    shape = (PROTOCOL_SLICES, PROTOCOL_IN_PLANE, PROTOCOL_IN_PLANE)
    volume = keras.Input(shape, dtype="int16", name="volume")
    x = layers.Reshape((*shape, 1), name="channel")(volume)  # (B, 8, 256, 256, 1)
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
    noise = layers.BatchNormalization(momentum=NORM_MOMENTUM, name="noise_norm")(texture)
    outputs = {}
    for name, head in heads.items():
        read = features
        if head.reads == "texture":
            hidden = layers.Dense(sizes.texture_units, activation="relu", dtype="float32", name=f"{name}_hidden")
            read = hidden(noise)
        answer = layers.Dense(len(head.classes), activation="softmax", dtype="float32", name=f"{name}_head")
        outputs[name] = answer(read)
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


def description_path(weights: Path) -> Path:
    """Where the description of NAME.weights.h5 lies: NAME.json beside it."""
    return weights.with_name(f"{weights.name.removesuffix('.h5').removesuffix('.weights')}.json")


def describe(weights: Path = WEIGHTS) -> Description:
    """The description beside `weights`; without one, the default heads and sizes, not calibrated.

    Raises ConfigError where it cannot be read.
    """
    path = description_path(weights)
    if not path.exists():
        return Description(read_heads(DEFAULT_HEADS))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        heads = parse_heads(content["heads"], path.name)
        found = msgspec.convert(content, Description)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error!r}); it belongs to {weights.name}: restore it, or train again"
        ) from error
    strange = found.calibration.temperature.keys() - heads.keys()
    if strange or not all(value > 0 for value in found.calibration.temperature.values()):
        raise ConfigError(f"{path}: temperatures {found.calibration.temperature} are not of its heads, or not above 0")
    return found


def write_description(weights: Path, description: Description) -> None:
    """Write the description beside `weights`."""
    content: Mapping[str, Any] = msgspec.to_builtins(description)
    description_path(weights).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load(weights: Path = WEIGHTS) -> keras.Model:
    """The model with trained weights; its call on int16 (B, 8, 256, 256) gives a dict head -> softmax, not calibrated.

    Raises SignatureMismatch when the weights are missing or are those of another architecture, ConfigError when their
    description cannot be read.
    """
    described = describe(weights)
    model = build(described.heads, described.sizes)
    try:
        model.load_weights(weights)
    except (OSError, ValueError) as error:
        raise SignatureMismatch(
            f"{weights.name} does not fit the protocol model ({error}); run python -m serving.train protocol"
        ) from error
    return model


def fine_tunable(start: Path, heads: Heads) -> tuple[keras.Model, list[str]]:
    """A model with `heads` on the trained trunk of `start`, and the heads whose training it keeps.

    Kept are those that read the same and have the same classes; the others begin anew. Raises as `load`.
    """
    before, trained = describe(start), load(start)
    model = build(heads, before.sizes)
    kept = [
        name
        for name, head in heads.items()
        if name in before.heads and (before.heads[name].classes, before.heads[name].reads) == (head.classes, head.reads)
    ]
    anew = {f"{name}_{part}" for name in heads if name not in kept for part in ("hidden", "head")}
    known = {layer.name: layer for layer in trained.layers}
    for layer in model.layers:
        if layer.weights and layer.name in known.keys() - anew:
            layer.set_weights(known[layer.name].get_weights())
    return model, kept
