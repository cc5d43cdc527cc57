# Horovod and hvdx, for CPUs by default; docs/gpu.md says how to build for GPUs.
ARG BASE=debian:bookworm-slim
FROM ${BASE}

SHELL ["/bin/bash", "-eo", "pipefail", "-c"]

# Unpinned on purpose: the base image decides on the system's versions.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates cmake g++ iproute2 make openssh-client python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --shell /bin/bash --uid 10001 hvdx \
    && install --directory --owner=hvdx /opt/hvdx /opt/venv
USER 10001
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1
WORKDIR /opt/hvdx

# By default what constraints.txt pins; else pip requirements, as in "torch==2.11.0".
ARG FRAMEWORKS=
# An index with torch's CPU wheels saves the CPU image some GB of CUDA.
ARG PIP_EXTRA_INDEX_URL=
COPY --chown=10001 constraints.txt .
RUN python3 -m venv /opt/venv \
    && if [ -n "$FRAMEWORKS" ]; then echo "$FRAMEWORKS" | tr ' ' '\n'; \
       else grep -E '^(torch|tensorflow-cpu|keras)==' constraints.txt; fi > /tmp/frameworks.txt \
    && printf 'setuptools\nwheel\n' >> /tmp/frameworks.txt \
    && pip install --requirement /tmp/frameworks.txt

COPY --chown=10001 . .
# hvdx itself, from the source above; the frameworks are there already.
# hadolint ignore=DL3013
RUN pip install ".[examples]"

ARG GPU=none
ARG CUDA_ARCH=
# --untested, because the base image's compiler and Python may differ from what was tried; hvdx
# checks that the result loads.
RUN hvdx install --gpu "$GPU" ${CUDA_ARCH:+--cuda-arch "$CUDA_ARCH"} --untested \
    && rm -rf ~/.cache/hvdx

CMD ["hvdx", "doctor"]
