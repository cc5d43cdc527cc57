"""How fast pipelines are: schedules against theory and PyTorch's own, computing, hops, plans.

    python benchmarks/pipeline.py --json pipeline.json
    python benchmarks/pipeline.py --part hops --part compute

Each part is a job of its own, of less than four minutes; within it all variants take turns in
changing order. Behind the table stands which bars are met. Times are medians, and a row
"least of .." beside them tells how much of that other work on the machine has caused: the bars are
for a machine with two idle cores.

    sleep-10, sleep-3  4 ranks, stages that only sleep, 10 ms or 3 ms for each of F, I and W, hops
                       of 64 KB, 8 micro-batches: a step over the schedule's theory, and against
                       torch.distributed.pipelining over Gloo
    live               what ranks keep at most: micro-batches, counted, and their bytes
    compute            MLP 8x1024, batch 256, 8 micro-batches: 2 ranks with a thread each
    local              the same with two "cpu" stages in one process
    hops               one-way latency of a channel, tensors in and out
    torch, keras       what the engine adds to an op
    plans              predicted and measured steps of 14 plans, and the one that "auto" takes
"""

from __future__ import annotations

import functools
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import harness

RANKS, MICRO_BATCHES = 4, 8  # of the parts that sleep
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb1p", "zbv")
HOPS = {4 << 10: 60.0, 256 << 10: 120.0, 4 << 20: 1500.0}  # bytes: bar in microseconds
HIDDEN, LAYERS, BATCH = 1024, 8, 256  # of the parts that compute
APART = "2 processes, each all of it"  # side by side: what two cores share costs them, too
Rows = list[harness.Row]


def against_bar(
    case: str, metric: str, samples: Sequence[float], bar: float, *, higher: bool = False
) -> harness.Row:
    """Return a row with the median of ``samples`` and whether it keeps to ``bar``."""
    value = statistics.median(samples)
    ratio = value / bar if higher else harness.within(bar, value)
    return harness.Row(
        case, metric, value, "bar", bar, ratio, len(samples), harness.spread(list(samples))
    )


def report_only(case: str, metric: str, value: float, runs: int = 1) -> harness.Row:
    """Return a row that is compared with nothing."""
    return harness.Row(case, metric, value, "", value, 1.0, runs, 0.0)


# --- stages that sleep


def sleepers(count: int, seconds: float) -> Any:
    """Return a model of ``count`` stages, whose F, I and W each sleep.

    The first one's input depends on a parameter, or there would be no I in its stage.
    """
    import torch
    from torch import nn

    class Sleep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, before: float) -> Any:
            time.sleep(before)
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            time.sleep(seconds)
            return gradient, None

    class Sleeper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: Any) -> Any:
            return Sleep.apply(x, seconds) + Sleep.apply(self.weight, 0.0)

    class Enter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: Any) -> Any:
            return x + self.weight

    return nn.Sequential(Enter(), *(Sleeper() for _ in range(count)))


def mean(output: Any, target: Any) -> Any:
    """Return a loss that costs nothing."""
    return output.mean()


def sleep(seconds: float, bar: float, runs: int) -> Rows:
    """Measure all schedules, hvdx's and torch's, in one job."""
    import torch

    import hvdx as hvd

    case = f"{RANKS} ranks sleep {seconds * 1e3:g} ms"
    x = torch.zeros(16 * MICRO_BATCHES, 1024)  # 64 KB in a micro-batch
    pipes, variants, theory = {}, {}, {}
    for name in SCHEDULES:
        order = ideal(name)
        theory[name] = simulated(order, seconds)
        pipe = hvd.Pipeline(
            sleepers(order.stages, seconds), x, loss=mean, micro_batches=MICRO_BATCHES,
            stages=[2] + [1] * (order.stages - 1), schedule=name,
            by="time" if name == "zbv" else "params",  # its order is made for measured times
        )  # fmt: skip
        theirs = of_torch(name, order.place, seconds, x)
        pipes[name] = pipe
        for step in (functools.partial(pipe.step, x, x), theirs):
            step()  # torch exchanges shapes in its first step
        variants[name] = functools.partial(harness.slowest, functools.partial(pipe.step, x, x))
        variants[f"torch {name}"] = functools.partial(harness.slowest, theirs)
    samples = harness.interleave(variants, runs)
    rows = []
    for name in SCHEDULES:
        over = [ms / theory[name] for ms in samples[name]]
        pair = {key: samples[key] for key in (name, f"torch {name}")}
        ops = simulated(pipes[name]._order(len(x), True), None, spans(pipes[name], runs))
        rows += [
            against_bar(case, f"{name}, over {theory[name]:.0f} ms of theory", over, bar),
            report_only(case, f"{name}, least of that", min(over), runs),
            report_only(case, f"{name}, over theory with the ops' measured times",
                        statistics.median(samples[name]) / ops, runs),
            *harness.compare(case, f"{name}, step ms", pair, ours=name),
        ]  # fmt: skip
        ratio = [t / o for t, o in zip(pair[f"torch {name}"], pair[name], strict=True)]
        rows.append(against_bar(case, f"{name}, torch's step over ours", ratio, 1.0, higher=True))
    return rows


def ideal(name: str) -> Any:
    """Return the schedule ``name`` for equal times and free hops."""
    from hvdx.pipeline.plan import schedule_of

    return schedule_of(name, RANKS, MICRO_BATCHES)


def simulated(order: Any, seconds: float | None, taken: Any = None) -> float:
    """Return milliseconds of a step without hops: of equal ops, or such as were measured."""
    from hvdx.pipeline.simulator import Times, simulate

    if seconds is not None:
        return simulate(order, Times.equal(order.stages, *[seconds] * 3)).step * 1e3
    parts = [[taken.get((kind, s), 0.0) for s in range(order.stages)] for kind in "FBIW"]
    forward, both, inputs, weights = parts
    inputs = [b + i for b, i in zip(both, inputs, strict=True)]
    hops = (0.0,) * (order.stages - 1)
    return simulate(order, Times(tuple(forward), tuple(inputs), tuple(weights), hops)).step * 1e3


def spans(pipe: Any, steps: int) -> dict[tuple[str, int], float]:
    """Return by kind and stage the median seconds of an op, of all ranks."""
    import hvdx as hvd

    found: dict[tuple[str, int], list[float]] = {}
    for _, _, rows in list(pipe._measured)[-steps:]:
        for action, start, end in itertools.chain(*rows):
            found.setdefault((action.kind, action.stage), []).append(end - start)
    own = {key: statistics.median(each) for key, each in found.items()}
    return {key: value for each in hvd.allgather_object(own) for key, value in each.items()}


def of_torch(name: str, place: Sequence[int], seconds: float, x: Any) -> Callable[[], object]:
    """Return a step of ``torch.distributed.pipelining`` under the same schedule."""
    import torch
    from torch import nn
    from torch.distributed import pipelining

    import hvdx as hvd

    layers = list(sleepers(len(place), seconds))
    parts = [nn.Sequential(*layers[:2]), *layers[2:]]
    stages = [
        pipelining.PipelineStage(parts[number], number, len(place), torch.device("cpu"))
        for number, rank in enumerate(place) if rank == hvd.rank()
    ]  # fmt: skip
    kind = {
        "gpipe": pipelining.ScheduleGPipe,
        "1f1b": pipelining.Schedule1F1B,
        "interleaved": pipelining.ScheduleInterleaved1F1B,
        "zb1p": pipelining.ScheduleInterleavedZeroBubble,  # which is zb1p with one stage a rank
        "zbv": pipelining.ScheduleZBVZeroBubble,
    }[name]
    single = name in ("gpipe", "1f1b")
    loss = functools.partial(mean)
    schedule: Any = kind(stages[0] if single else stages, MICRO_BATCHES, loss_fn=loss)
    given = [x] if place[0] == hvd.rank() else []
    target = {"target": x} if place[-1] == hvd.rank() else {}
    return lambda: schedule.step(*given, **target)


# --- what ranks keep


class Ledger:
    """Counts what a rank's stages keep for backward, at most.

    Attributes:
        micro_batches: of all its stages.
        bytes: that autograd has saved, parameters left out.
        one: bytes that a micro-batch of one stage takes, at most.
    """

    def __init__(self, pipe: Any) -> None:
        self._stages = list(pipe._stages.values())
        self._weights = {p.data_ptr() for p in pipe._graph.model.parameters()}
        self.micro_batches = self.bytes = self.one = self._now = 0
        for stage in self._stages:
            stage.forward = functools.partial(self._watch, stage.forward)

    def _watch(self, forward: Callable[..., Any], *given: Any) -> Any:
        before = self._now
        made = forward(*given)
        self.one = max(self.one, self._now - before)
        self.micro_batches = max(self.micro_batches, sum(len(s._kept) for s in self._stages))
        self.bytes = max(self.bytes, self._now)
        return made

    def step(self, pipe: Any, x: Any, y: Any) -> None:
        """Run a step and count."""
        import torch

        ledger = self

        class Held:
            def __init__(self, tensor: Any) -> None:
                self.tensor = tensor
                counts = tensor.data_ptr() not in ledger._weights
                self.size = tensor.numel() * tensor.element_size() * counts
                ledger._now += self.size

            def __del__(self) -> None:
                ledger._now -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            pipe.step(x, y)


def live(runs: int) -> Rows:
    """Compare what each rank keeps with what the schedule promises."""
    import torch
    from torch import nn

    import hvdx as hvd
    from hvdx.pipeline.schedule import peak_live_of_ranks

    x = torch.randn(16 * MICRO_BATCHES, 256)
    rows = []
    for name in (*SCHEDULES, "1f1b-slack"):
        order = ideal(name)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.ReLU())
                                for _ in range(2 * RANKS)))  # fmt: skip
        pipe = hvd.Pipeline(model, x, loss=nn.functional.mse_loss, schedule=name,
                            micro_batches=MICRO_BATCHES)  # fmt: skip
        ledger = Ledger(pipe)
        for _ in range(runs):
            ledger.step(pipe, x, x)
        own = ledger.micro_batches, ledger.bytes / ledger.one
        promised = peak_live_of_ranks(order)
        counts, sizes = zip(*hvd.allgather_object(own), strict=True)
        rows += [
            harness.Row(f"{name}, rank {rank}", "micro-batches of stages kept", count, "promised",
                        right, right / count, runs, 0.0)
            for rank, (count, right) in enumerate(zip(counts, promised, strict=True))
        ]  # fmt: skip
        case = f"{name}, the worst of {RANKS} ranks"
        for what, found, bar in (("micro-batches", counts, 1.0), ("bytes", sizes, 1.01)):
            most = max(f / right for f, right in zip(found, promised, strict=True))
            rows.append(against_bar(case, f"{what} kept, over promised", [most], bar))
        pipe.close()
    return rows


# --- computing


def mlp() -> Any:
    """Return the model of the parts that compute."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.ReLU()) for _ in range(LAYERS)]
    return nn.Sequential(*layers)


def sgd(params: Any) -> Any:
    """Return the optimizer of the parts that compute."""
    import torch

    return torch.optim.SGD(params, lr=1e-3)


class Whole:
    """The model in one process, with gradients summed over ``pieces`` of the batch."""

    def __init__(self, pieces: int, threads: int = 1) -> None:
        self._model, self._pieces, self._threads = mlp(), pieces, threads
        self._optimizer = sgd(self._model.parameters())

    def step(self, x: Any, y: Any) -> None:
        """Train on a batch."""
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        self._optimizer.zero_grad(set_to_none=True)
        for each, target in zip(x.chunk(self._pieces), y.chunk(self._pieces), strict=True):
            loss = torch.nn.functional.mse_loss(self._model(each), target)
            (loss / self._pieces).backward()
        self._optimizer.step()
        torch.set_num_threads(before)


def compute(runs: int) -> Rows:
    """Compare two ranks with one process."""
    import torch

    import hvdx as hvd

    x = torch.randn(BATCH, HIDDEN)
    loss = torch.nn.functional.mse_loss
    auto = hvd.Pipeline(mlp(), x, loss, sgd, micro_batches=MICRO_BATCHES, schedule="auto")
    steps: dict[str, Callable[..., object]] = {
        "1f1b": hvd.Pipeline(mlp(), x, loss, sgd, micro_batches=MICRO_BATCHES).step,
        f"auto ({auto.plan.schedule})": auto.step,
        "1 process": Whole(MICRO_BATCHES).step,
        "1 process, 2 threads": Whole(MICRO_BATCHES, 2).step,
        "1 process, whole batch": Whole(1).step,
        "1 process, whole batch, 2 threads": Whole(1, 2).step,
        APART: Whole(MICRO_BATCHES).step,
    }

    def variant(name: str) -> float:
        idle = name.startswith("1 process") and hvd.rank() > 0
        return harness.slowest(lambda: None if idle else steps[name](x, x))

    for name in steps:
        variant(name)
    samples = harness.interleave({name: functools.partial(variant, name) for name in steps}, runs)
    return speeds("MLP 8x1024, 2 ranks x 1 thread", samples, 1.55)


def speeds(case: str, samples: dict[str, list[float]], bar: float) -> Rows:
    """Compare pipelines with one process."""
    ours = [name for name in samples if name != APART and not name.startswith("1 process")]
    alone = [name for name in samples if name.startswith("1 process")]
    rows = []
    if APART in samples:
        both = [2 * t / o for t, o in zip(samples[alone[0]], samples[APART], strict=True)]
        rows.append(
            report_only(
                case,
                "what 2 processes without a word do, times 1",
                statistics.median(both),
                len(both),
            )
        )
    for name, other in itertools.product(ours, alone):
        rows += harness.compare(
            case, f"{name}, step ms", {name: samples[name], other: samples[other]}, ours=name
        )
    for name in ours:
        ratio = [t / o for t, o in zip(samples[alone[0]], samples[name], strict=True)]
        least = min(samples[alone[0]]) / min(samples[name])
        rows += [
            against_bar(case, f"{name}, times quicker than 1 process", ratio, bar, higher=True),
            report_only(case, f"{name}, the same of the least times", least, len(ratio)),
        ]
    return rows


def local(runs: int) -> Rows:
    """Compare two stages in one process, a thread each, with the plain model."""
    import torch

    import hvdx as hvd

    torch.set_num_threads(1)
    x = torch.randn(BATCH, HIDDEN)
    loss = torch.nn.functional.mse_loss
    pipe = hvd.Pipeline(mlp(), x, loss, sgd, micro_batches=MICRO_BATCHES, place=["cpu", "cpu"])
    steps = {"1f1b": pipe.step, "1 process": Whole(MICRO_BATCHES).step}

    def variant(name: str) -> float:
        start = time.perf_counter()
        steps[name](x, x)
        return (time.perf_counter() - start) * 1e3

    for name in [*steps] * 3:
        variant(name)
    samples = harness.interleave({name: functools.partial(variant, name) for name in steps}, runs)
    return speeds("MLP 8x1024, 2 cpu stages in a process", samples, 1.4)


# --- hops


def hops(runs: int) -> Rows:
    """Send there and back through the channel of a pipeline, and through Gloo."""
    import torch
    import torch.distributed as dist

    import hvdx as hvd
    from hvdx.integrations.pytorch_channel import TorchCodec
    from hvdx.pipeline.channel import Key
    from hvdx.pipeline.zmq_channel import ZmqChannel

    rank = hvd.rank()
    channel = ZmqChannel(range(2), rank, hvd.allgather_object, TorchCodec())
    numbers = itertools.count()

    def zmq(tensor: Any) -> None:
        k = next(numbers)
        there, back = Key("F", 0, 1, k), Key("B", 0, 0, k)
        if rank == 0:
            channel.put(there, [tensor])
            channel.get(back)
        else:
            channel.put(back, channel.get(there))

    def gloo(tensor: Any) -> None:
        if rank == 0:
            dist.send(tensor, 1)
            dist.recv(torch.empty_like(tensor), 1)
        else:
            arrived = torch.empty_like(tensor)
            dist.recv(arrived, 0)
            dist.send(arrived, 0)

    def one_way(post: Callable[[Any], None], tensor: Any, rounds: int) -> float:
        dist.barrier()
        taken = []
        for _ in range(rounds):
            start = time.perf_counter()
            post(tensor)
            taken.append(time.perf_counter() - start)
        return statistics.median(taken) / 2 * 1e6

    rows = []
    for size, bar in HOPS.items():
        tensor = torch.zeros(size // 4)
        rounds = 10 if size > 1 << 20 else 40
        case = f"hop of {size >> 10} KB"
        samples = harness.interleave(
            {"hvdx": functools.partial(one_way, zmq, tensor, rounds),
             "gloo": functools.partial(one_way, gloo, tensor, rounds)},
            runs,
        )  # fmt: skip
        rows += [
            against_bar(case, "us one-way", samples["hvdx"], bar),
            report_only(case, "least of that", min(samples["hvdx"]), runs),
            *harness.compare(case, "us one-way", samples),
        ]
    channel.close()
    return rows


# --- what the engine adds


ALONE = ",".join(  # four stages on one rank
    f"{stage}{kind}{k}"
    for k in range(16)
    for kind, order in (("F", (0, 1, 2, 3)), ("B", (3, 2, 1, 0)))
    for stage in order
)


def added(case: str, bar: float, samples: dict[str, list[float]]) -> Rows:
    """Return what an op takes more of a core than in plain training, in microseconds."""
    ops = ALONE.count(",") + 1
    more = [(o - t) / ops * 1e6 for o, t in zip(samples["hvdx"], samples["plain"], strict=True)]
    least = (min(samples["hvdx"]) - min(samples["plain"])) / ops * 1e6
    return [
        against_bar(case, "us added to an op", more, bar),
        report_only(case, "least of that", least, len(more)),
        report_only(case, "us of plain training per op",
                    statistics.median(samples["plain"]) / ops * 1e6, len(more)),
    ]  # fmt: skip


def busy(step: Callable[[], object]) -> float:
    """Return the seconds that all threads of this process compute in a step."""
    start = time.process_time()
    step()
    return time.process_time() - start


def engine_torch(runs: int) -> Rows:
    """Compare layers that compute next to nothing with plain training."""
    import torch
    from torch import nn

    import hvdx as hvd

    torch.set_num_threads(1)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    x = torch.randn(32, 8)
    loss = nn.functional.mse_loss
    pipe = hvd.Pipeline(model, x, loss, micro_batches=16, stages=4, schedule=ALONE,
                        place=["cpu"])  # fmt: skip

    def plain() -> None:
        for each in x.chunk(16):
            (loss(model(each), each) / 16).backward()
        model.zero_grad()

    variants = {"hvdx": functools.partial(busy, functools.partial(pipe.step, x, x)),
                "plain": functools.partial(busy, plain)}  # fmt: skip
    harness.interleave(variants, 2)
    return added("4 stages on a rank, PyTorch", 150.0, harness.interleave(variants, runs))


def engine_keras(runs: int) -> Rows:
    """Compare layers that compute next to nothing with a compiled step for each micro-batch."""
    import keras
    import numpy as np
    import tensorflow as tf

    import hvdx as hvd

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8,)), *(keras.layers.Dense(8) for _ in range(4))])
    x = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
    options = {"micro_batches": 16, "stages": 4, "schedule": ALONE, "place": ["cpu"]}
    pipe = hvd.Pipeline(model, x, "mse", keras.optimizers.SGD(0.0), **options)
    twin = keras.models.clone_model(model)
    optimizer = keras.optimizers.SGD(0.0)
    optimizer.build(twin.trainable_variables)
    compare = keras.losses.MeanSquaredError()

    @tf.function
    def gradients(each: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = compare(each, twin(each)) / 16
        return tape.gradient(loss, twin.trainable_variables)

    def plain() -> None:
        totals = None
        for each in tf.split(x, 16):
            found = gradients(each)
            totals = found if totals is None else [t + f for t, f in zip(totals, found)]  # noqa: B905
        optimizer.apply(totals, twin.trainable_variables)

    variants = {"hvdx": functools.partial(busy, functools.partial(pipe.step, x, x)),
                "plain": functools.partial(busy, plain)}  # fmt: skip
    harness.interleave(variants, 2)
    return added("4 stages on a rank, Keras", 700.0, harness.interleave(variants, runs))


# --- plans


def uneven() -> Any:
    """Return a model whose layers cost from 1 to 8."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    widths = [512, 1024, 1024, 2048, 1024, 512, 1024, 1024, 512, 512, 1024]
    return nn.Sequential(*(nn.Sequential(nn.Linear(*pair), nn.ReLU())
                           for pair in itertools.pairwise(widths)))  # fmt: skip


def plans(runs: int) -> Rows:
    """Measure plans that the planner has predicted."""
    import torch

    import hvdx as hvd
    from hvdx.pipeline.plan import SCHEDULES as NAMES

    x, y = torch.randn(BATCH, 512), torch.randn(BATCH, 1024)
    case = "10 uneven layers, 2 ranks x 1 thread"
    made = {}
    for name, count in itertools.product(NAMES, (4, 8)):
        made[f"{name}, {count} micro-batches"] = hvd.Pipeline(
            uneven(), x, torch.nn.functional.mse_loss, schedule=name, micro_batches=count, by="time"
        )
    steps = {name: functools.partial(pipe.step, x, y) for name, pipe in made.items()}
    for step in steps.values():
        step()
    variants = {name: functools.partial(harness.slowest, step) for name, step in steps.items()}
    samples = harness.interleave(variants, runs)
    rows, errors = [], []
    for name, pipe in made.items():
        predicted, value = pipe.plan.step * 1e3, statistics.median(samples[name])
        errors.append(abs(predicted / value - 1) * 100)
        rows.append(
            harness.Row(case, f"{name}, step ms", value, "predicted", predicted, predicted / value,
                        runs, harness.spread(samples[name]))
        )  # fmt: skip
    chosen = min(made, key=lambda name: made[name].plan.step)
    best = min(made, key=lambda name: statistics.median(samples[name]))
    over = [c / b for c, b in zip(samples[chosen], samples[best], strict=True)]
    return [
        *rows,
        against_bar(case, "% of error, median", errors, 5.0),
        against_bar(case, "% of error, largest", [max(errors)], 15.0),
        against_bar(case, f"chosen ({chosen}) over best ({best})", over, 1.05),
    ]


# --- the parts


class Part(NamedTuple):
    """A job: how many ranks it has, what each runs, and how often; one rank needs no launcher."""

    ranks: int
    measure: Callable[[int], Rows]
    runs: int
    short: int = 2


PARTS = {
    "sleep-10": Part(RANKS, functools.partial(sleep, 0.010, 1.05), 7, 1),
    "sleep-3": Part(RANKS, functools.partial(sleep, 0.003, 1.08), 15, 1),
    "live": Part(RANKS, live, 2, 1),
    "compute": Part(2, compute, 25),
    "local": Part(1, local, 40),
    "hops": Part(2, hops, 100, 5),
    "torch": Part(1, engine_torch, 200),
    "keras": Part(1, engine_keras, 40),
    "plans": Part(2, plans, 15),
}


def work(file: str, name: str, runs: int) -> None:
    """Measure a part on one rank; rank 0 leaves the rows."""
    part = PARTS[name]
    if part.ranks == 1:
        harness.leave(part.measure(runs), file)
        return
    import hvdx as hvd

    with harness.torch_job():
        rows = part.measure(runs)
        if hvd.rank() == 0:
            harness.leave(rows, file)


def measure(name: str, runs: int) -> Rows:
    """Run a part in processes of its own."""
    told = ["--part", name, "--runs", str(runs)]
    start, before = time.monotonic(), os.getloadavg()[0]
    if PARTS[name].ranks > 1:
        rows = harness.launch(__file__, PARTS[name].ranks, told)
    else:
        rows = harness.alone(__file__, told, KERAS_BACKEND="tensorflow")
    print(f"{name}: {time.monotonic() - start:.0f} s; load {before:.1f} before", flush=True)
    return rows


def main() -> int:
    """Print the table."""
    parser = harness.options(__doc__)
    parser.add_argument("--part", action="append", choices=PARTS, help="only this; repeat it")
    parser.add_argument("--runs", type=int, help="turns of each variant")
    told = parser.parse_args()
    names = told.part or list(PARTS)
    if told.worker:
        work(told.worker, names[0], told.runs)
        return 0
    # Before any framework counts the cores: each rank computes with one thread.
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    rows: Rows = []
    for name in names:
        part = PARTS[name]
        rows += measure(name, told.runs or (part.short if told.short else part.runs))
        harness.report(rows, told.json)
    harness.verdict(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
