"""The backend of a trained model: a run's checkpoints or an exported folder, nothing converted first."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.training import training

from yoco_megatron import runtime, upstream
from yoco_megatron.checkpoint import architecture
from yoco_megatron.evaluation.backends.cached import CachedBackend
from yoco_megatron.evaluation.backends.mesh import MeshBackend
from yoco_megatron.evaluation.model_files import look
from yoco_megatron.evaluation.requests import Backend
from yoco_megatron.evaluation.tokenizer import TextTokenizer
from yoco_megatron.inference.load import find_source, is_baseline, load_weights
from yoco_megatron.startup.load_run import load_model_chunks
from yoco_megatron.utils.errors import require

MESH_FLAGS = (
    "tensor-model-parallel-size",
    "pipeline-model-parallel-size",
    "context-parallel-size",
    "sequence-parallel",
    "pipeline-model-parallel-layout",
    "num-virtual-stages-per-pipeline-rank",
)
"""Of pretrain_yoco.py, that a reader of a run may give; data parallelism is what is left of the processes."""
BUDGET = 32768
"""Tokens of a batch."""


def open_backend(
    folder: str,
    iteration: int | None = None,
    text: TextTokenizer | None = None,
    mesh: Mapping[str, Any] | None = None,
    token_budget: int = BUDGET,
    dtype: torch.dtype | None = None,
    kv_cache_dtype: str | None = None,
) -> Backend:
    """The model in `folder`, ready to answer requests. Under torchrun each process calls this.

    Args:
        folder: a run's --save, or the folder of an exported model.
        iteration: which training checkpoint; the latest by default.
        text: the tokenizer, if it is loaded already; by default the model's own.
        mesh: flags of `MESH_FLAGS` without dashes; with several processes, {} spreads requests over them. None, in one
            process, for a YOCO's caches.
        dtype: of the weights of a YOCO with caches; by default as they are stored.
        kv_cache_dtype: of its shared K,V there (`ops.attention.quantized.FORMATS`); None for the weights' own.
    Raises:
        ValueError: no model there, no tokenizer, or a mesh that does not fit.
    """
    require(token_budget > 0, f"{token_budget} tokens a batch: at least 1 are needed")
    exported = (Path(folder) / "config.json").exists()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    require(
        not exported or (not mesh and processes == 1),
        f"{folder} is an exported model, which one process evaluates: give the run's checkpoints for a mesh",
    )
    text = text or look(folder, iteration).tokenizer
    if exported or (mesh is None and processes == 1 and not is_baseline(folder)):
        model = load_weights(find_source(folder, iteration), runtime.device(), dtype)
        check_rows(folder, text, model.config.vocab_size)
        return CachedBackend(model, text, text.rows, token_budget=token_budget, kv_cache_dtype=kv_cache_dtype)
    require(
        kv_cache_dtype is None,
        f"--kv-cache-dtype {kv_cache_dtype}: a Transformer baseline and a mesh run without a cache: remove it",
    )
    return _on_mesh(folder, iteration, text, mesh or {}, processes, token_budget)


def close() -> None:
    """At the end, on each process: one whose connections are still open as its interpreter ends may be aborted."""
    if dist.is_initialized():
        dist.barrier()
        mpu.destroy_model_parallel()
        dist.destroy_process_group()


def _on_mesh(
    folder: str, iteration: int | None, text: TextTokenizer, mesh: Mapping[str, Any], processes: int, budget: int
) -> MeshBackend:
    unknown = sorted(mesh.keys() - set(MESH_FLAGS))
    require(not unknown, f"--{'-'.join(unknown[:1])} is no flag of a mesh")
    check_rows(folder, text, int(architecture.read(folder)["padded_vocab_size"]))
    sizes = [int(mesh.get(f"{kind}-parallel-size", 1)) for kind in ("tensor-model", "pipeline-model", "context")]
    model_processes = sizes[0] * sizes[1] * sizes[2]
    require(
        processes % model_processes == 0,
        f"a mesh of {' x '.join(map(str, sizes))} (tensor, pipeline, context) does not divide {processes} processes",
    )
    # Of no other use than that every mesh of so many processes takes it.
    chunks, args = load_model_chunks(folder, iteration, **mesh, **{"global-batch-size": processes})
    if not hasattr(training.get_forward_backward_func, "original"):
        upstream.install(args, only={"get_forward_backward_func"})
    name = "mesh of " + " x ".join(map(str, (*sizes, processes // model_processes)))
    return MeshBackend(chunks, text, args.max_position_embeddings, budget, text.rows, name)


def check_rows(folder: str, text: TextTokenizer, rows: int) -> None:
    """Raise ValueError where the tokenizer has more ids than the model's embedding has rows."""
    require(
        text.rows <= rows,
        f"{folder}: the tokenizer has {text.rows:,} ids, the model {rows:,} rows for them: it is another model's",
    )
