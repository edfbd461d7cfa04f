"""Write the trained models as SavedModels in TensorFlow Serving's layout: `python -m serving.export`.

    models/hemorrhage/1/saved_model.pb               frozen: the weights are constants of the graph
    models/hemorrhage/1/assets.extra/model.json      the card: version, digest of the weights, heads, calibration

The model answers its card too, as the output `card`, so that a client learns heads and calibration from any server.
Each has the signature of `herald.signatures` under `serving_default`, of plain TensorFlow ops, so that TensorFlow
Serving and OpenVINO load the same folder. What has been exported from the same weights and code is left alone.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from herald.config import load_config
from herald.errors import ConfigError, SignatureMismatch
from herald.signatures import (
    CARD,
    FINDINGS,
    HEMORRHAGE,
    PROTOCOL,
    SIGNATURE_NAME,
    SIGNATURES,
    Signature,
    TensorSpec,
    protocol_signature,
)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep TensorFlow's C++ log off stderr: it writes there before anything can be configured."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    kept = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)


with _quiet():
    import keras  # type: ignore[import-untyped]
    import tensorflow as tf  # type: ignore[import-untyped]
    from tensorflow.core.protobuf import saved_model_pb2  # type: ignore[import-untyped]
    from tensorflow.python.framework.convert_to_constants import (  # type: ignore[import-untyped]
        convert_variables_to_constants_v2,
    )

    from serving import hemorrhage, protocol, whole_volume

HERE = Path(__file__).parent
MODEL_JSON = "assets.extra/model.json"
CONTRACT = HERE.parent / "herald" / "signatures.py"
CODE = {
    PROTOCOL.model: [HERE / "protocol.py"],
    HEMORRHAGE.model: [HERE / "hemorrhage.py", HERE / "whole_volume.py"],
}
"""What each exported model is made from, besides this file, the contract, its weights and what lies beside them."""

WEIGHTS = {PROTOCOL.model: protocol.WEIGHTS, HEMORRHAGE.model: hemorrhage.WEIGHTS}
"""The shipped weights of each model."""

CALIBRATION_KEYS = ("scale", "threshold", "pooled_share", "smoothing", "mask_offset")
BULKY = frozenset({"metrics", "ranges", "runs"})
"""Of hemorrhage.json, what stays out of the card, which travels with every answer."""

Function = Callable[[tf.Tensor], dict[str, tf.Tensor]]


# --- from model to function ------------------------------------------------------------------------------------------


def protocol_function(model: keras.Model, temperature: Mapping[str, float] | None = None) -> Function:
    """`volume` int16 (B, 8, 256, 256) -> the softmax of each head, its logits divided by the head's `temperature`."""
    temperatures = temperature or {}

    def classify(volume: tf.Tensor) -> dict[str, tf.Tensor]:
        return {
            head: _tempered(value, temperatures.get(head, 1.0)) for head, value in model(volume, training=False).items()
        }

    return classify


def _tempered(softmax: tf.Tensor, temperature: float) -> tf.Tensor:
    """Softmaxes are logits but for a constant of each row, once their logarithm is taken."""
    if temperature == 1.0:
        return tf.identity(softmax)
    return tf.nn.softmax(tf.math.log(tf.maximum(softmax, 1e-30)) / temperature)


def hemorrhage_function(
    model: keras.Model, calibration: Mapping[str, Sequence[float]], ranges: Mapping[str, float] | None = None
) -> Function:
    """`volume` int16 (D, N, N), a whole study -> `mask` uint8, `slice_probability` and `probability`.

    `calibration` holds `scale` and `threshold` for each finding, the `pooled_share` of voxels in a slice's logit,
    `smoothing` of the slices, and the `mask_offset` at which voxel logits outline best. The outermost slices are
    repeated to lend context. With `ranges` of activations it is rounded to eight bits (`serving.whole_volume`).
    """
    scale, threshold = tf.constant(calibration["scale"]), tf.constant(calibration["threshold"])
    before, here, after = calibration["smoothing"]
    (mask_offset,), (pooled_share,) = calibration["mask_offset"], calibration["pooled_share"]
    forward = whole_volume.forward(model, whole_volume.EightBits(ranges) if ranges else None)

    def detect(volume: tf.Tensor) -> dict[str, tf.Tensor]:
        raw = forward(whole_volume.padded(tf.cast(volume, tf.float32)))
        mask = tf.cast(tf.round(tf.sigmoid(raw["mask"] - mask_offset) * 255.0), tf.uint8)  # (D, 128, 128, 4 * C)
        mask = tf.nn.depth_to_space(mask, 2)  # (D, N, N, C)
        logits = (1 - pooled_share) * raw["slice"] + pooled_share * raw["pooled"]  # (D, C)
        padded = tf.concat([logits[:1], logits, logits[-1:]], axis=0)
        logits = before * padded[:-2] + here * padded[1:-1] + after * padded[2:]
        probability = tf.sigmoid(scale * (logits - threshold))  # 0.5 is the operating point
        probability = tf.minimum(probability, probability[:, :1])  # no kind is likelier than `any`
        return {
            "mask": mask,
            "slice_probability": probability,
            "probability": tf.reduce_max(probability, axis=0),
        }

    return detect


def read_calibration(path: Path) -> dict[str, list[float]]:
    """CALIBRATION_KEYS of hemorrhage.json.

    Raises ConfigError where they do not fit the findings.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content = {"mask_offset": [0.0], "pooled_share": [0.5], **content}  # which models before it did without
        calibration = {key: [float(v) for v in content[key]] for key in CALIBRATION_KEYS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"calibration {path.name} cannot be read ({error!r}); "
            "write it: python -m serving.train hemorrhage --evaluate"
        ) from error
    if content.get("findings") != list(FINDINGS):
        raise ConfigError(f"calibration {path.name} is for findings {content.get('findings')}, not {list(FINDINGS)}")
    return calibration


@dataclass(frozen=True)
class Exportable:
    """A model ready for export: what it computes, its signature, and what its card says of itself."""

    function: Function
    signature: Signature
    about: Mapping[str, Any]


def load_exportable(name: str, weights: Path) -> Exportable:
    """The model of `weights`; raises SignatureMismatch or ConfigError."""
    if name == PROTOCOL.model:
        described = protocol.describe(weights)
        signature = protocol_signature({head: spec.classes for head, spec in described.heads.items()})
        function = protocol_function(protocol.load(weights), described.calibration.temperature)
        about = {"heads": described.heads, "calibration": described.calibration}
        return Exportable(function, signature, msgspec.to_builtins(about))
    path = protocol.description_path(weights)
    calibration = read_calibration(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    about = {key: value for key, value in content.items() if key not in {*BULKY, *calibration}}
    about["measured"] = _measured(content.get("metrics"))
    function = hemorrhage_function(hemorrhage.load(weights), calibration, content.get("ranges"))
    return Exportable(function, HEMORRHAGE, {**about, "calibration": calibration})


def _measured(metrics: object) -> dict[str, dict[str, Any]]:
    """By set of patients, how many there were and how `any` bleeding was told; what is not there is left out."""
    sets = metrics.items() if isinstance(metrics, dict) else ()
    found = {}
    for name, of_set in sets:
        if isinstance(of_set, dict) and "patients" in of_set:
            told = of_set.get(FINDINGS[0]) or {}
            kept = {key: told[key] for key in ("sensitivity", "specificity") if key in told}
            found[str(name)] = {"patients": of_set["patients"], **kept}
    return found


# --- to a folder -----------------------------------------------------------------------------------------------------


def write_saved_model(function: Function, signature: Signature, folder: Path, card: bytes = b"") -> None:
    """Freeze `function` and write it to `folder`, which must not exist; raises SignatureMismatch where it differs.

    A `card` is one output more: its bytes, whatever the input.
    """
    (name, spec), *_ = signature.inputs.items()
    if card:
        signature = replace(signature, outputs={**signature.outputs, CARD: TensorSpec("uint8", (len(card),))})
    tensor = tf.TensorSpec(spec.shape, spec.dtype, name=name)
    traced = tf.function(function, input_signature=[tensor]).get_concrete_function()
    frozen = convert_variables_to_constants_v2(traced)
    module = tf.Module()
    module.frozen = frozen

    def serve(volume: tf.Tensor) -> dict[str, tf.Tensor]:
        outputs: dict[str, tf.Tensor] = tf.nest.pack_sequence_as(traced.structured_outputs, frozen(volume))
        if card:
            nothing = tf.cast(tf.shape(volume)[0] * 0, tf.uint8)  # OpenVINO drops outputs that need no input
            outputs = {**outputs, CARD: tf.constant(list(card), tf.uint8) + nothing}
        return {key: tf.ensure_shape(value, signature.outputs[key].shape) for key, value in outputs.items()
                if key in signature.outputs}  # fmt: skip

    served = tf.function(serve, input_signature=[tensor]).get_concrete_function()
    with _quiet():
        tf.saved_model.save(module, str(folder), signatures={SIGNATURE_NAME: served})
    check_signature(folder, signature)


def check_signature(folder: Path, signature: Signature) -> None:
    """Raise SignatureMismatch, naming every difference, unless the SavedModel in `folder` keeps the contract."""
    saved = saved_model_pb2.SavedModel()
    saved.ParseFromString((folder / "saved_model.pb").read_bytes())
    definition = saved.meta_graphs[0].signature_def[SIGNATURE_NAME]
    differences = [
        f"{kind} {difference}"
        for kind, found, wanted in (
            ("input", definition.inputs, signature.inputs),
            ("output", definition.outputs, signature.outputs),
        )
        for difference in _differences({name: _spec(info) for name, info in found.items()}, wanted)
    ]
    if differences:
        raise SignatureMismatch(
            f"model {signature.model} does not keep herald.signatures: {'; '.join(differences)}; "
            "correct serving/export.py"
        )


def _spec(info: object) -> TensorSpec:
    shape = tuple(None if d.size < 0 else d.size for d in info.tensor_shape.dim)  # type: ignore[attr-defined]
    return TensorSpec(tf.dtypes.as_dtype(info.dtype).name, shape)  # type: ignore[attr-defined]


def _differences(found: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec]) -> list[str]:
    return [
        f"{name} is {found.get(name, 'missing')}, wanted {wanted.get(name, 'none')}"
        for name in sorted({*found, *wanted})
        if found.get(name) != wanted.get(name)
    ]


def digest(paths: Sequence[Path]) -> str:
    """SHA-256 over the content of `paths`; raises ConfigError naming the first that is missing."""
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ConfigError(f"{missing[0]} is missing; train the model first: python -m serving.train --help")
    if len(paths) == 1:
        return hashlib.sha256(paths[0].read_bytes()).hexdigest()  # as sha256sum prints it
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in paths)).hexdigest()


def export(
    name: str, models: Path, version: int | None = None, force: bool = False, weights: Path | None = None
) -> tuple[Path, bool]:
    """Export one model to `models`/name/version; returns the folder and whether it was written now.

    `weights` are the shipped ones where they are not given. Without a version, one exported from the same sources is
    kept, and a new one gets the next number. The folder appears complete or not at all, since a model server may be
    watching.
    """
    weights = weights or WEIGHTS[name]
    beside = protocol.description_path(weights)
    made_from = digest([Path(__file__), CONTRACT, *CODE[name], weights, *([beside] if beside.exists() else [])])
    base = models / name
    versions = sorted(int(p.name) for p in base.glob("*") if p.name.isdigit())
    latest = versions[-1] if versions else 0
    number = version or max(latest, 1)
    if not force and _made_from(base / str(number)) == made_from:
        return base / str(number), False
    if version is None and not force and latest:
        number = latest + 1
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=base, prefix=".writing-") as scratch:
        folder = Path(scratch) / "model"
        with _quiet():
            model = load_exportable(name, weights)
        card = {
            "model": name,
            "version": number,
            "weights_sha256": digest([weights]),
            "made_from_sha256": made_from,
            **model.about,
        }
        write_saved_model(model.function, model.signature, folder, json.dumps(card).encode())
        (folder / MODEL_JSON).parent.mkdir()
        (folder / MODEL_JSON).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        target = base / str(number)
        if target.exists():
            target.rename(Path(scratch) / "former")
        folder.rename(target)
    return target, True


def _made_from(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / MODEL_JSON).read_text(encoding="utf-8"))["made_from_sha256"])
    except (OSError, ValueError, KeyError):
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """Export what is asked for; prints one line for each model."""
    parser = argparse.ArgumentParser(prog="python -m serving.export", description="Export the models for serving.")
    parser.add_argument("--out", type=Path, help="folder of the models (default: serving.models of herald.toml)")
    parser.add_argument("--only", choices=sorted(SIGNATURES), help="export this model alone")
    parser.add_argument("--weights", type=Path, help="of the model of --only (default: the shipped ones)")
    parser.add_argument("--version", type=int, help="version number; default: the next one, if anything changed")
    parser.add_argument("--force", action="store_true", help="write again what has not changed")
    args = parser.parse_args(argv)
    if args.weights and not args.only:
        parser.error("--weights are those of one model: name it with --only")
    models = args.out or load_config().serving.models
    for name in [args.only] if args.only else list(SIGNATURES):
        try:
            folder, written = export(name, models, args.version, args.force, args.weights)
        except (ConfigError, SignatureMismatch) as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        print(f"{name}: {'exported to' if written else 'unchanged in'} {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
