"""What runs a SavedModel: OpenVINO where it can read the model, else TensorFlow.

`python benchmarks/executor.py` compares them on this machine's models. Against TensorFlow, OpenVINO took 0.6 to 0.8 of
the time for the protocol network in f32 and 0.3 to 0.4 in bf16. A hybrid that folds slices into the batch was slower,
because the layout is turned at every fold, so the detector is exported without folds (`serving.whole_volume`). That
was on an AMD EPYC; on an Intel Xeon with AVX512-BF16 but no AMX the detector was slower in bf16 than in f32, so `auto`
is settled by time, not by what the CPU says it can.
OpenVINO needs neither TensorFlow's seconds of start-up nor its half gigabyte.
"""

import logging
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from google.protobuf.message import DecodeError

from herald.signatures import DETECTION_IN_PLANE, SIGNATURE_NAME, SIGNATURES
from herald.tensors import BY_NUMBER, Array, read_shape
from serving.stubs import saved_model_pb2

logger = logging.getLogger(__name__)

MODEL_FILE = "saved_model.pb"
SERVE_TAG = "serve"
WARM_UP_SLICES = 32
WORTH_ROUNDING = 0.85  # of f32's time; a study must not be answered in another precision each start for a hair
TRIALS = 2

Precision = Literal["auto", "f32", "bf16"]


class LoadError(Exception):
    """Raised when a SavedModel cannot be read or cannot be run by an executor."""


class ExecutionError(Exception):
    """Raised when a model fails on given inputs; `code` is the number of a gRPC status."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Executor(Protocol):
    """Runs one loaded SavedModel."""

    name: str

    def run(self, signature_name: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name for inputs by name; raises ExecutionError."""


@dataclass(frozen=True)
class ExecutorOptions:
    """How models are run; the settings of `herald.config.ServingConfig` that concern executors."""

    executor: Literal["openvino", "tensorflow"] = "openvino"
    precision: Precision = "auto"
    threads: int = 2


def read_signatures(folder: Path) -> dict[str, Any]:
    """The SignatureDefs of a SavedModel by name, read without TensorFlow; raises LoadError."""
    path = folder / MODEL_FILE
    saved_model = saved_model_pb2.SavedModel()
    try:
        saved_model.ParseFromString(path.read_bytes())
    except FileNotFoundError:
        raise LoadError(
            f"Could not find {MODEL_FILE} in version folder {folder.name}; export the model again"
        ) from None
    except (OSError, DecodeError) as error:
        raise LoadError(f"{MODEL_FILE} of version folder {folder.name} cannot be read: {error}") from error
    for meta_graph in saved_model.meta_graphs:
        if SERVE_TAG in meta_graph.meta_info_def.tags:
            return dict(meta_graph.signature_def)
    raise LoadError(f"the SavedModel in version folder {folder.name} has no meta graph with the tag {SERVE_TAG!r}")


def load_executor(folder: Path, signatures: Mapping[str, Any], options: ExecutorOptions) -> Executor:
    """Load the SavedModel in `folder`: with OpenVINO if asked for and possible, else with TensorFlow.

    The executor has run once on blank inputs, so that the first request is not slow. Raises LoadError.
    """
    if options.executor == "openvino":
        try:
            return _in_best_precision(folder, signatures, options)
        except LoadError as error:
            logger.warning("OpenVINO cannot run %s (%s); falling back to TensorFlow", _label(folder), error)
    return _warmed_up(TensorFlowExecutor(folder, options), folder, signatures)


def _in_best_precision(folder: Path, signatures: Mapping[str, Any], options: ExecutorOptions) -> Executor:
    """With OpenVINO; where it would round to bf16 by itself, only if that pays on this machine. Raises LoadError."""
    chosen = OpenVinoExecutor(folder, signatures, options)
    inputs = blank_inputs(signatures[SIGNATURE_NAME])
    executor = _warmed_up(chosen, folder, signatures)
    if options.precision != "auto" or chosen.precision == "f32" or inputs is None:
        return executor
    exact = _warmed_up(OpenVinoExecutor(folder, signatures, replace(options, precision="f32")), folder, signatures)
    return rounded_if_it_pays(executor, exact, inputs)


def rounded_if_it_pays(rounded: Executor, exact: Executor, inputs: Mapping[str, Array]) -> Executor:
    """`rounded` if its best of TRIALS runs takes at most WORTH_ROUNDING of `exact`'s, else `exact`.

    Runs take turns, so that what else the machine does falls on both. Where one cannot run `inputs`, `exact`.
    """
    best = {rounded: float("inf"), exact: float("inf")}
    try:
        for _ in range(TRIALS):
            for executor in best:
                begin = time.perf_counter()
                executor.run(SIGNATURE_NAME, inputs)
                best[executor] = min(best[executor], time.perf_counter() - begin)
    except ExecutionError:
        return exact
    kept = rounded if best[rounded] <= WORTH_ROUNDING * best[exact] else exact
    times = " and ".join(f"{executor.name} {took * 1e3:.0f} ms" for executor, took in best.items())
    logger.info("took %s on a blank input; kept %s", times, kept.name)
    return kept


def _label(folder: Path) -> str:
    return f"{folder.parent.name} version {folder.name}"


def _warmed_up(executor: Executor, folder: Path, signatures: Mapping[str, Any]) -> Executor:
    """Run once; a model of our contract that fails on blank inputs cannot be served.

    Which sizes a free dimension of another model may have is not written in a SavedModel, so there it is no proof.
    """
    signature = signatures.get(SIGNATURE_NAME)
    inputs = blank_inputs(signature) if signature is not None else None
    if inputs is None:
        return executor
    try:
        executor.run(SIGNATURE_NAME, inputs)
    except ExecutionError as error:
        if folder.parent.name in SIGNATURES:
            raise LoadError(f"it fails on a blank volume: {error}") from error
        logger.info("%s could not be warmed up (%s); its first request may be slow", _label(folder), error)
    return executor


def blank_inputs(signature: Any) -> dict[str, Array] | None:
    """Zeros of a likely size for each input of a SignatureDef; `None` where an input is of unknown rank or text."""
    inputs = {}
    for alias, info in signature.inputs.items():
        shape = read_shape(info.tensor_shape)
        data_type = BY_NUMBER.get(info.dtype)
        if shape is None or data_type is None or data_type.word == "string":
            return None
        sizes = [size if size is not None else DETECTION_IN_PLANE if axis else 1 for axis, size in enumerate(shape)]
        if len(shape) == 3 and shape[0] is None:  # slices of one volume, not a batch
            sizes[0] = WARM_UP_SLICES
        inputs[alias] = np.zeros(sizes, dtype=data_type.dtype)
    return inputs


class OpenVinoExecutor:
    """Runs the `serving_default` signature with OpenVINO on the CPU, in one stream tuned for latency.

    Shapes may change from call to call: a shape seen for the first time costs some planning once.
    """

    def __init__(self, folder: Path, signatures: Mapping[str, Any], options: ExecutorOptions) -> None:
        """Read and compile the model; raises LoadError where OpenVINO cannot stand for all of it."""
        others = {name for name in signatures if not name.startswith("__")} - {SIGNATURE_NAME}
        signature = signatures.get(SIGNATURE_NAME)
        if signature is None or others:
            raise LoadError(f"it reads {SIGNATURE_NAME} alone and the model has {', '.join(sorted(signatures))}")
        ov = _openvino()
        try:
            core = ov.Core()
            compiled = core.compile_model(
                core.read_model(str(folder)),  # the plain reader: convert_model() brings a converter and its telemetry
                "CPU",
                {
                    "PERFORMANCE_HINT": "LATENCY",
                    # OpenVINO by itself takes bf16 where the CPU computes in it, quicker or not, else f32
                    **({} if options.precision == "auto" else {"INFERENCE_PRECISION_HINT": options.precision}),
                    "INFERENCE_NUM_THREADS": options.threads,
                    "ENABLE_CPU_PINNING": False,  # models share the cores with each other and the other services
                },
            )
            _compare("input", compiled.inputs, signature.inputs)
            ports = _compare("output", compiled.outputs, signature.outputs)
            self._request = compiled.create_infer_request()
        except RuntimeError as error:
            raise LoadError(_last_line(error)) from error
        self._outputs = ports
        self.precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        self.name = f"openvino {self.precision}"

    def run(self, signature_name: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name; not for several threads at once. Raises ExecutionError."""
        try:
            results = self._request.infer(dict(inputs), share_inputs=True)
        except MemoryError as error:
            raise ExecutionError(8, f"out of memory: {error}") from error  # RESOURCE_EXHAUSTED
        except RuntimeError as error:
            raise ExecutionError(3, _last_line(error)) from error  # INVALID_ARGUMENT: shapes that do not fit inside
        return {alias: results[port] for alias, port in self._outputs.items()}


def _openvino() -> Any:
    """OpenVINO without its telemetry, which would report its first import to a host on the internet."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # makes its import fail: a stub is used
    import openvino  # type: ignore[import-untyped]

    return openvino


def _compare(kind: str, ports: list[Any], infos: Mapping[str, Any]) -> dict[str, Any]:
    """The port of each tensor of the signature, by alias; raises LoadError where name or dtype has no match."""
    found = {}
    for alias, info in infos.items():
        port = next((p for p in ports if alias in p.get_names()), None)
        if port is None:
            raise LoadError(f"{kind} {alias!r} is not among {[sorted(p.get_names()) for p in ports]}")
        expected = BY_NUMBER.get(info.dtype)
        if expected is None or port.get_element_type().to_dtype() != expected.dtype:
            raise LoadError(f"{kind} {alias!r} became {port.get_element_type().get_type_name()}")
        found[alias] = port
    return found


def _last_line(error: Exception) -> str:
    """OpenVINO's messages begin with source locations; the reason stands in their last lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[-2:]) if lines else type(error).__name__


class TensorFlowExecutor:
    """Runs every signature of a SavedModel with TensorFlow itself."""

    def __init__(self, folder: Path, options: ExecutorOptions) -> None:
        """Import TensorFlow and load the model; raises LoadError."""
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        import tensorflow as tf  # type: ignore[import-untyped]

        if not tf.config.threading.get_intra_op_parallelism_threads():
            try:
                tf.config.threading.set_intra_op_parallelism_threads(options.threads)
                tf.config.threading.set_inter_op_parallelism_threads(1)
            except RuntimeError as error:  # TensorFlow was already at work in this process
                logger.debug("threads of TensorFlow stay as they are: %s", error)
        self._tf = tf
        try:
            self._model = tf.saved_model.load(str(folder))
        except (tf.errors.OpError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise LoadError(f"TensorFlow cannot load it: {error}") from error
        self.name = "tensorflow f32"

    def run(self, signature_name: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name; raises ExecutionError with TensorFlow's own code and message."""
        tf = self._tf
        try:
            outputs = self._model.signatures[signature_name](**{a: tf.constant(v) for a, v in inputs.items()})
        except tf.errors.OpError as error:
            raise ExecutionError(error.error_code, error.message) from error
        except (ValueError, TypeError) as error:
            raise ExecutionError(3, str(error)) from error
        return {alias: np.asarray(tensor.numpy()) for alias, tensor in outputs.items()}
