"""The generated messages and services of TensorFlow Serving; the one place in `serving` that imports them."""

from herald.tensorflow_stubs import without_tensorflow

with without_tensorflow():
    from tensorflow.core.protobuf import saved_model_pb2  # type: ignore[import-untyped]
    from tensorflow_serving.apis import (  # type: ignore[import-untyped]
        get_model_metadata_pb2,
        get_model_status_pb2,
        model_service_pb2_grpc,
        predict_pb2,
        prediction_service_pb2_grpc,
    )

__all__ = [
    "get_model_metadata_pb2",
    "get_model_status_pb2",
    "model_service_pb2_grpc",
    "predict_pb2",
    "prediction_service_pb2_grpc",
    "saved_model_pb2",
]
