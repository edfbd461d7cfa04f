"""The embedded model server: TensorFlow Serving's gRPC API on the SavedModels of a folder, without TensorFlow.

Codes and messages of refusals are those of TensorFlow Serving 2.21, so that a client cannot tell the difference and
going to a GPU server is a change of address. Predict, GetModelMetadata, GetModelStatus and the standard health service
are answered; Classify, Regress, MultiInference and HandleReloadConfigRequest are UNIMPLEMENTED.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import wraps
from typing import Any, NoReturn

import grpc  # type: ignore[import-untyped]
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from herald.config import ServingConfig
from herald.errors import ConfigError
from herald.metrics import CountedRequests
from herald.signatures import SIGNATURE_NAME, SIGNATURES
from herald.tensors import Array, data_type_word, read_shape, read_tensor, write_tensor
from serving.executor import ExecutionError, ExecutorOptions
from serving.servable import NotServed, Repository, Servable, VersionStatus, load_servable
from serving.stubs import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

logger = logging.getLogger(__name__)

MAX_CONCURRENT_RPCS = 32
"""More at a time are refused with RESOURCE_EXHAUSTED, and a client tries again later."""

GRACE_S = 10.0
"""How long requests under way may take to finish when the server stops."""

SERVICES = ("", "tensorflow.serving.PredictionService", "tensorflow.serving.ModelService")
SIGNATURE_FIELD = "signature_def"

CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


class Refusal(Exception):
    """Raised when a request cannot be answered: the status code and the message that the client gets."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def invalid(message: str) -> Refusal:
    """A refusal for something wrong with the request itself."""
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, message)


# --- the checks of TensorFlow Serving, in its order ---


@contextmanager
def leased(repository: Repository, request: Any) -> Iterator[Servable]:
    """The servable that a request's ModelSpec asks for."""
    if not request.HasField("model_spec"):
        raise invalid("Missing ModelSpec")
    spec = request.model_spec
    if not spec.name:
        raise invalid("ModelSpec has no name specified.")
    if spec.version_label:  # labels come from TensorFlow Serving's model config, which a folder does not have
        raise invalid(f"Unrecognized servable version label: {spec.version_label}")
    version = spec.version.value if spec.HasField("version") else None
    try:
        lease = repository.lease(spec.name, version)
        with lease as servable:
            yield servable
    except NotServed as error:
        raise Refusal(grpc.StatusCode.NOT_FOUND, f"Servable not found for request: {error}") from None


def read_inputs(signature: Any, request: Any) -> dict[str, Array]:
    """The request's tensors by alias, checked against the signature's names, dtypes and shapes."""
    sent, required = set(request.inputs), set(signature.inputs)
    if len(sent) > len(required) or (len(sent) < len(required) and not signature.defaults):
        raise invalid(
            f"input size does not match signature: {len(sent)}!={len(required)} len({{{_joined(sent)}}}) != "
            f"len({{{_joined(required)}}}). Sent extra: {{{_joined(sent - required)}}}. "
            f"Missing but required: {{{_joined(required - sent)}}}."
        )
    inputs = {}
    for alias, info in signature.inputs.items():
        if alias not in sent and alias not in signature.defaults:
            raise invalid(
                f"Signature input alias: {alias}(feed name: {info.name}) not found in request and no default value "
                f"provided. Inputs expected to be in the request {{{_joined(sent)}}}, or default input alias set: "
                f"{_joined(signature.defaults)}"
            )
        try:
            inputs[alias] = read_tensor(request.inputs[alias] if alias in sent else signature.defaults[alias])
        except ValueError as error:
            raise invalid(f"tensor parsing error: {alias} ({error})") from error
    if not sent <= required:
        raise invalid(
            f"Inputs contains invalid name. Used request inputs: {_joined(sent & required)}, "
            f"request input: {_joined(sent)}"
        )
    return inputs


def check_inputs(signature: Any, request: Any, inputs: dict[str, Array]) -> None:
    """Dtype and shape: TensorFlow Serving leaves these to the graph, whose kernels refuse with the same code."""
    for position, (alias, info) in enumerate(sorted(signature.inputs.items(), key=lambda item: item[1].name)):
        number = request.inputs[alias].dtype if alias in request.inputs else signature.defaults[alias].dtype
        if number != info.dtype:
            expected, given = data_type_word(info.dtype), data_type_word(number)
            raise invalid(f"Expects arg[{position}] to be {expected} but {given} is provided")
        shape, given_shape = read_shape(info.tensor_shape), inputs[alias].shape
        if shape is not None and not _fits(given_shape, shape):
            raise invalid(f"input {alias} has shape {list(given_shape)}, the signature requires {_text(shape)}")


def chosen_outputs(signature: Any, output_filter: Iterable[str]) -> list[str]:
    """The outputs that a request wants: those of its filter, or all."""
    chosen: list[str] = []
    for alias in output_filter:
        if alias not in signature.outputs:
            raise invalid(
                f"output tensor alias not found in signature: {alias} "
                f"Outputs expected to be in the set {{{_joined(signature.outputs)}}}."
            )
        if alias in chosen:
            raise invalid(f"duplicate output tensor alias: {alias}")
        chosen.append(alias)
    return chosen or sorted(signature.outputs)


def _joined(names: Iterable[str]) -> str:
    return ",".join(sorted(names))


def _fits(given: tuple[int, ...], shape: tuple[int | None, ...]) -> bool:
    return len(given) == len(shape) and all(s is None or s == g for g, s in zip(given, shape, strict=True))


def _text(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


# --- the answers ---


def predict(repository: Repository, request: Any, wanted: Callable[[], bool]) -> Any:
    """Answer a PredictRequest; `wanted` says whether the client still waits. Raises Refusal."""
    with leased(repository, request) as servable:
        name = request.model_spec.signature_name or SIGNATURE_NAME
        signature = servable.signatures.get(name)
        if signature is None:
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, f'Serving signature key "{name}" not found.')
        inputs = read_inputs(signature, request)
        aliases = chosen_outputs(signature, request.output_filter)
        check_inputs(signature, request, inputs)
        with servable.turn:
            if not wanted():
                raise Refusal(grpc.StatusCode.CANCELLED, "the client has gone")
            try:
                outputs = servable.executor.run(name, inputs)
            except ExecutionError as error:
                raise Refusal(CODES.get(error.code, grpc.StatusCode.INTERNAL), str(error)) from error
        response = predict_pb2.PredictResponse()
        response.model_spec.name = servable.name
        response.model_spec.version.value = servable.version
        response.model_spec.signature_name = name
        for alias in aliases:
            write_tensor(response.outputs[alias], outputs[alias])
        return response


def model_metadata(repository: Repository, request: Any) -> Any:
    """Answer a GetModelMetadataRequest; raises Refusal."""
    if not request.HasField("model_spec"):
        raise invalid("Missing ModelSpec")
    if not request.metadata_field:
        raise invalid("GetModelMetadataRequest must specify at least one metadata_field")
    for name in request.metadata_field:
        if name != SIGNATURE_FIELD:
            raise invalid(f"Metadata field {name} is not supported")
    with leased(repository, request) as servable:
        signatures = get_model_metadata_pb2.SignatureDefMap()
        for name, signature in servable.signatures.items():
            signatures.signature_def[name].CopyFrom(signature)
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        response.model_spec.name = servable.name
        response.model_spec.version.value = servable.version
        response.metadata[SIGNATURE_FIELD].Pack(signatures)
        return response


def model_status(repository: Repository, request: Any) -> Any:
    """Answer a GetModelStatusRequest; raises Refusal."""
    if not request.HasField("model_spec"):
        raise invalid("Missing ModelSpec")
    spec = request.model_spec
    versions = repository.status(spec.name)
    if spec.HasField("version"):
        versions = [v for v in versions if v.version == spec.version.value]
        if not versions:
            message = f"Could not find version {spec.version.value} of model {spec.name}"
            raise Refusal(grpc.StatusCode.NOT_FOUND, message)
    elif not versions:
        raise Refusal(grpc.StatusCode.NOT_FOUND, f"Could not find any versions of model {spec.name}")
    response = get_model_status_pb2.GetModelStatusResponse()
    for version in versions:
        status = response.model_version_status.add(version=version.version, state=int(version.state)).status
        status.error_code = _error_code(version)
        status.error_message = version.error
    return response


def _error_code(version: VersionStatus) -> int:
    if not version.error:
        return 0
    code = grpc.StatusCode.NOT_FOUND if version.missing else grpc.StatusCode.INTERNAL
    return int(code.value[0])


# --- gRPC ---


def _answering(method: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """Turn what a method raises into the status of its call."""

    @wraps(method)
    def answer(servicer: Any, request: Any, context: Any) -> Any:
        try:
            return method(servicer, request, context)
        except Refusal as refusal:
            context.abort(refusal.code, str(refusal))
        except MemoryError:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "out of memory; send fewer slices at a time")
        except Exception as error:
            logger.exception("%s failed", method.__name__)
            context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")

    return answer


def _unimplemented(method: str, instead: str) -> NoReturn:
    raise Refusal(grpc.StatusCode.UNIMPLEMENTED, f"{method} is not implemented by this server: {instead}")


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):  # type: ignore[misc]
    """tensorflow.serving.PredictionService on a repository; method names are those of the service."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    @_answering
    def Predict(self, request: Any, context: Any) -> Any:  # noqa: N802, D102
        return predict(self._repository, request, context.is_active)

    @_answering
    def GetModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802, D102
        return model_metadata(self._repository, request)

    @_answering
    def Classify(self, request: Any, context: Any) -> Any:  # noqa: N802, D102
        _unimplemented("Classify", "use Predict")

    @_answering
    def Regress(self, request: Any, context: Any) -> Any:  # noqa: N802, D102
        _unimplemented("Regress", "use Predict")

    @_answering
    def MultiInference(self, request: Any, context: Any) -> Any:  # noqa: N802, D102
        _unimplemented("MultiInference", "use Predict")


class ModelService(model_service_pb2_grpc.ModelServiceServicer):  # type: ignore[misc]
    """tensorflow.serving.ModelService on a repository; method names are those of the service."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    @_answering
    def GetModelStatus(self, request: Any, context: Any) -> Any:  # noqa: N802, D102
        return model_status(self._repository, request)

    @_answering
    def HandleReloadConfigRequest(self, request: Any, context: Any) -> Any:  # noqa: N802, D102
        _unimplemented("HandleReloadConfigRequest", "it serves every model of its folder and follows new versions")


class ModelServer:
    """Serves the models of `config.models` from `start` to `stop`; `port` is the port that was bound."""

    def __init__(self, config: ServingConfig) -> None:
        """Bind the address; raises ConfigError where it is taken."""
        options = ExecutorOptions(config.executor, config.precision, config.threads)
        self._poll_s = config.poll_s
        self.repository = Repository(
            config.models,
            lambda name, version, folder: load_servable(name, version, folder, options),
            expected=SIGNATURES,
        )
        self._stopping = threading.Event()
        self._poller = threading.Thread(target=self._follow, name="model-versions", daemon=True)
        self._health = health.HealthServicer()
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._server = grpc.server(
            ThreadPoolExecutor(MAX_CONCURRENT_RPCS, thread_name_prefix="serving"),
            maximum_concurrent_rpcs=MAX_CONCURRENT_RPCS,
            interceptors=[CountedRequests()],
            options=[
                ("grpc.max_receive_message_length", -1),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share its requests
            ],
        )
        prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
            PredictionService(self.repository), self._server
        )
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(self.repository), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        address = f"{config.host}:{config.port}"
        try:
            self.port = int(self._server.add_insecure_port(address))
        except RuntimeError as error:
            raise ConfigError(
                f"the model server cannot listen on {address}: another process has the port, or this machine has no "
                "such address; stop that process or set serving.host and serving.port"
            ) from error
        self._host = config.host
        self._models = config.models

    def start(self) -> None:
        """Answer requests; models become available as they are loaded."""
        self._server.start()
        self._poller.start()
        logger.info("model server on %s:%d, models in %s", self._host, self.port, self._models)

    def stop(self, grace_s: float = GRACE_S) -> None:
        """Refuse new requests and wait up to `grace_s` for those under way."""
        self._stopping.set()
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._server.stop(grace_s).wait()
        if self._poller.is_alive():
            self._poller.join(timeout=grace_s)

    def _follow(self) -> None:
        """Look for new versions until the server stops; sooner while files of one are arriving."""
        while not self._stopping.is_set():
            try:
                settled = self.repository.poll()
            except Exception:  # the versions in service go on being served; the next look may fare better
                logger.exception("cannot look for new model versions")
                settled = True
            state = health_pb2.HealthCheckResponse
            self._set_health(state.NOT_SERVING if self.repository.missing() else state.SERVING)
            self._stopping.wait(self._poll_s if settled else min(self._poll_s, 0.25))

    def _set_health(self, state: Any) -> None:
        for service in SERVICES:
            self._health.set(service, state)
