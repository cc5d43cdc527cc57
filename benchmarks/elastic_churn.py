"""Elastic training with compression, while a rank is killed every few seconds.

    python benchmarks/elastic_churn.py --framework torch --minutes 3

Four ranks of ``hvdx run --min-np 3 --max-np 4`` train a classifier. Again and again one of them,
rank 0 too, is killed as soon as all are there; three go on, and a new one joins. With ``--least
2`` nobody waits for newcomers: one is killed every few seconds, of three ranks, too. Counted is, by
parameters that lose 1 with each sample trained on and are saved, restored and shared like all
others, that in every epoch each sample is trained on exactly once. The accuracy on held-out
samples is compared with that of as many epochs without a failure.

Exit status 1: a sample was lost or came twice, replicas differ, the job ended, or it learned less.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

SAMPLES, TEST, FEATURES, CLASSES, BATCH = 1023, 2000, 24, 6, 8
FRAMEWORKS = ("torch", "tape", "keras on tensorflow", "keras on torch")
TOLERANCE = 0.02  # of accuracy
PATIENCE = 300.0  # seconds without a step


# -- a rank


class Log:
    """Tells the driver how far training is, and does what it asks.

    Args:
        hvd: a face of hvdx.
        folder: where both sides write.
        pace: seconds that a step takes at least.
        epochs: to be trained; 0: until the driver says so.
    """

    def __init__(self, hvd: Any, folder: Path, pace: float, epochs: int) -> None:
        self._hvd = hvd
        self._folder = folder
        self._pace = pace
        self._epochs = epochs
        self._steps = 0
        self._began = 0.0
        self._pids: list[int] = []

    def begin(self) -> None:
        """Note who is there; on all ranks, at the start of every call of the function."""
        self._pids = self._hvd.allgather_object(os.getpid())
        self._steps = 0

    def step(self, epoch: int) -> None:
        """Note a step."""
        self._steps += 1
        if self._hvd.rank() == 0:
            world = int(os.environ["HVDX_WORLD"])
            told = {"pids": self._pids, "steps": self._steps, "epoch": epoch, "world": world}
            part = self._folder / "progress.part"
            part.write_text(json.dumps(told))
            part.rename(self._folder / "progress")
        time.sleep(max(0.0, self._began + self._pace - time.monotonic()))
        self._began = time.monotonic()

    def over(self, epoch: int) -> bool:
        """Tell, alike on all ranks, whether ``epoch`` epochs are enough."""
        if self._epochs:
            return epoch >= self._epochs
        asked = (self._folder / "stop").exists()
        return bool(self._hvd.broadcast_object(asked, root_rank=0))

    def finish(self, epoch: int, counts: Any, accuracy: float, parameters: Any) -> None:
        """Write the result, on rank 0."""
        hashes = self._hvd.allgather_object(self._hvd.parameter_hash(parameters))
        if self._hvd.rank() == 0:
            told = {"epochs": epoch, "accuracy": accuracy, "same": len(set(hashes)) == 1}
            told["wrong"] = sum(abs(float(count) + epoch) > 1e-3 for count in counts)
            (self._folder / "result").write_text(json.dumps(told))


def task() -> tuple[Any, Any, Any, Any]:
    """Return samples and labels to train on, and others; a teacher network's."""
    import numpy as np

    draw = np.random.default_rng(3)
    x = draw.normal(size=(SAMPLES + TEST, FEATURES)).astype("float32")
    hidden = np.tanh(x @ draw.normal(size=(FEATURES, 32)) / 3)
    y = (hidden @ draw.normal(size=(32, CLASSES))).argmax(1)
    return x[:SAMPLES], y[:SAMPLES], x[SAMPLES:], y[SAMPLES:]


def train_torch(log_of: Any) -> None:
    """Train with PyTorch."""
    import torch

    import hvdx.torch as hvd

    torch.manual_seed(os.getpid())
    torch.set_num_threads(1)
    x, y, test_x, test_y = map(torch.as_tensor, task())
    model = torch.nn.Sequential(
        torch.nn.Linear(FEATURES, 64), torch.nn.ReLU(), torch.nn.Linear(64, CLASSES)
    )
    counts = torch.nn.Embedding(SAMPLES, 1)
    torch.nn.init.zeros_(counts.weight)
    hvd.init()  # from here on others wait for this rank
    log = log_of(hvd)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    compression = hvd.Compression.onebit(min_elements=0)
    optimizer = hvd.DistributedOptimizer(optimizer, model, compression=compression)
    counter = torch.optim.SGD(counts.parameters(), 1.0)
    counter = hvd.DistributedOptimizer(counter, counts, op=hvd.Sum)
    batches = hvd.DistributedBatchSampler(range(SAMPLES), BATCH)

    @hvd.elastic.run
    def train(state: Any) -> None:
        log.begin()
        while not log.over(state.epoch):
            for step, own in enumerate(batches):
                optimizer.zero_grad()
                counter.zero_grad()
                torch.nn.functional.cross_entropy(model(x[own]), y[own]).backward()
                counts(torch.tensor(own)).sum().backward()
                optimizer.step()
                counter.step()
                batches.record_batch(step)
                log.step(state.epoch)
                if step % 3 == 2 and step + 1 < len(state.batches):
                    state.commit()
            state.epoch += 1
            state.commit()

    state = hvd.elastic.TorchState(
        model, optimizer, counts=counts, counter=counter, batches=batches, epoch=0
    )
    train(state)
    with torch.no_grad():
        accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
    log.finish(state.epoch, counts.weight.detach().flatten().tolist(), accuracy, model)


def train_tape(log_of: Any) -> None:
    """Train with TensorFlow, in a loop of one's own."""
    import numpy as np
    import tensorflow as tf

    import hvdx.tensorflow as hvd
    from hvdx.data import Place, Progress, Steps, step_sizes

    x, y, test_x, test_y = task()
    hvd.init()
    log = log_of(hvd)
    draw = np.random.default_rng(hvd.rank())
    shapes = [(FEATURES, 64), (64,), (64, CLASSES), (CLASSES,)]
    weights = [
        tf.Variable((draw.normal(size=shape) * len(shape) / 10).astype("float32"))
        for shape in shapes
    ]
    moments = [tf.Variable(tf.zeros(shape)) for shape in shapes]
    counts = tf.Variable(tf.zeros(SAMPLES))
    compression = hvd.Compression.onebit(min_elements=0)

    def logits(inputs: Any) -> Any:
        return tf.nn.relu(inputs @ weights[0] + weights[1]) @ weights[2] + weights[3]

    @tf.function(reduce_retracing=True)
    def learn(inputs: Any, labels: Any, own: Any) -> None:
        with tf.GradientTape() as tape:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits(inputs))
            loss = tf.reduce_mean(losses)
        tape = hvd.DistributedGradientTape(tape, compression=compression)
        for weight, moment, grad in zip(
            weights, moments, tape.gradient(loss, weights), strict=True
        ):
            moment.assign(0.9 * moment + grad)
            weight.assign_sub(0.02 * moment)
        seen = tf.math.bincount(own, minlength=SAMPLES, dtype=tf.float32)
        counts.assign_sub(hvd.allreduce(seen, op=hvd.Sum, name="seen"))

    @hvd.elastic.run
    def train(state: Any) -> None:
        log.begin()
        while not log.over(state.epoch):
            place = Place.of()
            left = state.progress.begin(SAMPLES, place.ranks, True)
            sizes = step_sizes(len(left), place.ranks, BATCH)
            steps = Steps(left, sizes, place)
            for step in range(len(steps)):
                own, _ = steps[step]
                learn(x[own], y[own], own.astype("int32"))
                state.progress.give(sizes[step])
                log.step(state.epoch)
                if step % 3 == 2 and step + 1 < len(steps):
                    state.commit()
            state.epoch += 1
            state.commit()

    class Standing(Progress):
        def load_state_dict(self, state: Any, samples: int = SAMPLES) -> None:
            super().load_state_dict(state, samples)

    state = hvd.elastic.TensorFlowState([*weights, *moments, counts], progress=Standing(), epoch=0)
    train(state)
    accuracy = float(np.mean(logits(test_x).numpy().argmax(1) == test_y))
    log.finish(state.epoch, counts.numpy(), accuracy, weights)


def train_keras(log_of: Any) -> None:
    """Train with Keras' fit."""
    import keras
    import numpy as np

    import hvdx.keras as hvd

    x, y, test_x, test_y = task()
    hvd.init()
    log = log_of(hvd)
    keras.utils.set_random_seed(hvd.rank())
    numbered = np.concatenate([x, np.arange(SAMPLES, dtype="float32")[:, None]], 1)
    data = hvd.DistributedDataset(numbered, y, batch_size=BATCH)
    inputs = keras.Input((FEATURES + 1,))
    hidden = keras.layers.Dense(64, activation="relu")(inputs[:, :-1])
    model = keras.Model(inputs, keras.layers.Dense(CLASSES)(hidden))
    optimizer = keras.optimizers.SGD(0.02, momentum=0.9)
    compression = hvd.Compression.onebit(min_elements=0)
    optimizer = hvd.DistributedOptimizer(optimizer, compression=compression)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    counts = np.zeros(SAMPLES)

    class Count(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            own = data[batch][0][:, -1].astype(int)
            for part in hvd.allgather_object(own):
                np.subtract.at(state.counts, part, 1)
            log.step(state.epoch)

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if log.over(state.epoch + 1):
                self.model.stop_training = True

    @hvd.elastic.run
    def train(state: Any) -> None:
        log.begin()
        if log.over(state.epoch):
            return
        callbacks = [
            Count(),
            hvd.elastic.UpdateBatchStateCallback(state),
            hvd.elastic.UpdateEpochStateCallback(state),
            hvd.elastic.CommitStateCallback(state, batches_per_commit=3),
        ]
        state.model.fit(state.data, epochs=10**6, verbose=0, callbacks=callbacks)

    state = hvd.elastic.KerasState(model, data=data, batch=0, epoch=0, counts=counts)
    train(state)
    padded = np.concatenate([test_x, np.zeros((TEST, 1), "float32")], 1)
    told = keras.ops.convert_to_numpy(model(padded)).argmax(1)
    log.finish(state.epoch, state.counts, float(np.mean(told == test_y)), model)


# -- the driver


class Kill(NamedTuple):
    """A rank that was killed."""

    rank: int
    of: int
    seconds: float  # until others trained again


class Churn:
    """One job, and its killer.

    Args:
        options: of the command line.
        folder: for the ranks' words.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options = options
        self._folder = folder
        self._draw = random.Random(options.seed)

    def run(self, *, epochs: int = 0) -> dict[str, Any]:
        """Run the job: for ``epochs`` undisturbed, or under fire; return its result.

        Raises:
            RuntimeError: it has failed; the message has what it said.
        """
        options = self._options
        kind = [options.framework, str(0.0 if epochs else options.pace), str(epochs)]
        least = options.ranks if epochs else options.least
        command = [sys.executable, "-m", "hvdx", "run", "--verbose", "-np", str(options.ranks)]
        command += ["--min-np", str(least), "--max-np", str(options.ranks)]
        command += ["--blacklist-cooldown-range", "1", "1", "--", sys.executable, __file__]
        backend = {"KERAS_BACKEND": options.framework.split()[-1]} if " " in kind[0] else {}
        environ = {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", **os.environ, **backend}
        with (self._folder / "said").open("w+") as said:
            job = subprocess.Popen(
                [*command, "--rank", str(self._folder), *kind],
                stdout=said,
                stderr=subprocess.STDOUT,
                env=environ,
            )
            try:
                kills = [] if epochs else self._fire(job)
                code = job.wait(PATIENCE)
            finally:
                job.terminate()
                job.wait()
            said.seek(0)
            told = said.read()
        if code or not (self._folder / "result").exists():
            raise RuntimeError(f"the job ended with {code}:\n{told[-6000:]}")
        if options.verbose:
            print(told)
        return {**json.loads((self._folder / "result").read_text()), "kills": kills}

    def _fire(self, job: subprocess.Popen[bytes]) -> list[Kill]:
        """Kill ranks until it is enough; return which."""
        options = self._options
        kills: list[Kill] = []
        end = time.monotonic() + 60 * options.minutes
        last = heard = time.monotonic()
        before = ""
        while job.poll() is None:
            time.sleep(0.05)
            now = time.monotonic()
            told = self._progress()
            if (text := json.dumps(told)) != before:
                before, heard = text, now
            elif now - heard > PATIENCE:
                raise RuntimeError(f"no step for {PATIENCE:.0f} s")
            enough = len(kills) >= options.kills if options.kills else now > end
            there, under_way = len(told["pids"]), told["steps"] > 2
            if enough and under_way and there == options.ranks:
                (self._folder / "stop").touch()
                return kills
            if enough or not under_way or there <= options.least or now < last + options.every:
                continue
            if self._world() == told["world"]:  # else ranks connect, and Horovod ends all of them
                rank = self._draw.randrange(there)
                os.kill(told["pids"][rank], signal.SIGKILL)
                kills.append(Kill(rank, there, self._recovered(job, told["pids"])))
                last = time.monotonic()
        return kills

    def _world(self) -> int:
        """Return the number of the last world that the launcher has made."""
        found = re.findall(r"hvdx run: world (\d+) has", (self._folder / "said").read_text())
        return int(found[-1])

    def _recovered(self, job: subprocess.Popen[bytes], pids: list[int]) -> float:
        """Wait until others than these train; return how long that took."""
        began = time.monotonic()
        while self._progress()["pids"] == pids and job.poll() is None:
            if time.monotonic() > began + PATIENCE:
                raise RuntimeError(f"no step for {PATIENCE:.0f} s after a kill")
            time.sleep(0.02)
        return time.monotonic() - began

    def _progress(self) -> dict[str, Any]:
        path = self._folder / "progress"
        return json.loads(path.read_text()) if path.exists() else {"pids": [], "steps": 0}


def measure(options: argparse.Namespace) -> bool:
    """Run one framework's jobs and print what came of it; return whether all is well."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        churned = Churn(options, Path(folder)).run()
    seconds = time.monotonic() - began
    good = churned["same"] and not churned["wrong"]
    against = ""
    if not options.exact_only:
        with tempfile.TemporaryDirectory() as folder:
            calm = Churn(options, Path(folder)).run(epochs=churned["epochs"])
        good &= churned["accuracy"] >= calm["accuracy"] - TOLERANCE and not calm["wrong"]
        against = f" (undisturbed {calm['accuracy']:.3f})"
    kills = churned["kills"]
    sizes = sorted({kill.of for kill in kills}, reverse=True)
    each = ", ".join(f"{sum(kill.of == size for kill in kills)} of {size}" for size in sizes)
    waits = sorted(kill.seconds for kill in kills) or [0.0]
    print(
        f"{options.framework:20} {seconds:5.0f} s  {len(kills)} kills ({each} ranks; rank 0: "
        f"{sum(kill.rank == 0 for kill in kills)})  others train again in "
        f"{statistics.median(waits):.1f} s, at most {waits[-1]:.1f} s  "
        f"{churned['epochs']} epochs of {SAMPLES} samples  "
        f"lost or twice: {churned['wrong']}  replicas equal: {churned['same']}  "
        f"accuracy {churned['accuracy']:.3f}{against}  "
        f"{'ok' if good else 'FAILED'}",
        flush=True,
    )
    return good


def main() -> int:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--framework", choices=FRAMEWORKS, action="append")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--kills", type=int, help="end after so many, not by time")
    parser.add_argument(
        "--every", type=float, default=5.0, help="seconds from the recovery to the next kill"
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--least", type=int, default=3, help="--min-np: fewer are never left")
    parser.add_argument("--pace", type=float, default=0.02, help="seconds for a step, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="torch, two kills")
    parser.add_argument("--exact-only", action="store_true", help="compare no accuracy")
    parser.add_argument("--verbose", action="store_true", help="print what the job said")
    options = parser.parse_args()
    chosen = options.framework or list(FRAMEWORKS)
    if options.short:
        options.kills, options.every = options.kills or 2, 0.5
        chosen = options.framework or ["torch"]
    good = [measure(argparse.Namespace(**{**vars(options), "framework": f})) for f in chosen]
    return 0 if all(good) else 1


def rank_main(folder: str, framework: str, pace: str, epochs: str) -> None:
    """Train, as one rank."""

    def log_of(hvd: Any) -> Log:
        return Log(hvd, Path(folder), float(pace), int(epochs))

    {"torch": train_torch, "tape": train_tape}.get(framework, train_keras)(log_of)


if __name__ == "__main__":
    if "--rank" in sys.argv:
        rank_main(*sys.argv[sys.argv.index("--rank") + 1 :])
        sys.exit(0)
    sys.exit(main())
