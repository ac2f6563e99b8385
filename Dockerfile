# syntax=docker/dockerfile:1
#   docker build -t diffrep .
#   docker run --rm --gpus all --ipc=host -v PATH:/data diffrep extract configs/extract/folder.yaml \
#     data=/data/images out=/data/features
# For the CPU, without CUDA's gigabytes: --build-arg BASE=ubuntu:24.04 --build-arg TORCH_INDEX=URL, where URL is the
# package index of torch's CPU builds ("Start Locally" in torch's documentation names it).
# Other commands of the environment: --entrypoint accelerate, torchrun, python or bash.
# Files belong to whom --user says; without it to a user of the image's own. Weights that are fetched stay with
# -v PATH:/home/user/.cache.
# Health: -e DIFFREP_MONITOR=FILE together with monitor=FILE tells a job that makes no progress for five minutes.
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04

# All that a change of code leaves as it is. torch brings CUDA's libraries; inductor and triton need a compiler.
FROM ${BASE} AS dependencies
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates g++ python3 python3-dev python3-venv tini \
    && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/venv
# Where pip looks, when it is not the usual place, and where it finds torch; empty takes the usual one.
ARG PIP_INDEX_URL=""
ARG TORCH_INDEX=""
ARG EXTRAS="datasets,text"
# By itself, so that a newer release on the usual index does not win.
RUN if [ -n "$TORCH_INDEX" ]; then pip install --no-cache-dir --index-url "$TORCH_INDEX" torch torchvision; fi
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY diffrep/_version.py diffrep/_version.py
RUN touch diffrep/__init__.py && pip install --no-cache-dir ".[$EXTRAS]" \
    && pip uninstall --yes diffrep && rm -rf build diffrep *.egg-info

FROM dependencies AS wheel
COPY diffrep diffrep
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM dependencies
LABEL org.opencontainers.image.title="diffrep" org.opencontainers.image.licenses="Apache-2.0"
WORKDIR /app
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps /wheels/*.whl && pip check
COPY configs configs
# Whoever --user names may write caches, and run folders of commands without out=, such as the demo's.
RUN useradd --create-home user && mkdir runs && chmod 1777 /home/user runs
ENV HOME=/home/user TORCHINDUCTOR_CACHE_DIR=/home/user/inductor DIFFREP_MONITOR=""
USER user
# Without a monitor file the job is as well as its process, which docker knows by itself.
HEALTHCHECK --interval=60s --timeout=20s --start-period=30m --retries=3 \
    CMD test -z "$DIFFREP_MONITOR" || diffrep env --check --monitor "$DIFFREP_MONITOR"
# tini passes signals on: as the first process of a container, Python would not end at SIGTERM.
ENTRYPOINT ["tini", "--", "diffrep"]
CMD ["--help"]
