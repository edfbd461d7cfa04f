"""The router's client of the model server: TensorFlow Serving's standard gRPC API, embedded server or GPU alike.

No part of it is particular to Herald's own server, and TensorFlow is not imported.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, NoReturn, Self

import grpc  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

from herald.errors import ConfigError, ServingError, ServingUnavailable, SignatureMismatch
from herald.heads import TRIAGE_HEADS, Heads, answers, parse_heads
from herald.signatures import (
    CARD,
    CONTEXT_SLICES,
    HEMORRHAGE,
    PROTOCOL,
    SIGNATURE_NAME,
    SIGNATURES,
    Signature,
    TensorSpec,
    protocol_signature,
)
from herald.tensorflow_stubs import without_tensorflow
from herald.tensors import BY_NUMBER, Array, read_shape, read_tensor, write_tensor
from router.decision import triage_needs

with without_tensorflow():
    from tensorflow_serving.apis import (  # type: ignore[import-untyped]
        get_model_metadata_pb2,
        get_model_status_pb2,
        model_service_pb2_grpc,
        predict_pb2,
        prediction_service_pb2_grpc,
    )

MAX_SLICES = 64
"""Most slices that one haemorrhage request answers for; a longer study goes in runs, so that messages stay bounded."""

MARGIN = CONTEXT_SLICES // 2 + 1
"""Slices that a run carries on either side, so that its answer equals that of the whole study: the context of a slice,
and one more, since the model smooths the answers of neighbours."""

BUSY = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.CANCELLED,  # a server that is stopping
    }
)
MESSAGE_TOO_LARGE = "larger than max"
"""In the text of a RESOURCE_EXHAUSTED that means a message limit, which no retry cures."""

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),  # a proxy meant for the web must not come between node and model server
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),  # the default of two minutes would outlast many a restart
)


@dataclass(frozen=True)
class ProtocolProbabilities:
    """What the protocol model says of a series: head -> class -> probability, and the version that answered.

    Which heads there are, and how the softmaxes of several chunks become one, is the model's own word.
    """

    heads: Mapping[str, Mapping[str, float]]
    version: str


@dataclass(frozen=True, eq=False)
class HemorrhagePrediction:
    """What the haemorrhage model says of a study of D slices; C is the number of `FINDINGS`.

    `mask` (D, H, W, C) uint8 probabilities x 255, `slice_probability` (D, C) and `probability` (C,) float32.
    """

    mask: NDArray[np.uint8]
    slice_probability: NDArray[np.float32]
    probability: NDArray[np.float32]
    version: str


@dataclass(frozen=True)
class ServedModel:
    """The version of a model that answers, and its card: empty where it carries none."""

    version: str
    card: Mapping[str, Any]


class InferenceClient:
    """Asks the model server at `address`; safe for many threads, and reconnects by itself after an outage."""

    def __init__(self, address: str, deadline_s: float = 60.0, max_slices: int = MAX_SLICES) -> None:
        """`deadline_s` bounds each request; nothing is connected before the first one."""
        self.address = address
        self._deadline_s = deadline_s
        self._max_slices = max_slices
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._prediction = prediction_service_pb2_grpc.PredictionServiceStub(self._channel)
        self._model = model_service_pb2_grpc.ModelServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connection back."""
        self._channel.close()

    def classify_protocol(self, volumes: NDArray[np.int16]) -> ProtocolProbabilities:
        """Probabilities of each head of the served model over `volumes` (B, 8, 256, 256) int16 Hounsfield units.

        Raises ServingUnavailable (retriable) or ServingError.
        """
        outputs, version = self._predict(PROTOCOL.model, volumes)
        what = f"model {PROTOCOL.model} version {version} at {self.address}"
        heads = _heads(_card(outputs, what), what)
        for name, head in heads.items():
            if self._output(outputs, PROTOCOL.model, name).shape != (len(volumes), len(head.classes)):
                raise SignatureMismatch(
                    f"{what} answered {name!r} in the shape {list(outputs[name].shape)}, and its classes are "
                    f"{', '.join(head.classes)}; export it again"
                )
        return ProtocolProbabilities(answers(outputs, heads), version)

    def detect_hemorrhage(self, volume: NDArray[np.int16]) -> HemorrhagePrediction:
        """Haemorrhage in `volume` (D, N, N) int16 Hounsfield units, N of DETECTION_IN_PLANE.

        A study of more than `max_slices` goes out in overlapping runs that are stitched together; its probability is
        the highest of its slices. Raises ServingUnavailable (retriable) or ServingError.
        """
        masks, slices, studies, versions = [], [], [], []
        for first, last in runs(len(volume), self._max_slices):
            start = max(first - MARGIN, 0)
            outputs, version = self._predict(HEMORRHAGE.model, volume[start : last + MARGIN])
            mask, of_slice, of_study = (self._output(outputs, HEMORRHAGE.model, alias) for alias in HEMORRHAGE.outputs)
            masks.append(mask[first - start : last - start])
            slices.append(of_slice[first - start : last - start])
            studies.append(of_study)
            versions.append(version)
        if len(masks) == 1:
            return HemorrhagePrediction(masks[0], slices[0], studies[0], versions[0])
        stitched = np.concatenate(slices)
        return HemorrhagePrediction(
            np.concatenate(masks), stitched, stitched.max(axis=0), ", ".join(dict.fromkeys(versions))
        )

    def check(self) -> dict[str, ServedModel]:
        """Compare every model with `herald.signatures` and its own card; what is served of each, by model name.

        Raises SignatureMismatch that names the difference or the head that triage misses, ServingUnavailable
        (retriable) or ServingError.
        """
        models = {}
        for expected in SIGNATURES.values():
            request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
            request.model_spec.name = expected.model
            response = self._call(self._prediction.GetModelMetadata, request, expected.model)
            served = get_model_metadata_pb2.SignatureDefMap()
            response.metadata["signature_def"].Unpack(served)
            if SIGNATURE_NAME not in served.signature_def:
                raise SignatureMismatch(
                    f"model {expected.model} at {self.address} has no signature {SIGNATURE_NAME!r} but "
                    f"{sorted(served.signature_def)}; export it again"
                )
            version = str(response.model_spec.version.value)
            definition = served.signature_def[SIGNATURE_NAME]
            what = f"model {expected.model} version {version} at {self.address}"
            self._compare(replace(expected, outputs={}), definition, version)  # it can be asked for its card
            card: Mapping[str, Any] = {}
            if CARD in definition.outputs:
                blank = np.zeros([size or 1 for size in expected.inputs["volume"].shape], np.int16)
                outputs, _ = self._predict(expected.model, blank, [CARD])
                card = _card(outputs, what)
            if expected.model == PROTOCOL.model and card:
                heads = _heads(card, what)
                expected = protocol_signature({name: head.classes for name, head in heads.items()})
                triage_needs({name: head.classes for name, head in heads.items() if not head.given}, what)
            self._compare(expected, definition, version)
            models[expected.model] = ServedModel(version, card)
        return models

    def ask(self) -> None:
        """Return when every model of ours is served; costs no work of a model.

        Raises ServingUnavailable (retriable) or ServingError.
        """
        for model in SIGNATURES:
            request = get_model_status_pb2.GetModelStatusRequest()
            request.model_spec.name = model
            versions = self._call(self._model.GetModelStatus, request, model).model_version_status
            if not any(v.state == get_model_status_pb2.ModelVersionStatus.AVAILABLE for v in versions):
                told = "; ".join(v.status.error_message for v in versions if v.status.error_message)
                raise ServingUnavailable(
                    f"model server {self.address} has no version of model {model} that can be asked"
                    f"{f' ({told})' if told else ''}; see the folder serving.models and the server's log"
                )

    def _compare(self, expected: Signature, served: Any, version: str) -> None:
        differences = [
            *_differences("input", expected.inputs, served.inputs),
            *_differences("output", expected.outputs, served.outputs),
            *(f"input {alias!r} is not expected" for alias in sorted(set(served.inputs) - set(expected.inputs))),
        ]
        if differences:
            raise SignatureMismatch(
                f"model {expected.model} version {version} at {self.address} does not fit this release: "
                f"{'; '.join(differences)}; serve a model exported by this release"
            )

    def _predict(self, model: str, volume: NDArray[np.int16], only: Sequence[str] = ()) -> tuple[dict[str, Array], str]:
        """The outputs of a model for one volume, by name, and the version that answered; `only` some of them."""
        request = predict_pb2.PredictRequest(output_filter=only)
        request.model_spec.name = model
        request.model_spec.signature_name = SIGNATURE_NAME
        write_tensor(request.inputs["volume"], volume)
        response = self._call(self._prediction.Predict, request, model)
        outputs = {}
        for alias in response.outputs:
            try:
                outputs[alias] = read_tensor(response.outputs[alias])
            except ValueError as error:
                raise ServingError(f"output {alias!r} of model {model} cannot be read: {error}") from error
        return outputs, str(response.model_spec.version.value)

    def _output(self, outputs: Mapping[str, Array], model: str, alias: str) -> Array:
        if alias not in outputs:
            raise SignatureMismatch(f"model {model} at {self.address} did not answer output {alias!r}")
        return outputs[alias]

    def _call(self, method: Callable[..., Any], request: Any, model: str) -> Any:
        try:
            return method(request, timeout=self._deadline_s)
        except grpc.RpcError as error:
            self._translate(error, model)

    def _translate(self, error: Any, model: str) -> NoReturn:
        """Raise the HeraldError for a failed call."""
        code, details = error.code(), error.details() or ""
        if code in BUSY and MESSAGE_TOO_LARGE not in details:
            raise ServingUnavailable(
                f"model server {self.address} did not answer for model {model} ({code.name}: {details}); start it with "
                "`herald run serving` or set HERALD_ROUTER__SERVING_ADDRESS"
            ) from error
        broken = self._load_error(model) if code is grpc.StatusCode.NOT_FOUND else ""
        if code is grpc.StatusCode.NOT_FOUND and not broken:
            raise ServingUnavailable(
                f"model server {self.address} does not serve model {model} yet ({details}); wait until it is loaded, "
                "or put it into the folder serving.models"
            ) from error
        raise ServingError(
            f"model server {self.address} refused a request for model {model} ({code.name}: {broken or details}); "
            "`herald check` compares the served models with this release"
        ) from error

    def _load_error(self, model: str) -> str:
        """Why no version of a model could be loaded; empty while one may still come."""
        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = model
        try:
            versions = self._model.GetModelStatus(request, timeout=self._deadline_s).model_version_status
        except grpc.RpcError:  # not even the status is known: as good as still loading
            return ""
        if versions and all(v.status.error_code for v in versions):
            return "; ".join(f"version {v.version} cannot be loaded: {v.status.error_message}" for v in versions)
        return ""


def _card(outputs: Mapping[str, Array], what: str) -> dict[str, Any]:
    """What the model says of itself; empty where it does not."""
    if CARD not in outputs:
        return {}
    try:
        card = json.loads(outputs[CARD].astype(np.uint8).tobytes())
        if not isinstance(card, dict):
            raise TypeError(f"a {type(card).__name__}")
    except (ValueError, TypeError) as error:
        raise SignatureMismatch(f"the card of {what} cannot be read ({error}); export the model again") from error
    return card


def _heads(card: Mapping[str, Any], what: str) -> Heads:
    """The heads in the card of a protocol model; those of `herald.signatures` where it carries none."""
    if "heads" not in card:
        return TRIAGE_HEADS
    try:
        return parse_heads(card["heads"], f"the card of {what}")
    except ConfigError as error:
        raise SignatureMismatch(f"{error}; serve a model exported by this release") from error


def runs(count: int, longest: int) -> Iterator[tuple[int, int]]:
    """Half-open runs of slices that cover `count` slices evenly, each at most `longest`; one run for no slices."""
    number = max(-(-count // longest), 1)
    for i in range(number):
        yield count * i // number, count * (i + 1) // number


def _differences(kind: str, expected: Mapping[str, TensorSpec], served: Any) -> Iterator[str]:
    """In words, where the served tensors are not what the release expects."""
    for alias, spec in expected.items():
        if alias not in served:
            yield f"{kind} {alias!r} is missing among {sorted(served)}"
            continue
        info = served[alias]
        known = BY_NUMBER.get(info.dtype)
        name = known.dtype.name if known else f"data type {info.dtype}"
        if name != spec.dtype:
            yield f"{kind} {alias!r} is {name} instead of {spec.dtype}"
        shape = read_shape(info.tensor_shape)
        if shape is not None and not _agree(spec.shape, shape, free_must_stay_free=kind == "input"):
            yield f"{kind} {alias!r} has shape {list(shape)} instead of {list(spec.shape)}"


def _agree(expected: tuple[int | None, ...], served: tuple[int | None, ...], free_must_stay_free: bool) -> bool:
    """Whether a served shape can carry the expected one; a dimension the graph leaves open agrees with any."""
    return len(expected) == len(served) and all(
        s is None or s == e or (e is None and not free_must_stay_free) for e, s in zip(expected, served, strict=True)
    )
