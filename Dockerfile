# For CUDA nodes: docker build -t wsss . && docker run --gpus all --shm-size 1g -v "$PWD/results:/wsss/results" wsss
# The installation is that of CI and of a fresh machine, `make install`. PyTorch's packages bring CUDA's libraries; the base
# image adds only what lets the container use the driver. Apptainer: apptainer build wsss.sif docker-daemon://wsss:latest
FROM nvidia/cuda:13.0.1-base-ubuntu24.04
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# Python with venv, make and a C++ compiler are what README asks for; git is for DVC.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /wsss
COPY . .
RUN make install && chmod --recursive a+rwX .
# A user other than root may run the container, without a home directory.
ENV PATH=/wsss/.venv/bin:$PATH XDG_CACHE_HOME=/tmp/cache
CMD ["make", "reproduce"]
