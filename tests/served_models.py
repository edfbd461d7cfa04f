"""Small SavedModels for the tests of the model server and its client; run as a script, because it needs TensorFlow.

`python tests/served_models.py OUT` writes OUT/contract/{protocol,hemorrhage}/1, whose answers a test can compute by
hand, and OUT/spare/{sum-1,sum-2,unfit,two-signatures}, version folders that a test copies to where it wants them.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest


def build(base: Path) -> Path:
    """The folder of the models under `base`, written once by a process of its own: TensorFlow stays out of ours."""
    out = base / "served-models"
    if out.exists():
        return out
    done = subprocess.run([sys.executable, __file__, str(out)], capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.fail(f"the test models could not be built:\n{done.stderr[-2000:]}")
    return out


def eventually(condition: Callable[[], bool], within_s: float = 60.0) -> None:
    """Wait until something that another thread or process brings about is so."""
    deadline = time.monotonic() + within_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        pause.wait(0.02)


def _write(out: Path) -> None:
    import tensorflow as tf

    from herald.signatures import FINDINGS, HEADS

    class Protocol(tf.Module):
        """Softmax of the mean Hounsfield value over 100 times the class number."""

        @tf.function(input_signature=[tf.TensorSpec((None, 8, 256, 256), tf.int16, name="volume")])
        def serve(self, volume):
            mean = tf.reduce_mean(tf.cast(volume, tf.float32), axis=(1, 2, 3))[:, None] / 100
            return {
                head: tf.nn.softmax(mean * tf.range(len(labels), dtype=tf.float32)) for head, labels in HEADS.items()
            }

    class Hemorrhage(tf.Module):
        """Each slice answers with the highest of the five slices around it; the means of slices are smoothed."""

        @tf.function(input_signature=[tf.TensorSpec((None, None, None), tf.int16, name="volume")])
        def serve(self, volume):
            padded = tf.pad(tf.clip_by_value(tf.cast(volume, tf.float32) / 255, 0, 1), ((2, 2), (0, 0), (0, 0)))
            depth = tf.shape(volume)[0]
            around = tf.reduce_max(tf.stack([padded[i : i + depth] for i in range(5)]), axis=0)
            scale = tf.constant([1 / (1 + c) for c in range(len(FINDINGS))])
            voxels = around[..., None] * scale
            slices = tf.reduce_mean(voxels, axis=(1, 2))
            beside = tf.concat([slices[:1], slices, slices[-1:]], axis=0)
            slices = 0.25 * beside[:-2] + 0.5 * slices + 0.25 * beside[2:]
            return {
                "mask": tf.cast(tf.round(voxels * 255), tf.uint8),
                "slice_probability": slices,
                "probability": tf.reduce_max(slices, axis=0),
            }

    class Sum(tf.Module):
        """Two inputs and two outputs whose names are in no alphabetical order; `offset` tells versions apart."""

        def __init__(self, offset: float):
            super().__init__()
            self.offset = offset

        @tf.function(
            input_signature=[
                tf.TensorSpec((None, 3), tf.float32, name="x"),
                tf.TensorSpec((None, 3), tf.int16, name="a"),
            ]
        )
        def serve(self, x, a):
            total = x + tf.cast(a, tf.float32) + self.offset
            return {"total": total, "count": tf.cast(tf.fill(tf.shape(a)[:1], 3), tf.uint8)}

    class Unfit(tf.Module):
        """Takes volumes of seven by thirteen only."""

        @tf.function(input_signature=[tf.TensorSpec((None, None, None), tf.int16, name="volume")])
        def serve(self, volume):
            return {"probability": tf.reduce_sum(tf.reshape(tf.cast(volume, tf.float32), (-1, 7, 13)), axis=(1, 2))}

    class TwoSignatures(tf.Module):
        """Beyond OpenVINO: a second signature."""

        def __init__(self):
            super().__init__()
            self.factor = tf.Variable(2.0)

        @tf.function(input_signature=[tf.TensorSpec((None,), tf.float32, name="x")])
        def double(self, x):
            return {"y": x * self.factor}

        @tf.function(input_signature=[tf.TensorSpec((None,), tf.float32, name="x")])
        def square(self, x):
            return {"y": x * x}

    for model, path in (
        (Protocol(), out / "contract/protocol/1"),
        (Hemorrhage(), out / "contract/hemorrhage/1"),
        (Sum(0.0), out / "spare/sum-1"),
        (Sum(100.0), out / "spare/sum-2"),
        (Unfit(), out / "spare/unfit"),
    ):
        tf.saved_model.save(model, str(path), signatures={"serving_default": model.serve})
    two = TwoSignatures()
    tf.saved_model.save(
        two, str(out / "spare/two-signatures"), signatures={"serving_default": two.double, "square": two.square}
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    _write(Path(sys.argv[1]))
