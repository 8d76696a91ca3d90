# Kernels for CPUs and for NVIDIA GPUs of sm_80, sm_90 and sm_100; building needs no GPU.
#   docker build -t vision_ops .
#   docker run --rm --gpus all vision_ops python -m vision_ops
# For CPUs only:
#   docker build --build-arg BUILDER=ubuntu:24.04 --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
ARG BUILDER=nvidia/cuda:12.8.1-devel-ubuntu24.04

FROM ${BUILDER} AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY . /src
ENV VISION_OPS_CUDA_ARCHS="80;90;100"
RUN python3 -m venv /venv && /venv/bin/python -m pip wheel --no-cache-dir --no-deps -w /wheels /src

FROM ubuntu:24.04
ARG TORCH_INDEX=https://pypi.org/simple
# Triton compiles its kernels with gcc and Python's headers, and OpenMP's threads are libgomp's.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev libgomp1 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /venv
ENV PATH=/venv/bin:$PATH
RUN pip install --no-cache-dir --index-url ${TORCH_INDEX} 'torch>=2.11,<2.16'
COPY --from=build /wheels /wheels
RUN wheel=$(ls /wheels/*.whl) && pip install --no-cache-dir "vision-ops[examples] @ file://$wheel"
COPY examples /examples
RUN useradd --create-home --uid 1001 user
USER 1001
WORKDIR /home/user
CMD ["python", "-m", "vision_ops"]
