"""Make Megatron run on this machine. Imports nothing of Megatron before it must."""

import functools
import logging
import os
import warnings

from yoco_megatron import runtime


@functools.cache
def prepare() -> None:
    """Make `import megatron` and `megatron.training.pretrain()` work on this machine. Idempotent."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asks for it with tensor parallelism
    # Said once, with what to do about it, by tools/doctor.py, instead of seven times by every process.
    warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed", category=UserWarning)
    warnings.filterwarnings("ignore", message="MimoModelConfig is experimental", category=UserWarning)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
    warnings.filterwarnings("ignore", message="Could not determine rank", category=UserWarning)
    warnings.filterwarnings("ignore", message="The argument order of load has been changed", category=UserWarning)
    # The distributed optimizer asks views of a buffer, which have none.
    grad = r"The \.grad attribute of a Tensor that is not a leaf"
    warnings.filterwarnings("ignore", message=grad, category=UserWarning, module=r"megatron\.core\.optimizer")
    warnings.filterwarnings("ignore", message="Only transformer-engine", category=UserWarning)
    if not runtime.has_gpu():
        from yoco_megatron.runtime import cpu

        cpu.install()
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is no GPU
        warnings.filterwarnings("ignore", message="'pin_memory' argument is set", category=UserWarning)
    from yoco_megatron import upstream

    upstream.repair()
