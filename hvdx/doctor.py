"""``hvdx doctor``: what is installed, whether it works, and how to mend what does not.

Facts are gathered first (:func:`gather`), then judged (:func:`judge`): the judgement is a plain
function of the facts. Frameworks are loaded in child processes only, so that one that crashes
is a finding and not the end of the doctor.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from hvdx.build import cache, causes, edits, probe, target
from hvdx.errors import InstallError

RUN_SECONDS = 120  # two TensorFlows starting on two busy cores have taken 40
LOAD_SECONDS = 120
INSTALL = "Run: hvdx install"
# How Horovod's metadata.json calls the frameworks.
RECORDED = {"torch": "pytorch", "tensorflow": "tensorflow"}

LOAD = """
import json, os
out = {{}}
try:
    import {framework} as framework
    out["version"] = str(framework.__version__)
    if {gpus} and "{framework}" == "torch" and framework.version.cuda:
        try:
            framework.ones(2, device="cuda").sum().item()
        except BaseException as error:
            out["cuda_error"] = f"{{type(error).__name__}}: {{error}}"
except BaseException as error:
    out["error"] = f"{{type(error).__name__}}: {{error}}"
else:
    try:
        import horovod.{framework} as hvd
        out["built"] = [name for name in ("gloo", "mpi", "nccl", "cuda")
                        if getattr(hvd, name + "_built")()]
    except BaseException as error:
        out["horovod_error"] = f"{{type(error).__name__}}: {{error}}"
    if os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps") as maps:
            out["nccl"] = sorted({{line.split(None, 5)[5].strip() for line in maps
                                  if "/libnccl.so" in line}})
print("\\n" + json.dumps(out))
"""

LOAD_KERAS = """
import json
out = {}
try:
    import keras
    out = {"version": keras.__version__, "backend": keras.backend.backend()}
except BaseException as error:
    out = {"error": f"{type(error).__name__}: {error}"}
print("\\n" + json.dumps(out))
"""

# Each rank contributes its number plus one, so a sum that nobody communicated is wrong.
ALLREDUCE = {
    "torch": """
import horovod.torch as hvd, torch
hvd.init()
sums = hvd.allreduce(torch.full((3,), hvd.rank() + 1.0), op=hvd.Sum, name="doctor").tolist()
assert hvd.size() == 2 and sums == [3.0, 3.0, 3.0], (hvd.size(), sums)
""",
    "tensorflow": """
import horovod.tensorflow as hvd, tensorflow as tf
hvd.init()
sums = hvd.allreduce(tf.fill([3], hvd.rank() + 1.0), op=hvd.Sum, name="doctor").numpy().tolist()
assert hvd.size() == 2 and sums == [3.0, 3.0, 3.0], (hvd.size(), sums)
""",
}

#: The same on GPUs, each rank on its own; as many ranks as there are GPUs, two at most.
ALLREDUCE_NCCL = """
import horovod.torch as hvd, torch
hvd.init()
torch.cuda.set_device(hvd.local_rank())
mine = torch.full((3,), hvd.rank() + 1.0, device="cuda")
sums = hvd.allreduce(mine, op=hvd.Sum, name="doctor").tolist()
assert sums == [hvd.size() * (hvd.size() + 1) / 2] * 3, (hvd.size(), sums)
hvd.shutdown()
"""


class Check(NamedTuple):
    """One finding: ``ok`` is None where the question does not arise."""

    name: str
    ok: bool | None
    value: str
    remedy: str | None = None


class Horovod(NamedTuple):
    """The installed Horovod."""

    version: str  # with "+hvdx.<key>" if hvdx built it
    against: dict[str, str]  # framework -> version it was built against


class Run(NamedTuple):
    """How a job of two processes ended: ``problem`` is "" if it went well."""

    problem: str


class Facts(NamedTuple):
    """What :func:`gather` found."""

    frameworks: dict[str, probe.Framework]
    loaded: dict[str, dict[str, Any]]  # by framework and "keras": what the child process printed
    keras: str | None  # its installed version
    horovod: Horovod | None
    runs: dict[str, Run]  # by framework, and "nccl"; empty with --no-run
    run_wanted: bool
    gpus: list[probe.Gpu]
    nvcc: probe.Tool | None
    nccl: probe.Nccl | None
    mpi: probe.Mpi | None
    mpirun: str | None
    compiler: probe.Tool | None
    cmake: probe.Tool | None
    interfaces: list[str]
    cache_problem: str | None
    cache_entries: list[cache.Entry]
    cached_key: str | None  # the key of this environment, if it can be told


def gather(*, run: bool = True) -> Facts:
    """Look at everything; takes half a minute, mostly for loading the frameworks twice."""
    found = {name: probe.framework(name) for name in probe.DISTRIBUTIONS}
    frameworks = {name: framework for name, framework in found.items() if framework}
    keras = _version("keras")
    gpus = probe.gpus()
    scripts = {name: LOAD.format(framework=name, gpus=len(gpus)) for name in frameworks}
    if keras:
        scripts["keras"] = LOAD_KERAS
    with ThreadPoolExecutor() as pool:
        loaded = dict(zip(scripts, pool.map(_load, scripts.values()), strict=True))
    horovod = _horovod()
    runs = {}
    if run and horovod:
        for name in frameworks:
            if "built" in loaded[name]:
                runs[name] = _run(ALLREDUCE[name])
        if gpus and "nccl" in loaded.get("torch", {}).get("built", ()):
            runs["nccl"] = _run_nccl(min(len(gpus), 2))
    try:
        cache.folder("wheels")
        cache_problem = None
    except InstallError as error:
        cache_problem = str(error)
    try:
        key = target.find(target.Options(untested=True)).key()
    except InstallError:
        key = None
    return Facts(
        frameworks=frameworks,
        loaded=loaded,
        keras=keras,
        horovod=horovod,
        runs=runs,
        run_wanted=run,
        gpus=gpus,
        nvcc=probe.nvcc(),
        nccl=probe.nccl(frameworks["torch"].cuda if "torch" in frameworks else None),
        mpi=probe.mpi(),
        mpirun=probe.which("mpirun"),
        compiler=probe.compiler(),
        cmake=probe.cmake(),
        interfaces=_interfaces(),
        cache_problem=cache_problem,
        cache_entries=cache.entries(),
        cached_key=key,
    )


def judge(facts: Facts) -> list[Check]:
    """Return the findings, in the order in which they are best read and mended."""
    return [
        *_judge_python(),
        *_judge_frameworks(facts),
        *_judge_horovod(facts),
        *_judge_runs(facts),
        *_judge_gpu(facts),
        *_judge_machine(facts),
        *_judge_tools(facts),
        *_judge_cache(facts),
    ]


def all_ok(checks: list[Check]) -> bool:
    """Tell whether nothing is wrong."""
    return all(check.ok is not False for check in checks)


def as_json(checks: list[Check]) -> str:
    """Return the findings as JSON."""
    return json.dumps(
        {"ok": all_ok(checks), "checks": [check._asdict() for check in checks]}, indent=2
    )


def as_text(checks: list[Check]) -> str:
    """Return the findings as lines to be read."""
    signs = {True: "ok", False: "NO", None: "-"}
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        value = check.value.replace("\n", "\n" + " " * (width + 6))
        lines.append(f"{signs[check.ok]:<4}{check.name:<{width}}  {value}")
        if check.remedy and check.ok is False:
            lines.append(" " * (width + 6) + "-> " + check.remedy)
    wrong = [check.name for check in checks if check.ok is False]
    lines.append(f"\nTo mend: {', '.join(wrong)}." if wrong else "\nAll is well.")
    return "\n".join(lines)


def _judge_python() -> Iterator[Check]:
    fits = (3, 10) <= sys.version_info < (3, 13)
    remedy = None if fits else "hvdx and Horovod need Python 3.10 to 3.12: make an environment."
    yield Check("python", fits, f"{platform.python_version()} ({sys.executable})", remedy)
    yield Check("hvdx", True, _version("hvdx") or "not installed: run from its source tree")


def _judge_frameworks(facts: Facts) -> Iterator[Check]:
    if not facts.frameworks:
        yield Check(
            "frameworks",
            False,
            f"neither torch nor TensorFlow in {sys.prefix}",
            "Install one: pip install 'hvdx[torch]' or 'hvdx[tensorflow]', then hvdx install.",
        )
    for name in probe.DISTRIBUTIONS:
        framework = facts.frameworks.get(name)
        if framework is None:
            yield Check(name, None, "not installed")
        elif error := facts.loaded[name].get("error"):
            yield Check(
                name,
                False,
                f"{framework.version} is installed, but does not load: {error}",
                f"Reinstall it; python -c 'import {name}' shows the whole error.",
            )
        else:
            cuda = f" for CUDA {framework.cuda}" if framework.cuda else ""
            yield Check(name, True, f"{framework.version}{cuda}")
    yield _judge_keras(facts)


def _judge_keras(facts: Facts) -> Check:
    if facts.keras is None:
        return Check("keras", None, "not installed")
    loaded = facts.loaded["keras"]
    if error := loaded.get("error"):
        return Check(
            "keras",
            False,
            f"{facts.keras} does not load: {error}",
            "Choose a backend that is installed: KERAS_BACKEND=torch or =tensorflow, or "
            "'backend' in ~/.keras/keras.json.",
        )
    backend = loaded["backend"]
    if backend not in probe.DISTRIBUTIONS:
        return Check(
            "keras",
            False,
            f"{facts.keras} on {backend}, for which there is no Horovod",
            "Set KERAS_BACKEND=torch or KERAS_BACKEND=tensorflow.",
        )
    if facts.keras.startswith(("0.", "1.", "2.")):
        return Check("keras", False, facts.keras, "hvdx works with Keras 3: pip install 'keras>=3'")
    return Check("keras", True, f"{facts.keras} on {backend}")


def _judge_horovod(facts: Facts) -> Iterator[Check]:
    if facts.horovod is None:
        yield Check("horovod", False, "not installed", INSTALL)
        return
    version, against = facts.horovod
    by_hvdx = "+hvdx." in version
    note = "" if by_hvdx else " (not built by hvdx: several hosts over Gloo may not connect)"
    if version.split("+")[0] != edits.HOROVOD:
        remedy = f"hvdx works with Horovod {edits.HOROVOD}. {INSTALL}"
        yield Check("horovod", False, version, remedy)
    else:
        yield Check("horovod", True, version + note)
    features: set[str] | None = None  # as long as no extension loads
    for name, framework in facts.frameworks.items():
        loaded = facts.loaded[name]
        if "built" in loaded:
            features = (features or set()) | set(loaded["built"])
        yield _judge_extension(name, framework, against.get(name), loaded)
    if features is not None:
        wrong = "gloo" not in features and "mpi" not in features
        controllers = ", ".join(sorted(features & {"gloo", "mpi"})) or "none"
        yield Check("controllers", not wrong, controllers, INSTALL if wrong else None)
        operations = ", ".join(sorted(features & {"nccl", "cuda"})) or "CPU only"
        yield Check("gpu operations", True if "nccl" in features else None, operations)
        if "mpi" in features and facts.mpirun is None:
            yield Check(
                "mpirun",
                False,
                "Horovod was built with MPI, but mpirun is not on PATH",
                "Add MPI's bin folder to PATH, or rebuild without: hvdx install --mpi off",
            )


def _judge_extension(
    name: str, framework: probe.Framework, against: str | None, loaded: dict[str, Any]
) -> Check:
    check = f"horovod.{name}"
    if "error" in loaded:
        return Check(check, None, f"{name} itself does not load")
    if against is None:
        return Check(check, False, f"Horovod was built without {name}", INSTALL)
    if against != framework.version:
        return Check(
            check,
            False,
            f"built against {name} {against}, but {framework.version} is installed",
            INSTALL,
        )
    if error := loaded.get("horovod_error"):
        return Check(check, False, f"does not load: {error}", f"{INSTALL} --force")
    return Check(check, True, f"built against {against}")


def _judge_runs(facts: Facts) -> Iterator[Check]:
    for name in facts.frameworks:
        check = f"allreduce, {name}"
        if not facts.run_wanted:
            yield Check(check, None, "left out (--no-run)")
        elif name not in facts.runs:
            yield Check(check, None, "cannot be tried before the above is mended")
        elif problem := facts.runs[name].problem:
            yield Check(
                check,
                False,
                f"hvdx run -np 2: {problem}",
                "Check that nothing blocks connections on 127.0.0.1; HOROVOD_LOG_LEVEL=debug "
                "hvdx run -np 2 -- ... tells more.",
            )
        else:
            yield Check(check, True, "2 processes, right sums")
    if "nccl" in facts.loaded.get("torch", {}).get("built", ()):
        yield _judge_nccl_run(facts)


def _judge_nccl_run(facts: Facts) -> Check:
    check = "allreduce, NCCL"
    if not facts.gpus:
        return Check(check, None, "built in, but no GPU is here to try it on")
    if not facts.run_wanted:
        return Check(check, None, "left out (--no-run)")
    ranks = min(len(facts.gpus), 2)
    if problem := facts.runs["nccl"].problem:
        found = causes.explain(problem)
        return Check(
            check,
            False,
            f"hvdx run -np {ranks}: {problem}",
            found.remedy if found else "NCCL_DEBUG=INFO hvdx run -np ... tells more.",
        )
    return Check(check, True, f"{ranks} process{'es' if ranks > 1 else ''}, right sums")


def _judge_gpu(facts: Facts) -> Iterator[Check]:
    torch = facts.frameworks.get("torch")
    names = ", ".join(gpu.name for gpu in facts.gpus)
    yield Check("gpus", True if names else None, names or "none (or no driver)")
    if facts.gpus:
        yield Check("driver", True, facts.gpus[0].driver)
    loaded = facts.loaded.get("torch", {})
    if facts.gpus and torch and torch.cuda and "error" not in loaded:
        if error := loaded.get("cuda_error"):
            found = causes.explain(error)
            remedy = found.remedy if found else "See docs/gpu.md for the usual mismatches."
            yield Check("torch on the GPU", False, error.splitlines()[0], remedy)
        else:
            yield Check("torch on the GPU", True, f"computes, with CUDA {torch.cuda}")
    nvcc = facts.nvcc.version if facts.nvcc else None
    yield Check("cuda toolkit", True if nvcc else None, nvcc or "none")
    nccl = facts.nccl.version if facts.nccl else None
    if len(several := loaded.get("nccl", ())) > 1:
        yield Check(
            "nccl",
            False,
            "\n".join(["torch and Horovod load different ones:", *several]),
            f"Unset HOROVOD_NCCL_HOME and LD_LIBRARY_PATH, so that both take torch's. {INSTALL} "
            "--force",
        )
    else:
        yield Check("nccl", True if nccl else None, nccl or "none")
    built = facts.loaded.get("torch", {}).get("built")
    if facts.gpus and built is not None and "nccl" not in built:
        if torch and torch.cuda:
            yield Check(
                "nccl operations",
                False,
                "torch and this machine have CUDA, but Horovod reduces on the CPU",
                f"{INSTALL} --gpu nccl",
            )
        else:
            yield Check("nccl operations", None, "torch is a CPU build: the GPU stays unused")


def _judge_machine(facts: Facts) -> Iterator[Check]:
    found = ", ".join(facts.interfaces)
    yield Check(
        "network", True if found else None, found or "loopback only: jobs on this machine only"
    )
    memory = psutil.virtual_memory()
    yield Check(
        "machine",
        True,
        f"{socket.gethostname()}: {os.cpu_count()} cores, {memory.total / 2**30:.0f} GiB "
        f"({memory.available / 2**30:.0f} free)",
    )


def _judge_tools(facts: Facts) -> Iterator[Check]:
    if facts.mpi:
        yield Check("mpi", True, f"{facts.mpi.version} ({facts.mpi.wrapper})")
    else:
        yield Check("mpi", None, "none with headers; Gloo needs none")
    # Once Horovod is there, nobody needs a compiler.
    need = facts.horovod is None
    for name, tool, remedy in (
        ("compiler", facts.compiler, "Install one (Debian, Ubuntu: apt-get install g++)."),
        ("cmake", facts.cmake, "Run: pip install 'hvdx[build]'"),
    ):
        if tool and tool.version:
            yield Check(name, True, f"{tool.version} ({tool.path})")
        else:
            value = f"{tool.path} does not work" if tool else "none"
            yield Check(name, False if need else None, value, remedy if need else None)


def _judge_cache(facts: Facts) -> Iterator[Check]:
    if facts.cache_problem:
        # The exception's text names the remedy itself.
        problem, _, remedy = facts.cache_problem.partition(". ")
        yield Check("wheel cache", False, problem, remedy)
        return
    if faults := [f"{entry.wheel}: {entry.fault}" for entry in facts.cache_entries if entry.fault]:
        yield Check("wheel cache", False, "\n".join(faults), "Remove it; hvdx install builds anew.")
        return
    # What is installed may have been built with other options than hvdx install would now take.
    installed = facts.horovod.version.partition("+hvdx.")[2] if facts.horovod else None
    keys = {facts.cached_key, installed}
    mine = [entry for entry in facts.cache_entries if entry.wheel.parent.name in keys]
    count = len(facts.cache_entries)
    value = f"{count} wheel{'' if count == 1 else 's'} in {cache.root() / 'wheels'}"
    yield Check("wheel cache", True, value + (", one for this environment" if mine else ""))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _horovod() -> Horovod | None:
    try:
        found = metadata.distribution("horovod")
    except metadata.PackageNotFoundError:
        return None
    path = Path(str(found.locate_file("horovod/metadata.json")))
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        recorded = {}
    against = {ours: recorded[theirs] for ours, theirs in RECORDED.items() if theirs in recorded}
    return Horovod(found.version, against)


def _interfaces() -> list[str]:
    """Return the interfaces that are up and lead to other hosts, with their IPv4 addresses."""
    stats = psutil.net_if_stats()
    return [
        f"{name} {address.address}"
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET
        and not address.address.startswith("127.")
        and name in stats
        and stats[name].isup
    ]


def _environment() -> dict[str, str]:
    """Return the environment for child processes, without what a surrounding job has set."""
    clean = {k: v for k, v in probe.environment().items() if not k.startswith("HOROVOD_")}
    return {**clean, "TF_CPP_MIN_LOG_LEVEL": "2"}


def _load(script: str) -> dict[str, Any]:
    """Run ``script`` and return the JSON of its last line, or how it died."""
    with tempfile.TemporaryDirectory() as cwd:  # away from folders that shadow packages
        try:
            done = subprocess.run(
                [sys.executable, "-c", script],
                capture_output=True,
                text=True,
                timeout=LOAD_SECONDS,
                env=_environment(),
                cwd=cwd,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"no answer within {LOAD_SECONDS} s"}
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": f"its process ended with {_status(done.returncode)}: {done.stderr[-300:]}"}
    return dict(answer)


def _run_nccl(ranks: int) -> Run:
    """Reduce on GPUs, and look into Horovod's timeline whether it was NCCL that did so."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "timeline.json")
        found = _run(ALLREDUCE_NCCL, ranks, HOROVOD_TIMELINE=str(path))
        if found.problem:
            return found
        seen = path.read_text(errors="replace") if path.is_file() else ""
    return Run("" if "NCCL_ALLREDUCE" in seen else "right sums, but not by NCCL")


def _run(script: str, ranks: int = 2, **environment: str) -> Run:
    """Run ``script`` through ``hvdx run``."""
    command = [sys.executable, "-m", "hvdx", "run", "-np", str(ranks), "--"]
    command += [sys.executable, "-c", script]
    with tempfile.TemporaryDirectory() as cwd:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**_environment(), **environment},
            cwd=cwd,
            start_new_session=True,
        )
        try:
            printed, _ = process.communicate(timeout=RUN_SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher ends its ranks
            try:
                process.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
            return Run(f"no result within {RUN_SECONDS} s")
    if process.returncode == 0:
        return Run("")
    end = "\n".join(printed.strip().splitlines()[-4:])
    return Run(f"{_status(process.returncode)}\n{end}")


def _status(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def doctor(*, as_json_text: bool, run: bool) -> int:
    """Examine, print, and return the exit status: 0 only if all is well."""
    checks = judge(gather(run=run))
    print(as_json(checks) if as_json_text else as_text(checks))
    return 0 if all_ok(checks) else 1
