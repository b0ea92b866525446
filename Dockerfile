# The training environment on GPUs: NVIDIA's PyTorch container, which has torch 2.11, Transformer Engine, Apex and NCCL,
# with Megatron-Core and this checkout. docs/quickstart_gpu.md says how to run it.
#
#   docker build -t yoco-megatron .
ARG BASE=nvcr.io/nvidia/pytorch:26.03-py3
FROM ${BASE}

ENV PYTHONPATH=/opt/yoco-megatron
WORKDIR /opt/yoco-megatron
COPY constraints.txt ./
COPY tools/install_in_container.sh tools/
RUN tools/install_in_container.sh
COPY . ./
