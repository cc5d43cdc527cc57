"""Step time and bytes of compression methods between hosts on slow links.

    python benchmarks/compression.py --json compression.json

Trains an MLP of 5.8 M parameters (784-2048-2048-10, batch 64) on 2 and on 4 hosts of the rig
(``rig.py``; needs root), one thread each. All variants of a setting run in one job, in changing
order: Horovod without and with fp16, ``DistributedDataParallel`` without and with PyTorch's hooks,
and hvdx with each of its methods. A ratio compares with Horovod uncompressed unless the row says
otherwise; bytes are those that host 0 sends over its link, with all headers and Horovod's own
talk. Where all hosts are this machine, computing takes longer than on machines of their own.

With ``--local 2`` each host has two ranks, and ``hierarchical int8`` stands beside ``int8``.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import harness
import rig

WIDTHS = (784, 2048, 2048, 10)
BATCH = 64
BASELINE = "horovod"
OTHERS = ("horovod fp16", "ddp", "ddp fp16", "ddp powersgd 1", "ddp powersgd 2", "ddp powersgd 4")
BALANCED = ("fp16", "bf16", "int8", "int4", "onebit", "powersgd 4")  # what auto chooses from
METHODS = (
    "none", *BALANCED, "onebit matrix", "powersgd 2", "powersgd 1", "topk 0.01", "dgc 0.001",
    "randomk 0.01", "diloco 32", "auto",
)  # fmt: skip

#: How many times quicker a step must be than Horovod's on 2 hosts at 100 Mbit/s.
BARS = {
    "fp16": 1.65, "int8": 2.8, "int4": 4.3, "onebit": 9.0, "topk 0.01": 10.0, "dgc 0.001": 12.0,
    "powersgd 4": 12.0, "diloco 32": 13.0,
}  # fmt: skip


class Setting(NamedTuple):
    """A network, what runs on it, and how often."""

    hosts: int
    rate: float | None  # Mbit/s; None: not limited
    variants: Sequence[str]
    runs: int
    local: int = 1  # ranks on each host

    @property
    def case(self) -> str:
        """Name the setting."""
        each = f"{self.hosts} hosts" + (f" of {self.local} ranks" if self.local > 1 else "")
        return f"{each}, " + (f"{self.rate:g} Mbit/s" if self.rate else "unlimited")


ALL = (BASELINE, *OTHERS, *METHODS)
HIERARCHICAL = tuple(f"hierarchical {name}" for name in METHODS if name != "auto")
SETTINGS = [
    *(Setting(hosts, rate, ALL, 7) for rate in (100, 1000) for hosts in (2, 4)),
    Setting(2, 10, (BASELINE, "int4", "onebit", "powersgd 4", "auto"), 3),
    Setting(2, None, (BASELINE, "none", *BALANCED, "auto"), 15),
]


def shapes() -> list[tuple[int, ...]]:
    """Return those of the model's parameters."""
    pairs = list(itertools.pairwise(WIDTHS))
    return [shape for fan_in, fan_out in pairs for shape in ((fan_out, fan_in), (fan_out,))]


def formula(variant: str, hosts: int) -> float | None:
    """Return the bytes that a rank should send in a step; None where that is not fixed."""
    ring = 2 * (hosts - 1) / hosts
    elements = sum(map(math.prod, shapes()))
    matrices = [shape for shape in shapes() if len(shape) == 2]
    vectors = ring * 4 * sum(math.prod(shape) for shape in shapes() if len(shape) == 1)
    method, _, option = variant.removeprefix("ddp ").removeprefix("horovod ").partition(" ")
    blocks = {"int8": 1 + 1 / 256, "int4": 0.5 + 1 / 128, "onebit": 1 / 8 + 4 / 1024}
    if method in ("horovod", "ddp", "none"):
        return ring * 4 * elements
    if method in ("fp16", "bf16"):
        return ring * 2 * elements
    if method in blocks:  # one phase between two hosts: as much
        levels = (hosts - 1) * sum(map(sum, matrices)) if option == "matrix" else 0
        return ring * elements * blocks[method] + levels
    if method == "powersgd":
        return vectors + ring * 4 * int(option) * sum(map(sum, matrices))
    if method in ("topk", "dgc", "randomk"):
        each = (hosts - 1) if method != "randomk" else ring
        return vectors + each * 4 * float(option) * sum(map(math.prod, matrices))
    if method == "diloco":
        return ring * elements * blocks["int8"] / int(option)
    return None


def model() -> tuple[Any, Any]:
    """Return the MLP and its optimizer, equal on all ranks."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(WIDTHS)]
    module = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    return module, torch.optim.SGD(module.parameters(), lr=1e-3)


def variant(name: str) -> tuple[Any, Any]:
    """Return module and optimizer, equal at the start."""
    from torch import nn

    module, optimizer = model()
    library, _, option = name.partition(" ")
    if library == "horovod":
        import horovod.torch as horovod

        fp16 = {"compression": horovod.Compression.fp16} if option == "fp16" else {}
        named = module.named_parameters()
        return module, horovod.DistributedOptimizer(optimizer, named_parameters=named, **fp16)
    if library == "ddp":
        # With several buckets the hook for PowerSGD starts operations from the threads that end
        # others, in an order that differs between ranks: Gloo then mixes them up and aborts.
        one = {"bucket_cap_mb": 64} if option.startswith("powersgd") else {}
        module = nn.parallel.DistributedDataParallel(module, **one)
        _add_hook(module, option)
        return module, optimizer
    import hvdx as hvd

    return module, hvd.DistributedOptimizer(optimizer, module, compression=compression(name))


def _add_hook(module: Any, option: str) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    if option == "fp16":
        module.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif option:
        rank = int(option.split()[1])
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=rank, start_powerSGD_iter=2
        )
        module.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def compression(name: str) -> Any:
    """Return hvdx's method: ``topk 0.01`` is ``Compression.topk(0.01)``; a word means scales."""
    import hvdx as hvd

    if name.startswith("hierarchical "):
        return hvd.Compression.hierarchical(compression(name.removeprefix("hierarchical ")))
    method, _, option = name.partition(" ")
    made = getattr(hvd.Compression, method)
    if option.isalpha():
        return made(scales=option)
    return made(float(option) if "." in option else int(option)) if option else made


class Runner:
    """Runs steps of one variant, and counts what they send.

    Args:
        name: of the variant.
        quick: a raw step takes no seconds, so that several make a turn.
    """

    def __init__(self, name: str, quick: bool) -> None:
        import torch

        self.module, self.optimizer = variant(name)
        self.inputs = torch.randn(BATCH, WIDTHS[0])
        self.labels = torch.randint(0, WIDTHS[-1], (BATCH,))
        raw = name in ("horovod", "ddp", "none", "horovod fp16", "ddp fp16", "fp16", "bf16")
        self.steps = 32 if name.startswith("diloco") else 4 if quick or not raw else 1
        self.sent: list[float] = []
        self.computing: list[float] = []  # milliseconds of a step, of the thread that trains
        self._steps(32 if name.startswith("diloco") else 4 if "powersgd" in name else 2)

    def _steps(self, count: int) -> None:
        from torch.nn.functional import cross_entropy

        for _ in range(count):
            # Horovod's optimizer refuses set_to_none, so that it gets what it can do.
            if hasattr(self.optimizer, "_requires_update"):
                self.optimizer.zero_grad()
            else:
                self.optimizer.zero_grad(set_to_none=True)
            cross_entropy(self.module(self.inputs), self.labels).backward()
            self.optimizer.step()

    def __call__(self) -> float:
        """Return the milliseconds of a step."""
        import hvdx as hvd

        hvd.barrier()
        before, start, used = sent(), time.perf_counter(), time.thread_time()
        self._steps(self.steps)
        seconds = time.perf_counter() - start
        self.computing.append((time.thread_time() - used) / self.steps * 1e3)
        hvd.barrier()  # what others still expect from this host is its step's
        self.sent.append((sent() - before) / self.steps)
        return seconds / self.steps * 1e3


def idle_rate(seconds: float = 1.0) -> float:
    """Return the bytes per second that this host sends while all ranks wait."""
    import hvdx as hvd

    hvd.barrier()
    before, start = sent(), time.perf_counter()
    time.sleep(seconds)
    return (sent() - before) / (time.perf_counter() - start)


def sent() -> int:
    """Return the bytes that this host has sent over its link."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        device, _, numbers = line.partition(":")
        if device.strip() == "eth0":
            return int(numbers.split()[8])
    return 0


def work(file: str, setting: Setting) -> None:
    """Measure on one rank; rank 0 leaves the rows."""
    import torch
    import torch.distributed

    import hvdx as hvd

    torch.set_num_threads(1)
    dynamic = "dynamic" if setting.local > 1 else None  # process sets, for hierarchical
    hvd.init(framework="torch", process_sets=dynamic)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://{os.environ['MASTER_ADDR']}:29477", rank=hvd.rank(),
        world_size=hvd.size(),
    )  # fmt: skip
    torch.manual_seed(hvd.rank())
    quick = setting.rate is None or setting.rate >= 1000
    runners: dict[str, Runner] = {}
    for name in setting.variants:
        start = time.perf_counter()
        runners[name] = Runner(name, quick)
        if hvd.rank() == 0:
            print(f"{setting.case}: {name} is warm in {time.perf_counter() - start:.1f} s",
                  flush=True)  # fmt: skip
    idle = idle_rate()  # more, the more operations Horovod knows by name
    samples = harness.interleave(runners, setting.runs)
    if hvd.rank() == 0:
        talk = harness.Row(setting.case, "kB/s sent by Horovod in idleness", idle / 1e3, "itself",
                           idle / 1e3, 1.0, 1, 0.0)  # fmt: skip
        harness.leave([*rows(setting, samples, runners), talk], file)
    torch.distributed.destroy_process_group()
    hvd.shutdown()


def rows(
    setting: Setting, samples: dict[str, list[float]], runners: dict[str, Runner]
) -> list[harness.Row]:
    """Return times, bytes, and how they stand to the bars."""
    made: list[harness.Row] = []

    def against(name: str, other: str, metric: str = "step ms") -> harness.Row:
        pair = {name: samples[name], other: samples[other]}
        return harness.compare(setting.case, f"{name}, {metric}", pair, ours=name)[0]

    for name in samples:
        if name != BASELINE and BASELINE in samples:
            made.append(against(name, BASELINE))
            bar = BARS.get(name) if (setting.hosts, setting.rate) == (2, 100) else None
            if bar:
                row = made[-1]
                made.append(
                    row._replace(metric=f"{name}, times quicker", value=row.ratio,
                                 baseline="bar", baseline_value=bar, ratio=row.ratio / bar)
                )  # fmt: skip
    for rank in (1, 2, 4):
        ours, theirs = f"powersgd {rank}", f"ddp powersgd {rank}"
        if ours in samples and theirs in samples:
            made.append(against(ours, theirs))
    fixed = [name for name in (*BALANCED, "none") if name in samples]
    if "auto" in samples and fixed:
        best = min(fixed, key=lambda name: statistics.median(samples[name]))
        made.append(against("auto", best, "step ms, against the best it can choose"))
    if BASELINE in runners:
        cpu = {name: runner.computing for name, runner in runners.items()}
        for name in cpu:
            pair = {name: cpu[name], BASELINE: cpu[BASELINE]}
            if name != BASELINE:
                metric = f"{name}, ms of computing a step"
                made += harness.compare(setting.case, metric, pair, ours=name)
    return made + [_bytes(setting, name, runner) for name, runner in runners.items()]


def _bytes(setting: Setting, name: str, runner: Runner) -> harness.Row:
    value = statistics.median(runner.sent)
    flat = setting.local > 1 and not name.startswith("hierarchical ")
    right = None if flat else formula(name.removeprefix("hierarchical "), setting.hosts)
    told = right if right is not None else value
    return harness.Row(
        setting.case, f"{name}, kB sent a step", value / 1e3, "formula" if right else "itself",
        told / 1e3, told / value, len(runner.sent), harness.spread(runner.sent),
    )  # fmt: skip


def measure(setting: Setting) -> list[harness.Row]:
    """Run one setting on the rig."""
    with (
        tempfile.TemporaryDirectory() as folder,
        rig.network(setting.hosts, setting.rate, setting.local) as made,
    ):
        result = Path(folder) / "rows.json"
        told = [
            "--hosts", str(setting.hosts), "--rate", str(setting.rate or 0),
            "--methods", ",".join(setting.variants), "--runs", str(setting.runs),
            "--local", str(setting.local),
        ]  # fmt: skip
        command = [sys.executable, __file__, "--worker", str(result), *told]
        if rig.run(made, command, {"OMP_NUM_THREADS": "1"}):
            raise SystemExit(f"{setting.case}: a rank failed")
        return harness.load(result)


def chosen(told: Any) -> list[Setting]:
    """Return the settings that the options leave."""
    if told.short:
        settings = [Setting(2, 100, (BASELINE, "onebit", "powersgd 4", "auto"), 2)]
    else:
        settings = SETTINGS
    rate = None if told.rate == 0 else told.rate
    if told.hosts and told.rate is not None:  # maybe one that is not in the list
        known = [each for each in settings if (each.hosts, each.rate) == (told.hosts, rate)]
        settings = known or [Setting(told.hosts, rate, ALL, 7)]
    elif told.hosts or told.rate is not None:
        settings = [
            each for each in settings
            if told.hosts in (None, each.hosts) and (told.rate is None or each.rate == rate)
        ]  # fmt: skip
    if told.methods:
        settings = [each._replace(variants=told.methods.split(",")) for each in settings]
    if told.runs:
        settings = [each._replace(runs=told.runs) for each in settings]
    return [each._replace(local=told.local) for each in settings]


def main() -> int:
    """Print the table."""
    parser = harness.options(__doc__)
    parser.add_argument("--hosts", type=int, help="only settings of so many hosts")
    parser.add_argument("--rate", type=float, help="only settings of so many Mbit/s; 0: no limit")
    parser.add_argument("--methods", metavar="NAMES", help=f"by comma, of: {', '.join(ALL)}")
    parser.add_argument("--local", type=int, default=1, help="ranks on each host")
    parser.add_argument("--runs", type=int, help="turns of each variant")
    told = parser.parse_args()
    unknown = set((told.methods or BASELINE).split(",")) - {*ALL, *HIERARCHICAL}
    if unknown:
        parser.error(f"unknown methods {', '.join(sorted(unknown))}; use some of {', '.join(ALL)}")
    settings = chosen(told)
    if told.worker:
        work(told.worker, settings[0])
        return 0
    if (reason := rig.missing()) is not None:
        print(f"no rig here: {reason}", file=sys.stderr)
        return 0 if told.short else 2
    results = []
    for setting in settings:
        results += measure(setting)
    harness.report(results, told.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
