"""The router's client of the model server over real gRPC."""

import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from served_models import build, eventually

from herald import signatures
from herald.config import ServingConfig
from herald.errors import ServingError, ServingUnavailable, SignatureMismatch
from herald.signatures import DETECTION_IN_PLANE, FINDINGS, HEADS, HEMORRHAGE, PROTOCOL, TensorSpec
from herald.tensors import read_tensor, write_tensor
from router import inference
from router.inference import InferenceClient, ServedModel, runs
from serving.server import ModelServer
from serving.stubs import predict_pb2, prediction_service_pb2_grpc


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    return build(tmp_path_factory.getbasetemp())


def serving(models: Path, port: int = 0) -> ModelServer:
    server = ModelServer(ServingConfig(port=port, models=models, poll_s=0.05))
    server.start()
    return server


@pytest.fixture(scope="module")
def address(models) -> Iterator[str]:
    """A server with the two models of the contract."""
    server = serving(models / "contract")
    eventually(lambda: not server.repository.missing())
    yield f"127.0.0.1:{server.port}"
    server.stop()


@pytest.fixture
def client(address) -> Iterator[InferenceClient]:
    with InferenceClient(address, deadline_s=60) as client:
        yield client


class Refusing(prediction_service_pb2_grpc.PredictionServiceServicer):
    """A model server that answers every Predict with one status, or with what `answer` makes of it."""

    def __init__(self) -> None:
        self.status = (grpc.StatusCode.UNAVAILABLE, "")
        self.answer: Callable | None = None
        self.requests: list = []

    def Predict(self, request, context):  # noqa: N802
        self.requests.append(request)
        if self.answer:
            return self.answer(request)
        context.abort(*self.status)


@pytest.fixture
def refusing() -> Iterator[Refusing]:
    servicer = Refusing()
    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.max_receive_message_length", -1)])
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(servicer, server)
    servicer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield servicer
    server.stop(None).wait()


VOLUMES = np.zeros((2, 8, 256, 256), np.int16)
STUDY = np.zeros((4, DETECTION_IN_PLANE, DETECTION_IN_PLANE), np.int16)


def test_protocol_probabilities_are_the_mean_over_the_batch_by_label(client):
    volumes = np.stack([np.full((8, 256, 256), value, np.int16) for value in (0, 100)])
    answer = client.classify_protocol(volumes)
    assert answer.version == "1"
    assert {head: tuple(labels) for head, labels in answer.heads.items()} == dict(HEADS)
    for head, labels in HEADS.items():
        logits = np.array([[0.0] * len(labels), list(range(len(labels)))])
        softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        assert list(answer.heads[head].values()) == pytest.approx(softmax.mean(axis=0), abs=1e-5)


def _study(depth: int) -> np.ndarray:
    return (
        np.random.default_rng(depth).integers(0, 255, (depth, DETECTION_IN_PLANE, DETECTION_IN_PLANE)).astype(np.int16)
    )


def test_hemorrhage_prediction_has_mask_slices_and_study(client):
    volume = np.zeros((6, DETECTION_IN_PLANE, DETECTION_IN_PLANE), np.int16)
    volume[1] = 255
    answer = client.detect_hemorrhage(volume)
    assert answer.version == "1"
    assert (answer.mask.shape, answer.mask.dtype) == (
        (6, DETECTION_IN_PLANE, DETECTION_IN_PLANE, len(FINDINGS)),
        np.uint8,
    )
    assert answer.slice_probability[:, 0].tolist() == [1, 1, 1, 0.75, 0.25, 0]
    assert answer.probability == pytest.approx([1 / (1 + c) for c in range(len(FINDINGS))], abs=1e-3)
    assert answer.mask[0, 0, 0, 1] == 128


@pytest.mark.parametrize("longest", [5, 7, 11])
def test_a_long_study_in_runs_gives_what_the_whole_study_gives(address, client, longest):
    volume = _study(11)
    whole = client.detect_hemorrhage(volume)
    with InferenceClient(address, deadline_s=60, max_slices=longest) as chunked:
        stitched = chunked.detect_hemorrhage(volume)
    np.testing.assert_array_equal(stitched.mask, whole.mask)
    np.testing.assert_allclose(stitched.slice_probability, whole.slice_probability, rtol=1e-6)
    np.testing.assert_allclose(stitched.probability, whole.probability, rtol=1e-6)
    assert stitched.version == "1"


def test_no_request_carries_more_slices_than_allowed_and_their_context(refusing):
    def answer(request):
        depth = len(read_tensor(request.inputs["volume"]))
        response = predict_pb2.PredictResponse()
        write_tensor(response.outputs["mask"], np.zeros((depth, 2, 2, 5), np.uint8))
        write_tensor(response.outputs["slice_probability"], np.zeros((depth, 5), np.float32))
        write_tensor(response.outputs["probability"], np.zeros(5, np.float32))
        return response

    refusing.answer = answer
    with InferenceClient(refusing.address, deadline_s=60) as client:
        assert client.detect_hemorrhage(np.zeros((200, 2, 2), np.int16)).mask.shape == (200, 2, 2, 5)
    sent = [len(read_tensor(r.inputs["volume"])) for r in refusing.requests]
    assert sent == [53, 56, 56, 53]


@pytest.mark.parametrize(("count", "longest"), [(1, 64), (64, 64), (65, 64), (200, 64), (7, 2)])
def test_runs_cover_every_slice_once_in_even_lengths(count, longest):
    found = list(runs(count, longest))
    assert [i for first, last in found for i in range(first, last)] == list(range(count))
    lengths = [last - first for first, last in found]
    assert max(lengths) <= longest
    assert max(lengths) - min(lengths) <= 1


def test_typed_answers_as_tensorflow_serving_sends_by_default_are_read(refusing):
    def answer(request):
        response = predict_pb2.PredictResponse()
        for head, labels in HEADS.items():
            output = response.outputs[head]
            output.dtype = 1
            for size in (2, len(labels)):
                output.tensor_shape.dim.add().size = size
            output.float_val.extend([0.25, 0.75, 0.0][: len(labels)] * 2)
        response.model_spec.version.value = 12
        return response

    refusing.answer = answer
    with InferenceClient(refusing.address, deadline_s=60) as client:
        answered = client.classify_protocol(VOLUMES)
    assert answered.heads["contrast"] == {"non_contrast": 0.25, "contrast": 0.75}
    assert answered.version == "12"


@pytest.mark.parametrize(
    ("code", "details", "expected"),
    [
        ("UNAVAILABLE", "stopping", ServingUnavailable),
        ("DEADLINE_EXCEEDED", "too slow", ServingUnavailable),
        ("RESOURCE_EXHAUSTED", "Concurrent RPC limit exceeded!", ServingUnavailable),
        ("NOT_FOUND", "Servable not found for request: Latest(protocol)", ServingUnavailable),
        ("RESOURCE_EXHAUSTED", "CLIENT: Received message larger than max (9 vs. 4)", ServingError),
        ("INVALID_ARGUMENT", "Expects arg[0] to be int16 but float is provided", ServingError),
        ("FAILED_PRECONDITION", 'Serving signature key "serving_default" not found.', ServingError),
        ("INTERNAL", "kernel", ServingError),
    ],
)
def test_each_status_becomes_the_error_that_says_whether_to_retry(refusing, code, details, expected):
    refusing.status = (grpc.StatusCode[code], details)
    with InferenceClient(refusing.address, deadline_s=60) as client, pytest.raises(ServingError) as raised:
        client.classify_protocol(VOLUMES)
    assert type(raised.value) is expected
    assert raised.value.retriable is (expected is ServingUnavailable)
    assert refusing.address in str(raised.value)
    assert details in str(raised.value)


def test_an_answer_that_does_not_come_in_time_is_unavailable(refusing):
    release = threading.Event()
    refusing.answer = lambda request: release.wait(10) and predict_pb2.PredictResponse()
    with InferenceClient(refusing.address, deadline_s=0.2) as client:
        with pytest.raises(ServingUnavailable, match="DEADLINE_EXCEEDED"):
            client.classify_protocol(VOLUMES)
        release.set()


def test_an_answer_without_an_output_is_a_mismatch_that_names_it(refusing):
    refusing.answer = lambda request: predict_pb2.PredictResponse()
    with (
        InferenceClient(refusing.address, deadline_s=60) as client,
        pytest.raises(SignatureMismatch, match="'contrast'"),
    ):
        client.classify_protocol(VOLUMES)


def test_a_server_that_is_down_is_unavailable_and_answers_the_same_client_once_it_is_up(models):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with InferenceClient(f"127.0.0.1:{port}", deadline_s=60) as client:
        with pytest.raises(ServingUnavailable, match=r"herald run serving.*HERALD_ROUTER__SERVING_ADDRESS"):
            client.detect_hemorrhage(STUDY)
        server = serving(models / "contract", port)
        try:

            def answered() -> bool:
                try:
                    return client.detect_hemorrhage(STUDY).version == "1"
                except ServingUnavailable:
                    return False

            eventually(answered)
        finally:
            server.stop()
        with pytest.raises(ServingUnavailable):
            client.detect_hemorrhage(STUDY)


def test_a_model_that_is_not_there_yet_is_unavailable(tmp_path):
    server = serving(tmp_path)
    try:
        with (
            InferenceClient(f"127.0.0.1:{server.port}", deadline_s=60) as client,
            pytest.raises(ServingUnavailable, match="does not serve model protocol yet"),
        ):
            client.classify_protocol(VOLUMES)
    finally:
        server.stop()


def test_a_model_that_cannot_be_loaded_is_an_error_with_its_reason(tmp_path):
    (tmp_path / "protocol/3").mkdir(parents=True)
    (tmp_path / "protocol/3/saved_model.pb").write_bytes(b"\xff")
    server = serving(tmp_path)
    try:
        eventually(lambda: any(v.error for v in server.repository.status("protocol")))
        with (
            InferenceClient(f"127.0.0.1:{server.port}", deadline_s=60) as client,
            pytest.raises(ServingError, match=r"version 3 cannot be loaded: saved_model\.pb") as raised,
        ):
            client.classify_protocol(VOLUMES)
        assert not raised.value.retriable
    finally:
        server.stop()


def test_a_wrong_volume_is_refused_with_the_servers_reason(client):
    with pytest.raises(ServingError, match=r"Expects arg\[0\] to be int16 but float is provided"):
        client.classify_protocol(np.zeros((1, 8, 256, 256), np.float32))


def test_check_returns_the_versions_of_models_that_fit(client):
    assert client.check() == {"protocol": ServedModel("1", {}), "hemorrhage": ServedModel("1", {})}


def _answer(request, card: bytes, **heads: list[list[float]]):
    response = predict_pb2.PredictResponse()
    for name, scores in heads.items():
        write_tensor(response.outputs[name], np.array(scores, np.float32))
    write_tensor(response.outputs["card"], np.frombuffer(card, np.uint8))
    return response


def test_heads_and_their_classes_are_those_that_the_answering_version_names(refusing):
    card = b'{"heads": {"phase": {"classes": ["early", "late"], "aggregation": "max"}}}'
    refusing.answer = lambda request: _answer(request, card, phase=[[0.9, 0.1], [0.4, 0.6]], other=[[1.0]])
    with InferenceClient(refusing.address, deadline_s=60) as client:
        answered = client.classify_protocol(VOLUMES)
    assert answered.heads == {"phase": pytest.approx({"early": 0.6, "late": 0.4})}


@pytest.mark.parametrize(
    ("card", "reason"),
    [
        (b"{", "the card of model protocol version 0 at .* cannot be read"),
        (b"[]", "cannot be read \\(a list\\)"),
        (b'{"heads": {"phase": {"classes": ["early"]}}}', "head phase: .* not at least two"),
        (b'{"heads": {"phase": {"classes": ["a", "b", "c"]}}}', r"'phase' in the shape \[2, 2\], .* are a, b, c"),
        (b'{"heads": {"region": {"classes": ["a", "b"]}}}', "did not answer output 'region'"),
    ],
    ids=str,
)
def test_a_card_that_does_not_fit_its_answer_is_a_mismatch_that_says_why(refusing, card, reason):
    refusing.answer = lambda request: _answer(request, card, phase=[[0.9, 0.1], [0.4, 0.6]])
    with InferenceClient(refusing.address, deadline_s=60) as client, pytest.raises(SignatureMismatch, match=reason):
        client.classify_protocol(VOLUMES)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"inputs": {"image": TensorSpec("int16", (None, 8, 256, 256))}}, "input 'image' is missing among"),
        ({"inputs": {"volume": TensorSpec("float32", (None, 8, 256, 256))}}, "'volume' is int16 instead of float32"),
        (
            {"inputs": {"volume": TensorSpec("int16", (None, 8, 128, 128))}},
            r"'volume' has shape \[None, 8, 256, 256\] instead of \[None, 8, 128, 128\]",
        ),
        ({"inputs": {"volume": TensorSpec("int16", (None, None, 256, 256))}}, "'volume' has shape"),
        ({"inputs": {}}, "input 'volume' is not expected"),
        (
            {"outputs": {**PROTOCOL.outputs, "laterality": TensorSpec("float32", (None, 2))}},
            "output 'laterality' is missing among",
        ),
    ],
)
def test_check_names_what_differs_from_the_contract(client, monkeypatch, change, difference):
    other = {"protocol": replace(PROTOCOL, **change), "hemorrhage": HEMORRHAGE}
    monkeypatch.setattr(inference, "SIGNATURES", other)
    with pytest.raises(SignatureMismatch, match=difference) as raised:
        client.check()
    assert "model protocol version 1" in str(raised.value)


def test_check_of_a_model_with_another_number_of_findings_is_a_mismatch(models, tmp_path, monkeypatch):
    shutil.copytree(models / "contract", tmp_path / "models")
    server = serving(tmp_path / "models")
    fewer = replace(HEMORRHAGE, outputs={**HEMORRHAGE.outputs, "probability": TensorSpec("float32", (4,))})
    monkeypatch.setattr(inference, "SIGNATURES", {**signatures.SIGNATURES, "hemorrhage": fewer})
    try:
        eventually(lambda: not server.repository.missing())
        with (
            InferenceClient(f"127.0.0.1:{server.port}", deadline_s=60) as client,
            pytest.raises(SignatureMismatch, match=r"'probability' has shape \[5\] instead of \[4\]"),
        ):
            client.check()
    finally:
        server.stop()
