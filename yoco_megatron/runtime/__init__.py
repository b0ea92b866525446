"""The machine Megatron runs on: a real GPU, or the CPU stand-in that lets all of Megatron run without one.

Call `prepare()` once, before anything imports `megatron`. With a GPU it changes nothing about devices; without one it
installs the stand-ins of `runtime.cpu`. In both cases it applies the few repairs of `runtime.upstream`.
Only this package and `parallel/` may ask which device they are on.
"""

import functools
import importlib.util
import os
import warnings

import torch

# Asked once, before any stand-in answers "yes" in torch's name.
_HAS_GPU = torch.cuda.is_available()


def has_gpu() -> bool:
    """Whether a real CUDA device is there (the CPU stand-in makes `torch.cuda.is_available()` say yes)."""
    return _HAS_GPU


def device() -> torch.device:
    """The device of this process's tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if _HAS_GPU else torch.device("cpu")


@functools.cache
def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed and there is a GPU for it to run on."""
    return _HAS_GPU and importlib.util.find_spec("transformer_engine") is not None


@functools.cache
def has_fused_weight_gradient() -> bool:
    """Whether Apex's kernel is there, which Megatron's own linear layers need to add weight gradients in place.

    Transformer Engine's layers have one of their own.
    """
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


@functools.cache
def prepare() -> None:
    """Make `import megatron` and `megatron.training.pretrain()` work on this machine. Idempotent."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asks for it with tensor parallelism
    # Said once, with what to do about it, by tools/doctor.py, instead of seven times by every process.
    warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed", category=UserWarning)
    warnings.filterwarnings("ignore", message="Only transformer-engine", category=UserWarning)
    if not _HAS_GPU:
        from yoco_megatron.runtime import cpu

        cpu.install()
    from yoco_megatron.runtime import upstream

    upstream.repair()


def argument_defaults() -> dict[str, object]:
    """Defaults of Megatron's flags that this machine asks for, by argparse destination.

    Without Transformer Engine the layers are plain torch, and the fusions that live in Transformer Engine or Apex are
    off; without a GPU the process groups are gloo. A user's flag or config still wins.
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
