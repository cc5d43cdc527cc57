"""Every change that hvdx makes to Horovod's source, in one table.

An edit names the text it replaces and how often that text must occur, so that another
Horovod release, or an sdist that was edited already, stops the build instead of producing
something that nobody tried.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from hvdx.errors import InstallError

HOROVOD = "0.28.1"


class Edit(NamedTuple):
    """Replace ``find`` in ``file`` (relative to the source tree) where it occurs ``times``."""

    file: str
    find: str
    replace: str
    why: str
    times: int = 1
    when: str = "always"  # or a framework's name: only if Horovod is built for it


GLOO_RECEIVES_FIRST = (
    "a peer may send once it is told that a receive is posted; told after the own send, over the "
    "same connection, it waits behind all that data: the two directions took turns, and a slow "
    "link took twice the time"
)

START_MAY_FAIL = (
    "a rank that died while the others connected to it took them along: what Gloo throws then "
    "ended the process (std::terminate), and with it all that an elastic job had in memory"
)

EAGER_NAMES = (
    "TensorFlow gives the name of an eager operation to no kernel, which is called by its kind: "
    "operations of one kind paired up by their order, whatever the ranks had named them"
)

EDITS = (
    Edit(
        "CMakeLists.txt",
        "set(CMAKE_CXX_STANDARD 14)",
        "set(CMAKE_CXX_STANDARD {standard})",
        "Gloo and the common code are compiled with the framework's headers, which ask for it",
    ),
    Edit(
        "horovod/torch/CMakeLists.txt",
        "set(CMAKE_CXX_STANDARD 14)",
        "set(CMAKE_CXX_STANDARD {standard})",
        "torch 2.1 needs C++17, torch 2.13 C++20",
        when="torch",
    ),
    Edit(
        "horovod/torch/CMakeLists.txt",
        "from distutils.sysconfig import get_python_inc; print(get_python_inc())",
        "import sysconfig; print(sysconfig.get_paths()['include'])",
        "Python 3.12 has no distutils",
        when="torch",
    ),
    Edit(
        "horovod/tensorflow/CMakeLists.txt",
        "set(CMAKE_CXX_STANDARD 17)",
        "set(CMAKE_CXX_STANDARD {standard})",
        "TensorFlow 2.21 needs C++20",
        when="tensorflow",
    ),
    Edit(
        "horovod/tensorflow/CMakeLists.txt",
        'list(APPEND TF_SOURCES "${PROJECT_SOURCE_DIR}/horovod/tensorflow/xla_mpi_ops.cc")\n',
        "",
        "it needs highwayhash headers that TensorFlow's wheel does not ship; only "
        "HOROVOD_ENABLE_XLA_OPS=1 would use it",
        when="tensorflow",
    ),
    Edit(
        "horovod/common/ops/cuda/CMakeLists.txt",
        "set(CMAKE_CUDA_STANDARD 11)",
        "set(CMAKE_CUDA_STANDARD 17)",
        "CUDA 13 compiles C++17 and later only",
    ),
    Edit(
        "horovod/common/gloo/gloo_context.cc",
        "  device_attr.iface = gloo_iface_;\n"
        "  device_attr.ai_family = AF_UNSPEC;\n"
        "  auto dev = CreateDevice(device_attr);\n\n"
        "  global_ctx = global_context.ctx;",
        "  gloo_iface_ = global_context.gloo_iface_;\n"
        "  device_attr.iface = gloo_iface_;\n"
        "  device_attr.ai_family = AF_UNSPEC;\n"
        "  auto dev = CreateDevice(device_attr);\n\n"
        "  global_ctx = global_context.ctx;",
        "process sets ignored HOROVOD_GLOO_IFACE and looked up the host's own name, which is "
        "often 127.0.0.1: no two hosts could connect",
    ),
    Edit(
        "horovod/tensorflow/mpi_ops.cc",
        "using namespace tensorflow;\nusing namespace horovod;\n",
        "using namespace tensorflow;\nusing namespace horovod;\n\n"
        "static thread_local std::string given_name;\n\n"
        "// Name the operation that this thread runs next; null takes it back.\n"
        'extern "C" void horovod_tensorflow_name(const char* name) {\n'
        '  given_name = name == nullptr ? "" : name;\n'
        "}\n\n"
        "static std::string WithGivenName(std::string kind) {\n"
        "  std::string name;\n"
        "  name.swap(given_name);\n"
        '  return name.empty() ? kind : kind + "." + name;\n'
        "}\n",
        EAGER_NAMES,
        when="tensorflow",
    ),
    Edit(
        "horovod/tensorflow/mpi_ops.cc",
        "    auto node_name = name();\n",
        "    auto node_name = WithGivenName(name());\n",
        EAGER_NAMES,
        times=8,
        when="tensorflow",
    ),
    Edit(
        "horovod/common/operations.cc",
        "#if HAVE_GLOO\n"
        "#if HAVE_MPI\n"
        "  if (global_mpi_context.IsEnabled()) {\n"
        "    // Initialize gloo context if mpi context is available\n",
        "  try {\n"
        "#if HAVE_GLOO\n"
        "#if HAVE_MPI\n"
        "  if (global_mpi_context.IsEnabled()) {\n"
        "    // Initialize gloo context if mpi context is available\n",
        START_MAY_FAIL,
    ),
    Edit(
        "horovod/common/operations.cc",
        "    state.process_set_table.Initialize(global_gloo_context);\n  }\n#endif // HAVE_GLOO\n",
        "    state.process_set_table.Initialize(global_gloo_context);\n"
        "  }\n"
        "#endif // HAVE_GLOO\n"
        "  } catch (const std::exception& ex) {\n"
        '    LOG(ERROR) << "Horovod could not be initialized: " << ex.what();\n'
        "    state.initialization_failed = true;\n"
        "    goto shutdown;\n"
        "  }\n"
        "\n"
        "  {  // no jump may pass the variables within\n",
        START_MAY_FAIL,
    ),
    Edit(
        "horovod/common/operations.cc",
        "\nshutdown:\n",
        "  }\n\nshutdown:\n",
        START_MAY_FAIL,
    ),
    Edit(
        "horovod/common/operations.cc",
        "    // Reset initialization flag\n    horovod_global.initialization_done = false;\n",
        "    // Reset initialization flags\n"
        "    horovod_global.initialization_done = false;\n"
        "    horovod_global.initialization_failed = false;\n",
        "a process that once failed to start could never start again",
    ),
    Edit(
        "horovod/common/process_set.cc",
        "      InitializeRegisteredAndRemoveMarkedIfReady_(context, status);\n"
        "      if (ProcessSetHasJustBeenRemoved()) {\n",
        "      try {\n"
        "        InitializeRegisteredAndRemoveMarkedIfReady_(context, status);\n"
        "      } catch (const std::exception&) {  // a rank is gone: nobody to agree with\n"
        "        id_to_process_set_[id].Finalize(status);\n"
        "        DeregisterProcessSet(id);\n"
        "        id_to_be_removed_ = SUCCESSFUL_REMOVAL;\n"
        "      }\n"
        "      if (ProcessSetHasJustBeenRemoved()) {\n",
        "a rank that died in a job with process sets took the others along: they agree to remove "
        "the sets, and what Gloo throws then ended the process (std::terminate)",
    ),
    Edit(
        "third_party/gloo/gloo/alltoallv.cc",
        "  for (int i = 1; i < worldSize; i++) {\n"
        "    int sendRank = (myRank + i) % worldSize;\n"
        "    int recvRank = (myRank + worldSize - i) % worldSize;\n"
        "    in->send(\n"
        "        sendRank, slot, inOffsetPerRank[sendRank], inLengthPerRank[sendRank]);\n"
        "    out->recv(\n"
        "        recvRank, slot, outOffsetPerRank[recvRank], outLengthPerRank[recvRank]);\n"
        "  }\n",
        "  for (int i = 1; i < worldSize; i++) {\n"
        "    int recvRank = (myRank + worldSize - i) % worldSize;\n"
        "    out->recv(\n"
        "        recvRank, slot, outOffsetPerRank[recvRank], outLengthPerRank[recvRank]);\n"
        "  }\n"
        "  for (int i = 1; i < worldSize; i++) {\n"
        "    int sendRank = (myRank + i) % worldSize;\n"
        "    in->send(\n"
        "        sendRank, slot, inOffsetPerRank[sendRank], inLengthPerRank[sendRank]);\n"
        "  }\n",
        GLOO_RECEIVES_FIRST,
    ),
    Edit(
        "third_party/gloo/gloo/allgatherv.cc",
        "  for (auto i = 0; i < context->size - 1; i++) {\n"
        "    const size_t sendIndex = (baseIndex - i) % context->size;\n"
        "    const size_t recvIndex = (baseIndex - i - 1) % context->size;\n"
        "\n"
        "    if (i == 0) {\n"
        "      out->send(sendRank, slot, byteOffsets[sendIndex], byteCounts[sendIndex]);\n"
        "      out->recv(recvRank, slot, byteOffsets[recvIndex], byteCounts[recvIndex]);\n"
        "      continue;\n"
        "    }\n"
        "\n"
        "    // Wait for previous operations to complete before kicking off new ones.\n"
        "    out->waitSend(opts.timeout);\n"
        "    out->waitRecv(opts.timeout);\n"
        "    out->send(sendRank, slot, byteOffsets[sendIndex], byteCounts[sendIndex]);\n"
        "    out->recv(recvRank, slot, byteOffsets[recvIndex], byteCounts[recvIndex]);\n"
        "  }\n"
        "\n"
        "  // Wait for final operations to complete.\n"
        "  out->waitSend(opts.timeout);\n"
        "  out->waitRecv(opts.timeout);\n",
        "  for (auto i = 0; i < context->size - 1; i++) {\n"
        "    const size_t recvIndex = (baseIndex - i - 1) % context->size;\n"
        "    out->recv(recvRank, slot, byteOffsets[recvIndex], byteCounts[recvIndex]);\n"
        "  }\n"
        "  for (auto i = 0; i < context->size - 1; i++) {\n"
        "    const size_t sendIndex = (baseIndex - i) % context->size;\n"
        "    out->send(sendRank, slot, byteOffsets[sendIndex], byteCounts[sendIndex]);\n"
        "    out->waitRecv(opts.timeout);  // what came is what goes out next\n"
        "  }\n"
        "  for (auto i = 0; i < context->size - 1; i++) {\n"
        "    out->waitSend(opts.timeout);\n"
        "  }\n",
        GLOO_RECEIVES_FIRST,
    ),
    Edit(
        "horovod/runner/js_run.py",
        "from distutils.spawn import find_executable",
        "from shutil import which as find_executable",
        "Python 3.12 has no distutils, and the launcher imports this file",
    ),
    Edit(
        "setup.py",
        "    require_list.append('cffi>=1.4.0')",
        "    pass",
        "nothing in Horovod uses it any more, and setup.py would fetch it past pip's settings",
    ),
)

# Headers that GCC 13 no longer includes by way of others, and on which Horovod and Gloo rely.
INCLUDES = ("cstdint", "stdexcept", "string")


def chosen(frameworks: set[str]) -> list[Edit]:
    """Return the edits that a build for ``frameworks`` needs."""
    return [edit for edit in EDITS if edit.when == "always" or edit.when in frameworks]


def digest() -> str:
    """Return a short hash of all this: a changed edit means another wheel."""
    return hashlib.sha256(repr((EDITS, INCLUDES)).encode()).hexdigest()[:12]


def apply(tree: Path, edits: list[Edit], *, standard: int) -> None:
    """Apply ``edits`` to the source in ``tree``; ``standard`` is the C++ standard, 17 or 20.

    Raises:
        InstallError: a file is missing, or its text does not occur as often as expected.
            Nothing is written then.
    """
    texts: dict[Path, str] = {}
    for edit in edits:
        path = tree / edit.file
        try:
            text = texts[path] if path in texts else path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise InstallError(
                f"the Horovod source in {tree} has no {edit.file}; hvdx edits Horovod {HOROVOD}. "
                f"Remove the download and try again: the sdist is another or incomplete."
            ) from None
        if (times := text.count(edit.find)) != edit.times:
            raise InstallError(
                f"{edit.file}: expected {edit.times} times, found {times} times: {edit.find!r}. "
                f"This is not the source of Horovod {HOROVOD}, or it was edited already. "
                f"The edit is needed because {edit.why}."
            )
        texts[path] = text.replace(edit.find, edit.replace.replace("{standard}", str(standard)))
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
