# syntax=docker/dockerfile:1
#   docker build -t diffrep .
#   docker run --gpus all -v PATH:/data diffrep extract configs/extract/folder.yaml data=/data out=/data/features
# For the CPU: --build-arg BASE=python:3.12-slim-bookworm
ARG BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04
FROM ${BASE}

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home user
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
RUN python3 -m venv /opt/venv

# Where pip finds torch, when it is not the usual index; empty takes the usual one.
ARG TORCH_INDEX=""
WORKDIR /app
# Dependencies first: a change of code does not install them again.
COPY pyproject.toml README.md LICENSE ./
COPY diffrep/_version.py diffrep/_version.py
RUN touch diffrep/__init__.py && pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} ".[datasets,text]" \
    && pip uninstall --yes diffrep && rm -rf build diffrep *.egg-info
COPY diffrep diffrep
COPY configs configs
RUN pip install --no-cache-dir --no-deps .

# Run folders of commands without out=, such as the demo's.
RUN mkdir runs && chown user runs
USER user
ENTRYPOINT ["diffrep"]
CMD ["--help"]
