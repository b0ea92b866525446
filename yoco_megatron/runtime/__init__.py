"""The machine Megatron runs on: a real GPU, or the CPU stand-in that lets all of Megatron run without one.

`startup.prepare` installs the stand-ins of `runtime.cpu` where there is no GPU. Who must know whether there is one asks
here, because `torch.cuda` then says yes.
"""

import functools
import importlib.util
import os

import torch

# Asked once, before any stand-in answers "yes" in torch's name.
_HAS_GPU = torch.cuda.is_available()


def has_gpu() -> bool:
    """Whether there is a real CUDA device (the CPU stand-in makes `torch.cuda.is_available()` say yes)."""
    return _HAS_GPU


def device() -> torch.device:
    """The device of this process's tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if _HAS_GPU else torch.device("cpu")


@functools.cache
def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed and there is a GPU for it to run on."""
    return _HAS_GPU and importlib.util.find_spec("transformer_engine") is not None


def memory_bytes() -> int:
    """Of a GPU, all of which are alike; of the whole host, where there is none."""
    if _HAS_GPU:
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@functools.cache
def has_fused_weight_gradient() -> bool:
    """Whether Apex's kernel is installed, without which Megatron's own linear layers cannot add gradients in place.

    Transformer Engine's layers have a kernel of their own.
    """
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def argument_defaults() -> dict[str, object]:
    """Defaults of Megatron's flags that follow from this machine, by argparse destination.

    Without Transformer Engine the layers are plain torch, and the fusions of Transformer Engine and Apex are off.
    Without a GPU the process groups are gloo. A user's flag or config still wins.
    """
    defaults: dict[str, object] = {}
    if not has_transformer_engine():
        defaults |= {
            "transformer_impl": "local",
            "gradient_accumulation_fusion": False,
            "masked_softmax_fusion": False,
            "apply_rope_fusion": False,
            "no_persist_layer_norm": True,
        }
    if not _HAS_GPU:
        defaults |= {
            "distributed_backend": "gloo",
            "bias_swiglu_fusion": False,
            "bias_dropout_fusion": False,
            "cross_entropy_loss_fusion": False,
        }
    return defaults
