#!/usr/bin/env bash
# Add what training and the tools need to NVIDIA's PyTorch container, whose torch, Transformer Engine and NCCL stay:
# the container constrains pip to the versions that it has. The code itself is not installed but found by PYTHONPATH.
#
#   tools/install_in_container.sh
set -euo pipefail
cd "$(dirname "$0")/.."
# The container has none of these; the versions that are tested.
mapfile -t pinned < <(grep -E '^(megatron-core|transformers|nltk|gigatoken|zstandard|tiktoken|sentencepiece|emerging-optimizers)==' constraints.txt)
# These it mostly has, in versions of its own.
python3 -m pip install --no-cache-dir "${pinned[@]}" psutil pyyaml safetensors tensorboard tqdm matplotlib pyarrow
