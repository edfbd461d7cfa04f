"""The embedded model server over real gRPC, asked as any client of TensorFlow Serving would ask."""

import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from served_models import build, eventually

from herald.config import Config, ServingConfig
from herald.errors import ConfigError
from herald.tensors import read_tensor, write_tensor
from serving import servable, server, service
from serving.server import ModelServer
from serving.stubs import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

ROOT = Path(__file__).parents[1]
X = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.float32)
A = np.array([[10, 20, 30], [40, 50, 60]], dtype=np.int16)
DT_FLOAT, DT_UINT8, DT_INT16 = 1, 4, 5
AVAILABLE, END = 30, 50


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    return build(tmp_path_factory.getbasetemp())


@pytest.fixture
def folder(tmp_path, models) -> Path:
    """A models folder with version 1 of the model `sum`."""
    shutil.copytree(models / "spare/sum-1", tmp_path / "models/sum/1")
    return tmp_path / "models"


class Client:
    """The stubs of a channel to one server."""

    def __init__(self, port: int):
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self.prediction = prediction_service_pb2_grpc.PredictionServiceStub(self.channel)
        self.model = model_service_pb2_grpc.ModelServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    def states(self, name: str) -> dict[int, int]:
        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = name
        try:
            versions = self.model.GetModelStatus(request, timeout=30).model_version_status
        except grpc.RpcError:
            return {}
        return {v.version: v.state for v in versions}


@pytest.fixture
def started() -> Iterator[Callable[[Path], Client]]:
    """Starts a server on a models folder; its client."""
    running: list[tuple[ModelServer, Client]] = []

    def start(models: Path) -> Client:
        model_server = ModelServer(ServingConfig(port=0, models=models, poll_s=0.05))
        model_server.start()
        client = Client(model_server.port)
        running.append((model_server, client))
        return client

    yield start
    for model_server, client in running:
        client.channel.close()
        model_server.stop()


@pytest.fixture
def client(started, folder) -> Client:
    client = started(folder)
    eventually(lambda: client.states("sum") == {1: AVAILABLE})
    return client


def request_for(model: str = "sum", **inputs: np.ndarray) -> predict_pb2.PredictRequest:
    request = predict_pb2.PredictRequest()
    request.model_spec.name = model
    for alias, array in inputs.items():
        write_tensor(request.inputs[alias], array)
    return request


def test_outputs_come_back_under_their_names_with_dtype_and_version(client):
    response = client.prediction.Predict(request_for(x=X, a=A), timeout=30)
    assert set(response.outputs) == {"total", "count"}
    np.testing.assert_array_equal(read_tensor(response.outputs["total"]), X + A)
    np.testing.assert_array_equal(read_tensor(response.outputs["count"]), [3, 3])
    assert response.outputs["count"].dtype == DT_UINT8
    assert response.outputs["total"].tensor_content
    assert response.model_spec.name == "sum"
    assert response.model_spec.version.value == 1
    assert response.model_spec.signature_name == "serving_default"


def test_typed_fields_are_read_and_a_last_value_repeats_up_to_the_shape(client):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "sum"
    x, a = request.inputs["x"], request.inputs["a"]
    x.dtype, a.dtype = DT_FLOAT, DT_INT16
    for tensor in (x, a):
        tensor.tensor_shape.dim.add().size = 2
        tensor.tensor_shape.dim.add().size = 3
    x.float_val.extend([1.5, 2.0])
    a.int_val.append(-7)
    response = client.prediction.Predict(request, timeout=30)
    np.testing.assert_array_equal(
        read_tensor(response.outputs["total"]), np.array([[1.5, 2, 2], [2, 2, 2]], dtype=np.float32) - 7
    )


def test_a_tensor_without_values_is_zero(client):
    request = request_for(x=X)
    a = request.inputs["a"]
    a.dtype = DT_INT16
    for size in A.shape:
        a.tensor_shape.dim.add().size = size
    response = client.prediction.Predict(request, timeout=30)
    np.testing.assert_array_equal(read_tensor(response.outputs["total"]), X)


def test_output_filter_selects_outputs(client):
    request = request_for(x=X, a=A)
    request.output_filter.append("count")
    assert list(client.prediction.Predict(request, timeout=30).outputs) == ["count"]


def test_a_version_asked_for_by_number_answers(client):
    request = request_for(x=X, a=A)
    request.model_spec.version.value = 1
    assert client.prediction.Predict(request, timeout=30).model_spec.version.value == 1


def _spec(**fields) -> predict_pb2.PredictRequest:
    request = request_for(x=X, a=A)
    if "version" in fields:
        request.model_spec.version.value = fields.pop("version")
    for name, value in fields.items():
        setattr(request.model_spec, name, value)
    return request


def _filtered(*aliases: str) -> predict_pb2.PredictRequest:
    request = request_for(x=X, a=A)
    request.output_filter.extend(aliases)
    return request


def _without_spec() -> predict_pb2.PredictRequest:
    request = request_for(x=X, a=A)
    request.ClearField("model_spec")
    return request


def _cut_content() -> predict_pb2.PredictRequest:
    request = request_for(x=X, a=A)
    request.inputs["x"].tensor_content = b"123"
    return request


def _huge() -> predict_pb2.PredictRequest:
    request = request_for(x=X, a=A)
    request.inputs["x"].tensor_content = b""
    request.inputs["x"].tensor_shape.dim[0].size = 2**40
    return request


REFUSALS = {
    "unknown model": (_spec(name="other"), "NOT_FOUND", "Servable not found for request: Latest(other)"),
    "unknown model and version": (
        _spec(name="other", version=3),
        "NOT_FOUND",
        "Servable not found for request: Specific(other, 3)",
    ),
    "unknown version": (_spec(version=9), "NOT_FOUND", "Servable not found for request: Specific(sum, 9)"),
    "unknown label": (
        _spec(version_label="canary"),
        "INVALID_ARGUMENT",
        "Unrecognized servable version label: canary",
    ),
    "unknown signature": (
        _spec(signature_name="nope"),
        "FAILED_PRECONDITION",
        'Serving signature key "nope" not found.',
    ),
    "no model_spec": (_without_spec(), "INVALID_ARGUMENT", "Missing ModelSpec"),
    "no name": (_spec(name=""), "INVALID_ARGUMENT", "ModelSpec has no name specified."),
    "missing input": (
        request_for(x=X),
        "INVALID_ARGUMENT",
        "input size does not match signature: 1!=2 len({x}) != len({a,x}). Sent extra: {}. Missing but required: {a}.",
    ),
    "extra input": (
        request_for(x=X, a=A, z=X),
        "INVALID_ARGUMENT",
        "input size does not match signature: 3!=2 len({a,x,z}) != len({a,x}). Sent extra: {z}. "
        "Missing but required: {}.",
    ),
    "misnamed input": (request_for(x=X, b=A), "INVALID_ARGUMENT", "Signature input alias: a(feed name: "),
    "wrong dtype": (
        request_for(x=X, a=A.astype(np.float32)),
        "INVALID_ARGUMENT",
        "Expects arg[0] to be int16 but float is provided",
    ),
    "wrong dtype of the other": (
        request_for(x=X.astype(np.float16), a=A),
        "INVALID_ARGUMENT",
        "Expects arg[1] to be float but half is provided",
    ),
    "wrong size": (request_for(x=X[:, :2], a=A), "INVALID_ARGUMENT", "input x has shape [2, 2], the signature"),
    "wrong rank": (request_for(x=X[0], a=A), "INVALID_ARGUMENT", "input x has shape [3], the signature"),
    "shapes that disagree": (request_for(x=np.tile(X, (3, 1)), a=A), "INVALID_ARGUMENT", ""),
    "content of another size": (_cut_content(), "INVALID_ARGUMENT", "tensor parsing error: x"),
    "a shape beyond any message": (_huge(), "INVALID_ARGUMENT", "tensor parsing error: x"),
    "unknown output": (
        _filtered("nope"),
        "INVALID_ARGUMENT",
        "output tensor alias not found in signature: nope Outputs expected to be in the set {count,total}.",
    ),
    "repeated output": (_filtered("total", "total"), "INVALID_ARGUMENT", "duplicate output tensor alias: total"),
}


@pytest.fixture(scope="module")
def steady(models, tmp_path_factory) -> Iterator[Client]:
    """One server with the model `sum` for the tests that change nothing."""
    root = tmp_path_factory.mktemp("steady")
    shutil.copytree(models / "spare/sum-1", root / "sum/1")
    model_server = ModelServer(ServingConfig(port=0, models=root, poll_s=0.05))
    model_server.start()
    client = Client(model_server.port)
    eventually(lambda: client.states("sum") == {1: AVAILABLE})
    yield client
    client.channel.close()
    model_server.stop()


@pytest.mark.parametrize("case", REFUSALS)
def test_a_wrong_predict_request_gets_the_status_of_tensorflow_serving(steady, case):
    request, code, message = REFUSALS[case]
    with pytest.raises(grpc.RpcError) as refused:
        steady.prediction.Predict(request, timeout=30)
    assert refused.value.code().name == code
    assert refused.value.details().startswith(message)
    assert steady.prediction.Predict(request_for(x=X, a=A), timeout=30).outputs  # and the server goes on


@pytest.mark.parametrize("method", ["Classify", "Regress", "MultiInference", "HandleReloadConfigRequest"])
def test_methods_that_are_not_offered_say_so(steady, method):
    stub = steady.model if method == "HandleReloadConfigRequest" else steady.prediction
    with pytest.raises(grpc.RpcError) as refused:
        steady.channel.unary_unary(getattr(stub, method)._method)(b"", timeout=30)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert method in refused.value.details()


def test_metadata_holds_every_signature_as_saved(steady):
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = "sum"
    response = steady.prediction.GetModelMetadata(request, timeout=30)
    signatures = get_model_metadata_pb2.SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(signatures)
    signature = signatures.signature_def["serving_default"]
    assert (response.model_spec.name, response.model_spec.version.value) == ("sum", 1)
    assert signature.method_name == "tensorflow/serving/predict"
    assert {a: (i.dtype, [d.size for d in i.tensor_shape.dim]) for a, i in signature.inputs.items()} == {
        "x": (DT_FLOAT, [-1, 3]),
        "a": (DT_INT16, [-1, 3]),
    }


@pytest.mark.parametrize(
    ("name", "fields", "code", "message"),
    [
        ("sum", [], "INVALID_ARGUMENT", "GetModelMetadataRequest must specify at least one metadata_field"),
        ("sum", ["weights"], "INVALID_ARGUMENT", "Metadata field weights is not supported"),
        ("other", ["signature_def"], "NOT_FOUND", "Servable not found for request: Latest(other)"),
        (None, ["signature_def"], "INVALID_ARGUMENT", "Missing ModelSpec"),
    ],
)
def test_a_wrong_metadata_request_gets_the_status_of_tensorflow_serving(steady, name, fields, code, message):
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=fields)
    if name:
        request.model_spec.name = name
    with pytest.raises(grpc.RpcError) as refused:
        steady.prediction.GetModelMetadata(request, timeout=30)
    assert (refused.value.code().name, refused.value.details()) == (code, message)


@pytest.mark.parametrize(
    ("name", "version", "code", "message"),
    [
        ("other", None, "NOT_FOUND", "Could not find any versions of model other"),
        ("sum", 7, "NOT_FOUND", "Could not find version 7 of model sum"),
        (None, None, "INVALID_ARGUMENT", "Missing ModelSpec"),
    ],
)
def test_a_wrong_status_request_gets_the_status_of_tensorflow_serving(steady, name, version, code, message):
    request = get_model_status_pb2.GetModelStatusRequest()
    if name:
        request.model_spec.name = name
    if version:
        request.model_spec.version.value = version
    with pytest.raises(grpc.RpcError) as refused:
        steady.model.GetModelStatus(request, timeout=30)
    assert (refused.value.code().name, refused.value.details()) == (code, message)


def test_an_available_version_has_an_error_code_of_zero(steady):
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = "sum"
    request.model_spec.version.value = 1
    (version,) = steady.model.GetModelStatus(request, timeout=30).model_version_status
    assert (version.version, version.state, version.status.error_code) == (1, AVAILABLE, 0)
    assert version.HasField("status")


def test_health_is_serving_once_every_model_of_the_contract_is_available(started, models, tmp_path):
    client = started(tmp_path / "models")
    probe = health_pb2.HealthCheckRequest()
    assert client.health.Check(probe, timeout=30).status == health_pb2.HealthCheckResponse.NOT_SERVING
    shutil.copytree(models / "contract", tmp_path / "models")
    eventually(lambda: client.health.Check(probe, timeout=30).status == health_pb2.HealthCheckResponse.SERVING)


def test_a_server_without_a_models_folder_says_so_and_serves_what_comes_later(started, models, tmp_path, caplog):
    client = started(tmp_path / "models")
    eventually(lambda: "waiting for model protocol" in caplog.text)
    assert client.states("sum") == {}
    shutil.copytree(models / "spare/sum-1", tmp_path / "models/sum/1")
    eventually(lambda: client.states("sum") == {1: AVAILABLE})


def test_a_new_version_takes_over_under_load_without_a_dropped_request(client, folder, models):
    stop = threading.Event()
    versions: list[int] = []

    def ask() -> None:
        while not stop.is_set():
            response = client.prediction.Predict(request_for(x=X, a=A), timeout=30)
            version = response.model_spec.version.value
            offset = {1: 0, 2: 100}[version]
            np.testing.assert_array_equal(read_tensor(response.outputs["total"]), X + A + offset)
            versions.append(version)

    with ThreadPoolExecutor(4) as askers:
        asking = [askers.submit(ask) for _ in range(4)]
        eventually(lambda: len(versions) > 20)
        shutil.copytree(models / "spare/sum-2", folder / "sum/2")
        eventually(lambda: client.states("sum") == {2: AVAILABLE, 1: END})
        answered = len(versions)
        eventually(lambda: len(versions) > answered + 20)
        shutil.rmtree(folder / "sum/2")  # and back
        eventually(lambda: client.states("sum") == {2: END, 1: AVAILABLE})
        stop.set()
        for future in asking:
            future.result(timeout=30)  # raises what a dropped request raised
    assert set(versions) == {1, 2}


@pytest.mark.parametrize(
    ("content", "code", "reason"),
    [(None, 5, "Could not find saved_model.pb"), (b"\xff not a model", 13, "cannot be read")],
)
def test_a_version_that_cannot_be_loaded_shows_its_error_and_the_old_one_stays(
    client, folder, models, content, code, reason, caplog
):
    broken = folder / "sum/2"
    broken.mkdir()
    if content is not None:
        (broken / "saved_model.pb").write_bytes(content)
    eventually(lambda: client.states("sum") == {2: END, 1: AVAILABLE})
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = "sum"
    new, old = client.model.GetModelStatus(request, timeout=30).model_version_status
    assert (new.version, new.status.error_code) == (2, code)
    assert reason in new.status.error_message
    assert old.status.error_code == 0
    assert "cannot load sum version 2" in caplog.text
    assert client.prediction.Predict(request_for(x=X, a=A), timeout=30).model_spec.version.value == 1

    shutil.copytree(models / "spare/sum-2", broken, dirs_exist_ok=True)  # exported again, properly
    eventually(lambda: client.states("sum") == {2: AVAILABLE, 1: END})


class SlowExecutor:
    """Answers when told to."""

    name = "slow"

    def __init__(self) -> None:
        self.running = threading.Event()
        self.may_finish = threading.Event()

    def run(self, signature_name, inputs):
        self.running.set()
        assert self.may_finish.wait(60)
        return {"total": inputs["x"], "count": np.zeros(2, np.uint8)}


@pytest.fixture
def slow(monkeypatch) -> SlowExecutor:
    """Every model loaded from here on runs on this executor."""
    executor = SlowExecutor()
    monkeypatch.setattr(servable, "load_executor", lambda *_: executor)
    return executor


def test_stopping_finishes_the_request_under_way_and_refuses_new_ones(slow, folder):
    model_server = ModelServer(ServingConfig(port=0, models=folder, poll_s=0.05))
    model_server.start()
    client = Client(model_server.port)
    eventually(lambda: client.states("sum") == {1: AVAILABLE})
    answer = client.prediction.Predict.future(request_for(x=X, a=A), timeout=60)
    assert slow.running.wait(30)
    stopping = threading.Thread(target=model_server.stop)
    stopping.start()
    eventually(lambda: client.states("sum") == {})
    with pytest.raises(grpc.RpcError) as refused:
        client.prediction.Predict(request_for(x=X, a=A), timeout=30)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    slow.may_finish.set()
    np.testing.assert_array_equal(read_tensor(answer.result(timeout=30).outputs["total"]), X)
    stopping.join(timeout=30)
    assert not stopping.is_alive()
    client.channel.close()


def test_a_retired_version_stays_until_its_request_is_answered(slow, started, folder, models):
    client = started(folder)
    eventually(lambda: client.states("sum") == {1: AVAILABLE})
    answer = client.prediction.Predict.future(request_for(x=X, a=A), timeout=60)
    assert slow.running.wait(30)
    shutil.copytree(models / "spare/sum-2", folder / "sum/2")
    eventually(lambda: client.states("sum") == {2: AVAILABLE, 1: 40})
    slow.may_finish.set()
    assert answer.result(timeout=30).model_spec.version.value == 1
    eventually(lambda: client.states("sum") == {2: AVAILABLE, 1: END})


def test_too_many_requests_at_once_are_refused_as_resource_exhausted(slow, started, folder, monkeypatch):
    monkeypatch.setattr(server, "MAX_CONCURRENT_RPCS", 2)
    client = started(folder)
    eventually(lambda: client.states("sum") == {1: AVAILABLE})
    answers = [client.prediction.Predict.future(request_for(x=X, a=A), timeout=60)]
    assert slow.running.wait(30)
    answers += [client.prediction.Predict.future(request_for(x=X, a=A), timeout=60) for _ in range(3)]
    eventually(lambda: any(a.done() for a in answers))
    slow.may_finish.set()
    codes = sorted(a.code().name for a in answers)
    assert "RESOURCE_EXHAUSTED" in codes
    assert "OK" in codes


def test_a_taken_port_is_a_config_error_that_names_it(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*serving.port"):
            ModelServer(ServingConfig(port=port, models=tmp_path))


def test_the_service_runs_until_it_is_stopped(folder, caplog):
    caplog.set_level("INFO")
    stop = threading.Event()
    config = Config(serving=ServingConfig(port=0, models=folder, poll_s=0.05))
    running = threading.Thread(target=service.serve, args=(config, stop))
    running.start()
    eventually(lambda: "serving sum version 1 with openvino " in caplog.text)
    stop.set()
    running.join(timeout=15)
    assert not running.is_alive()
    assert "model server stopped" in caplog.text


STRANGER = """
import json, sys
import grpc
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

stub = prediction_service_pb2_grpc.PredictionServiceStub(grpc.insecure_channel("127.0.0.1:" + sys.argv[1]))
request = predict_pb2.PredictRequest()
request.model_spec.name = "sum"
request.inputs["x"].CopyFrom(tf.make_tensor_proto([[1, 2, 3]], dtype=tf.float32))
request.inputs["a"].CopyFrom(tf.make_tensor_proto(7, shape=[1, 3], dtype=tf.int16))
result = stub.Predict(request, 10.0)

from herald.tensors import DATA_TYPES, read_tensor, write_tensor

read = {}
for t in DATA_TYPES:
    text = t.word == "string"
    for values in ([b"a", b"b"] if text else [0, 1], [b"a"] if text else [1]):
        array = np.array(values, dtype=t.dtype)
        theirs = tf.make_tensor_proto(array, dtype=tf.dtypes.as_dtype(t.number))
        ours = predict_pb2.PredictRequest().inputs["x"]
        write_tensor(ours, array)
        typed = theirs
        if len(values) == 1:
            typed = tf.make_tensor_proto(array.tolist(), shape=[4], dtype=tf.dtypes.as_dtype(t.number))
        read[t.word + str(len(values))] = bool(
            (read_tensor(theirs) == array).all()
            and (tf.make_ndarray(ours) == array).all()
            and (read_tensor(typed) == tf.make_ndarray(typed)).all()
            and read_tensor(theirs).dtype == array.dtype
        )
print(json.dumps({"total": tf.make_ndarray(result.outputs["total"]).tolist(), "read": read}))
"""


def test_a_client_that_nobody_here_wrote_is_answered(steady):
    port = steady.channel._channel.target().decode().rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, port],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["total"] == [[8, 9, 10]]
    assert answer["read"]
    assert all(answer["read"].values()), answer["read"]


FALLBACK = """
import json, logging, sys, time
from pathlib import Path

logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")

import grpc
import numpy as np
from herald.config import ServingConfig
from herald.tensors import read_tensor, write_tensor
from serving.server import ModelServer
from serving.stubs import predict_pb2, prediction_service_pb2_grpc

before = "tensorflow" in sys.modules
server = ModelServer(ServingConfig(port=0, models=Path(sys.argv[1]), poll_s=0.05))
server.start()
while [v.state for name in ("hemorrhage", "two") for v in server.repository.status(name)] != [50, 30]:
    time.sleep(0.02)
stub = prediction_service_pb2_grpc.PredictionServiceStub(grpc.insecure_channel(f"127.0.0.1:{server.port}"))
answers = {}
for name in ("", "square"):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "two"
    request.model_spec.signature_name = name
    write_tensor(request.inputs["x"], np.array([3, 5], dtype=np.float32))
    answers[name] = read_tensor(stub.Predict(request, timeout=60).outputs["y"]).tolist()
server.stop()
(unfit,) = server.repository.status("hemorrhage")
print(json.dumps({"tensorflow": [before, "tensorflow" in sys.modules], "answers": answers, "unfit": unfit.error}))
"""


def test_what_openvino_cannot_run_is_served_by_tensorflow_and_what_neither_can_is_not_served(models, tmp_path):
    shutil.copytree(models / "spare/two-signatures", tmp_path / "two/1")
    shutil.copytree(models / "spare/unfit", tmp_path / "hemorrhage/1")
    done = subprocess.run(
        [sys.executable, "-c", FALLBACK, str(tmp_path)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["tensorflow"] == [False, True]
    assert answer["answers"] == {"": [6, 10], "square": [9, 25]}
    assert "it fails on a blank volume" in answer["unfit"]
    assert "OpenVINO cannot run two version 1" in done.stderr
    assert "falling back to TensorFlow" in done.stderr
    assert "serving two version 1 with tensorflow f32, loaded in" in done.stderr
