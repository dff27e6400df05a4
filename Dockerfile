# An image for GPU nodes: docker build -t pacl-scale . (docs/cluster.md). Nothing is compiled while it is built; CUDA's
# libraries come with torch from PyPI, the driver comes from the host, Slurm's client stays outside.
FROM python:3.11-slim-bookworm

# gcc: Triton builds the launcher of a kernel when that first runs. The others are how NCCL finds InfiniBand.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libibverbs1 ibverbs-providers librdmacm1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home pacl

WORKDIR /opt/pacl-scale
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY configs configs
COPY data_prep data_prep
COPY pacl_scale pacl_scale
RUN python -m pip install --no-cache-dir --constraint constraints.txt '.[gpu,tensorboard,wandb,classification]' \
    && rm -rf build

ENV PYTHONUNBUFFERED=1
USER 1000
WORKDIR /home/pacl
CMD ["pacl-scale", "--help"]
