"""Horovod's TensorFlow module: Keras 3's variables, XLA, types and errors."""

from __future__ import annotations

import keras
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("these variables are TensorFlow's", allow_module_level=True)

import tensorflow as tf

trap = pytest.mark.trap


@pytest.fixture(scope="module")
def hvd(face):
    return face("tensorflow")


def model(seed=3):
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])


def gradients(hvd, net):
    """Return averaged gradients of what differs between the ranks."""
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(net(tf.fill([2, 2], hvd.rank() + 1.0)))
    return hvd.DistributedGradientTape(tape).gradient(loss, net.trainable_variables)


@trap(1, AttributeError, "has no attribute 'ref'")
def test_keras_variables_in_a_tape(hvd, assert_replicas):
    grads = gradients(hvd, model())
    assert_replicas(*grads)
    assert grads[0].numpy().tolist() == [[3.0], [3.0]]


@trap(1, AttributeError, "has no attribute 'assign'")
def test_keras_variables_are_broadcast(hvd, assert_replicas):
    net = model(seed=hvd.rank())
    hvd.broadcast_variables(net.variables, root_rank=0)
    assert_replicas(*net.get_weights())


@trap(1, ValueError, "fused")
def test_batches_are_normalised_together(hvd, everyone):
    layer = hvd.SyncBatchNormalization(momentum=0.0)
    layer(tf.fill([2, 1], hvd.rank() + 1.0), training=True)
    assert everyone(float(layer.moving_mean[0])) == [1.5, 1.5]


@trap(14, tf.errors.InvalidArgumentError, "HorovodAllreduce")
def test_xla_is_refused_with_a_remedy(hvd):
    net = model()

    @tf.function(jit_compile=True)
    def step():
        variables = [tf.convert_to_tensor(v) for v in net.trainable_variables]
        return [hvd.allreduce(v, name=f"xla.{place}") for place, v in enumerate(variables)]

    with pytest.raises(ValueError, match="jit_compile=False"):
        step()


@trap(7, (TypeError, tf.errors.InvalidArgumentError), "bfloat16")
def test_bfloat16(hvd):
    tensor = tf.fill([2], tf.cast(hvd.rank() + 1.0, tf.bfloat16))
    mean = hvd.allreduce(tensor, name="bfloat16")
    assert mean.dtype == tf.bfloat16
    assert [float(each) for each in mean] == [1.5, 1.5]


@trap(9, AssertionError, "inf")
@pytest.mark.parametrize("compressed", [False, True], ids=["halves", "compressed"])
def test_the_mean_of_large_halves(hvd, compressed):
    large = tf.fill([2], tf.constant(60000.0, tf.float32 if compressed else tf.float16))
    options = {"compression": hvd.Compression.fp16} if compressed else {}
    mean = hvd.allreduce(large, name=f"large.{compressed}", **options)
    assert [float(each) for each in mean] == pytest.approx([60000.0] * 2, rel=1e-3)


@trap(5, AssertionError, "Mismatched ALLREDUCE tensor shapes: One rank sent a tensor of shape")
def test_different_tensors(hvd):
    with pytest.raises(Exception) as error:
        hvd.allreduce(tf.ones(2 + hvd.rank()), name="odd")
    for part in ("'odd'", "rank 0", "rank 1", "(2,)", "(3,)"):
        assert part in str(error.value), str(error.value)


@trap(17, AssertionError, r"\[0, 1\], \[0, 1\]")
def test_each_rank_sees_a_gpu_of_its_own(hvd, everyone, monkeypatch):
    # TensorFlow takes memory on every GPU that it sees. Shown is what init() asks it to show.
    gpus = [tf.config.PhysicalDevice(f"/physical_device:GPU:{i}", "GPU") for i in range(2)]
    seen = [gpus]
    hvd.shutdown()
    with monkeypatch.context() as patch:
        patch.setattr(tf.config, "list_physical_devices", lambda kind=None: gpus)
        patch.setattr(tf.config, "get_visible_devices", lambda kind=None: seen[-1])
        patch.setattr(tf.config, "set_visible_devices", lambda gpu, kind: seen.append([gpu]))
        hvd.init()
    assert everyone([gpus.index(gpu) for gpu in seen[-1]]) == [[0], [1]]
