"""What wrapping keeps, what it refuses, and what must not hang."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import zipfile

import cloudpickle
import keras
import numpy as np
import pytest

import hvdx

pytestmark = pytest.mark.ranks(2)
TORCH, TENSORFLOW = map(pytest.mark.backend, ("torch", "tensorflow"))
H5 = pytest.param("model.h5", marks=TORCH)  # what hvdx does with it is the same on both


class Own(keras.optimizers.SGD):
    """A user's optimizer, known to Keras by no name."""


@keras.saving.register_keras_serializable("tests")
class Registered(keras.optimizers.SGD):
    """A user's optimizer, known to Keras as ``tests>Registered``."""


def test_keeps_class_and_options(hvd):
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    for made in (
        keras.optimizers.AdamW(0.2, weight_decay=0.3),
        keras.optimizers.Adafactor(),
        keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()),
        Own(schedule, momentum=0.4),
        Registered(0.1),
    ):
        before, kind = keras.optimizers.serialize(made), type(made)
        wrapped = hvd.DistributedOptimizer(made)
        assert wrapped is made
        assert isinstance(wrapped, kind)
        assert type(wrapped).__name__ == kind.__name__
        assert keras.optimizers.serialize(wrapped) == before
        plain = wrapped.from_config(wrapped.get_config())
        assert not hasattr(plain, "communication_seconds")


def test_keeps_state(hvd, data, make_model, ways, farthest, exact):
    """Train alone, wrap, go on: the same as never having stopped."""
    batches = data("float64")
    early = [part[:2] for part in batches.whole]
    late = [part[2:] for part in batches.whole], [part[2:] for part in batches.shard]
    alone, together = make_model("float64"), make_model("float64")
    first, second = keras.optimizers.Adam(0.01), keras.optimizers.Adam(0.01)
    ways.loop(alone, first, early)
    ways.loop(together, second, early)
    variables = second.variables
    second = hvd.DistributedOptimizer(second)
    assert all(one is other for one, other in zip(second.variables, variables, strict=True))
    assert int(second.iterations) == 2
    ways.loop(alone, first, late[0])
    ways.loop(together, second, late[1])
    assert int(second.iterations) == 5
    assert farthest(alone, together) < exact


LOAD = """
import sys
sys.modules["hvdx"] = sys.modules["horovod"] = None  # as if they were not installed
import keras, numpy
if keras.backend.backend() == "torch":
    sys.modules["tensorflow"] = None
folder = sys.argv[1]
weights = numpy.load(f"{folder}/weights.npz")
for name in "model.keras", "model.h5":
    model = keras.models.load_model(f"{folder}/{name}")
    assert type(model.optimizer).__name__ == "Adam", type(model.optimizer)
    assert int(model.optimizer.iterations) == 5, int(model.optimizer.iterations)
    assert name == "model.h5" or len(model.optimizer.variables) == int(sys.argv[2])
    model.load_weights(f"{folder}/model.weights.h5")
    for own, saved in zip(model.get_weights(), weights.values(), strict=True):
        numpy.testing.assert_array_equal(own, saved)
if keras.backend.backend() == "tensorflow":
    import tensorflow
    exported = tensorflow.saved_model.load(f"{folder}/exported")
    x = numpy.ones((2, 6), "float32")
    numpy.testing.assert_allclose(exported.serve(x), model.predict(x, verbose=0), rtol=1e-5)
"""


def test_saved_model_loads_without_hvdx(hvd, data, make_model, ways, tmp_path):
    alone, together = make_model(), make_model()
    plain, wrapped = (keras.optimizers.Adam(name="adam") for _ in range(2))
    hvd.DistributedOptimizer(wrapped)
    for model, optimizer in ((alone, plain), (together, wrapped)):
        model.compile(optimizer, keras.losses.MeanSquaredError())  # h5 files know no "mse"
        ways.loop(model, optimizer, data().shard)
    assert [v.path for v in wrapped.variables] == [v.path for v in plain.variables]
    configs = []
    for name, model in (("plain", alone), ("model", together)):
        model.save(tmp_path / f"{name}.keras")
        with zipfile.ZipFile(tmp_path / f"{name}.keras") as archive:
            configs.append(json.loads(archive.read("config.json")))
    assert configs[0]["compile_config"]["optimizer"] == configs[1]["compile_config"]["optimizer"]
    if hvd.rank() == 0:
        together.save(tmp_path / "model.h5")
        together.save_weights(tmp_path / "model.weights.h5")
        np.savez(tmp_path / "weights.npz", *together.get_weights())
        if keras.backend.backend() == "tensorflow":
            together.export(tmp_path / "exported", verbose=False)
        command = [sys.executable, "-c", LOAD, str(tmp_path), str(len(wrapped.variables))]
        told = subprocess.run(command, capture_output=True, text=True, check=False)
        assert told.returncode == 0, told.stderr


def trained(model, optimizer, ways, data, path):
    model.compile(optimizer, keras.losses.MeanSquaredError())
    ways.loop(model, optimizer, data().shard)
    model.save(path)
    return model


@pytest.mark.parametrize("file", ["model.keras", H5])
def test_load_model_wraps(hvd, file, data, make_model, ways, tmp_path, assert_equal_replicas):
    path = tmp_path / file
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam())
    model = trained(make_model(), optimizer, ways, data, path)
    loaded = hvd.load_model(path)
    assert type(loaded.optimizer).__name__ == "Adam"
    for own, saved in zip(loaded.optimizer.variables(), model.optimizer.variables(), strict=True):
        np.testing.assert_array_equal(own.numpy(), saved.numpy())
    ways.loop(loaded, loaded.optimizer, data().shard)
    assert int(loaded.optimizer.iterations) == 10
    assert_equal_replicas(loaded)


@TORCH
def test_load_model_wraps_a_loss_scaler(
    hvd, data, make_model, ways, tmp_path, assert_equal_replicas
):
    scaler = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=1.0)
    path = tmp_path / "model.keras"
    trained(make_model(), hvd.DistributedOptimizer(scaler), ways, data, path)
    loaded = hvd.load_model(path, compression=hvd.Compression.fp16)
    assert isinstance(loaded.optimizer, keras.optimizers.LossScaleOptimizer)
    ways.loop(loaded, loaded.optimizer, data().shard)
    assert loaded.optimizer.communication_seconds > 0
    assert_equal_replicas(loaded)


@pytest.mark.parametrize("file", ["model.keras", H5])
def test_load_model_with_an_optimizer_of_ones_own(hvd, file, make_model, ways, data, tmp_path):
    path = tmp_path / file
    trained(make_model(), hvd.DistributedOptimizer(Own(0.1)), ways, data, path)

    def make(**config):
        return hvd.DistributedOptimizer(Own(**config))

    for options in (
        {"custom_optimizers": [Own]},
        {"custom_objects": {"Own": Own}},
        {"custom_objects": {"Own": make}},
        {"custom_objects": {"Own": lambda **config: Own(**config)}},
    ):
        loaded = hvd.load_model(path, **options)
        assert isinstance(loaded.optimizer, Own)
        assert loaded.optimizer.communication_seconds == 0.0


def test_copies(hvd, make_model, ways, data):
    """Copies of models hold plain optimizers, as files do."""
    model = make_model()
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse")
    ways.loop(model, model.optimizer, data().shard)
    copies = copy.deepcopy(model), cloudpickle.loads(cloudpickle.dumps(model))
    for copied, steps in ((copies[0], 5), (copies[1], 5), (keras.models.clone_model(model), 0)):
        assert type(copied.optimizer).__name__ == "SGD"
        assert not hasattr(copied.optimizer, "communication_seconds")
        assert int(copied.optimizer.iterations) == steps
        hvd.DistributedOptimizer(copied.optimizer)


def test_communication_seconds(hvd, data, make_model, ways):
    model, optimizer = make_model(), hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    assert optimizer.communication_seconds == 0.0
    ways.fit(model, optimizer, data().shard)
    seconds = optimizer.communication_seconds
    assert 0.0 < seconds < 60.0
    ways.loop(model, optimizer, data().shard)
    assert optimizer.communication_seconds > seconds
    assert len(optimizer.variables) == len(keras.optimizers.SGD(0.1).variables)


def test_refuses(hvd):
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    with pytest.raises(TypeError, match="already"):
        hvd.DistributedOptimizer(optimizer)
    with pytest.raises(TypeError, match="already"):
        hvd.DistributedOptimizer(keras.optimizers.LossScaleOptimizer(optimizer))
    with pytest.raises(TypeError, match="no keras"):
        hvd.DistributedOptimizer("adam")
    fresh = keras.optimizers.SGD(0.1)
    with pytest.raises(ValueError, match=r"unknown compression='zip'.*fp16"):
        hvd.DistributedOptimizer(fresh, compression="zip")
    with pytest.raises(ValueError, match="Adasum"):
        hvd.DistributedOptimizer(fresh, op=hvd.Adasum)
    with pytest.raises(ValueError, match="groups='a'"):
        hvd.DistributedOptimizer(fresh, groups="a")
    with pytest.raises(ValueError, match="backward_passes_per_step=0"):
        hvd.DistributedOptimizer(fresh, backward_passes_per_step=0)
    with pytest.raises(ValueError, match="accumulates already"):
        accumulating = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
        hvd.DistributedOptimizer(accumulating, backward_passes_per_step=4)
    with pytest.raises(ValueError, match="gradient_accumulation_steps=4"):
        built = keras.optimizers.SGD(0.1)
        built.build([keras.Variable(0.0)])
        hvd.DistributedOptimizer(built, backward_passes_per_step=4)
    with pytest.raises(ValueError, match="'dense' is no keras"):
        hvd.PartialDistributedOptimizer(fresh, local_layers=["dense"])
    hvd.DistributedOptimizer(fresh)  # none of these wrapped it


def test_keras_own_complaints_remain(hvd, make_model):
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    variables = make_model().trainable_variables
    with pytest.raises(ValueError, match="must already be built"):
        optimizer.apply([keras.ops.zeros(variables[0].shape)])
    with pytest.raises(ValueError, match="No gradients provided"):
        optimizer.apply([None] * len(variables), variables)


@pytest.mark.parametrize("way", ["fit", "loop"])
def test_different_models_are_an_error_everywhere(hvd, way, data, make_model, ways):
    model = make_model(width=8 + (hvd.rank() == hvd.size() - 1))
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    with pytest.raises(hvdx.MismatchError, match=r"(?s)float32 \(6, 8\).*float32 \(6, 9\)"):
        getattr(ways, way)(model, optimizer, data().shard)


def test_different_optimizers_are_an_error_everywhere(hvd, data, make_model, ways):
    kind = keras.optimizers.Adam if hvd.rank() == 0 else keras.optimizers.AdamW
    with pytest.raises(hvdx.MismatchError, match="AdamW"):
        ways.loop(make_model(), hvd.DistributedOptimizer(kind()), data().shard)
    rates = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1 * (1 + hvd.rank())))
    with pytest.raises(hvdx.MismatchError, match="learning_rate"):
        ways.loop(make_model(), rates, data().shard)


def test_gradient_missing_on_one_rank(hvd, make_model):
    variables = make_model().trainable_variables
    before = [keras.ops.convert_to_numpy(variable) for variable in variables]
    grads = [keras.ops.ones(variable.shape) for variable in variables]
    if hvd.rank() == 0:
        grads[1] = None
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))
    for _ in range(2):
        optimizer.apply(list(grads), variables)
    for place, (variable, old) in enumerate(zip(variables, before, strict=True)):
        mean = 1.0 if place != 1 else (hvd.size() - 1) / hvd.size()
        np.testing.assert_allclose(keras.ops.convert_to_numpy(variable), old - 2 * mean, atol=1e-5)


def test_gradient_missing_everywhere_leaves_the_variable_alone(hvd, make_model):
    # Weight decay acts on variables with a gradient only, so that zeros would be no gradient.
    variables = make_model().trainable_variables
    before = keras.ops.convert_to_numpy(variables[1])
    grads = [keras.ops.ones(variable.shape) for variable in variables]
    optimizer = hvd.DistributedOptimizer(keras.optimizers.AdamW(0.1, weight_decay=0.5))
    optimizer.apply([grads[0], None, *grads[2:]], variables)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(variables[1]), before)
    if hvd.rank() == 0:  # used later after all, by one rank
        optimizer.apply(grads, variables)
    else:
        optimizer.apply([grads[0], None, *grads[2:]], variables)
    assert (keras.ops.convert_to_numpy(variables[1]) != before).all()


def test_parts_of_the_variables(hvd, make_model, assert_equal_replicas):
    """Loops may update different variables in turn, as for two networks."""
    model = make_model()
    variables = model.trainable_variables
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))
    optimizer.build(variables)
    for part in (variables[:2], variables[2:], variables[:2]):
        optimizer.apply([keras.ops.ones(v.shape) * float(hvd.rank()) for v in part], part)
    assert_equal_replicas(model)


def test_two_optimizers(hvd, data, make_model, ways, assert_equal_replicas):
    one, other = make_model(seed=1), make_model(seed=2)
    optimizers = [hvd.DistributedOptimizer(keras.optimizers.Adam()) for _ in range(2)]
    for step in range(2):
        for model, optimizer in zip((one, other), optimizers, strict=True):
            ways.loop(model, optimizer, [part[step : step + 1] for part in data().shard])
    assert_equal_replicas(one)
    assert_equal_replicas(other)


def test_loss_scaling(hvd, data, make_model, ways, assert_equal_replicas):
    """An overflow on one rank is one on all: each skips the step and halves the scale."""
    model = make_model()
    scaler = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=8.0)
    optimizer = hvd.DistributedOptimizer(scaler)
    grads = [keras.ops.ones(v.shape) for v in model.trainable_variables]
    if hvd.rank() == 0:
        grads[0] = grads[0] * float("inf")
    before = model.get_weights()
    optimizer.apply(grads, model.trainable_variables)
    assert float(optimizer.dynamic_scale) == 4.0
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    ways.fit(model, optimizer, data().shard)
    assert int(optimizer.iterations) == 5
    assert_equal_replicas(model)


@pytest.mark.parametrize("way", ["fit", pytest.param("loop", marks=TORCH)])
def test_inside_a_loss_scaler(hvd, way, data, make_model, ways, farthest, assert_equal_replicas):
    """As ``compile`` puts one around the optimizer of a mixed_float16 model."""
    batches = data()
    alone, together = make_model(), make_model()
    ways.loop(alone, keras.optimizers.SGD(0.1), batches.whole)
    inner = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    scaler = keras.optimizers.LossScaleOptimizer(inner, initial_scale=1.0)
    before = keras.optimizers.serialize(scaler)
    getattr(ways, way)(together, scaler, batches.shard)
    assert keras.optimizers.serialize(scaler) == before
    assert farthest(alone, together) < 1e-6
    grads = [keras.ops.ones(v.shape) for v in together.trainable_variables]
    if hvd.rank() == 0:
        grads[0] = grads[0] * float("nan")
    scaler.apply(grads, together.trainable_variables)
    assert float(scaler.dynamic_scale) == 0.5
    assert farthest(alone, together) < 1e-6
    assert_equal_replicas(together)


def test_mixed_float16(hvd, assert_equal_replicas):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8), keras.layers.Dense(1)])
        model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam()), "mse")
    finally:
        keras.config.set_dtype_policy("float32")
    x = np.full((8, 6), 0.01 * (hvd.rank() + 1), "float32")
    if hvd.rank() == 0:
        x[4:] = 1e6  # the second step overflows on this rank
    model.fit(x, np.zeros((8, 1)), batch_size=4, shuffle=False, verbose=0)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert int(model.optimizer.iterations) == 1
    assert float(model.optimizer.dynamic_scale) == 2.0**14
    assert_equal_replicas(model)


@TENSORFLOW
def test_xla_as_the_default_is_left_out(hvd, data, make_model, ways, monkeypatch):
    import tensorflow as tf

    gpu = tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda *kind: [gpu])
    model = make_model()
    model.compile("sgd", "mse")
    assert model.jit_compile is True  # so Keras would choose, where it sees a GPU
    with pytest.warns(UserWarning, match="trains without it"):
        ways.fit(model, hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), data().shard)
    assert model.jit_compile is False


@TENSORFLOW
def test_xla_is_refused(hvd, data, make_model, ways):
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    with pytest.raises(ValueError, match="jit_compile=False"):
        ways.fit(make_model(), optimizer, data().shard, jit_compile=True)


@TORCH
def test_torch_compile(hvd, data, make_model, ways, farthest):
    # Adam's compiled step once ran past apply, and replicas drifted apart without a word.
    import torch

    batches = data()
    alone, together = make_model(), make_model()
    ways.loop(alone, keras.optimizers.Adam(0.01), batches.whole)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.01))
    optimizer.build(together.trainable_variables)

    @torch.compile(backend="eager")
    def update(grads):
        with torch.no_grad():
            optimizer.apply(grads, together.trainable_variables)

    for x, y in zip(*batches.shard, strict=True):
        update(ways.gradients(together, x, y))
    assert optimizer.communication_seconds > 0.0
    assert farthest(alone, together) < 1e-6


@TENSORFLOW  # Keras has it there only
def test_steps_per_execution(hvd, data, make_model, ways, farthest, exact):
    batches = data("float64")
    alone, together = make_model("float64"), make_model("float64")
    ways.loop(alone, keras.optimizers.Adam(), batches.whole)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam())
    ways.fit(together, optimizer, batches.shard, steps_per_execution=2)
    assert farthest(alone, together) < exact
