"""Flags that need a package which this one does not: asked before training, on the machine that trains."""

import importlib.util
from argparse import Namespace

from yoco_megatron import runtime
from yoco_megatron.config.rules import MATRIX_OPTIMIZERS
from yoco_megatron.utils.errors import require


def needed(args: Namespace) -> dict[str, tuple[str, str]]:
    """What the flags ask for: flag and value -> (module, how pip calls it)."""
    resiliency = "nvidia_resiliency_ext", "nvidia-resiliency-ext"
    emerging = "emerging_optimizers", "emerging-optimizers"
    asked = {
        f"--optimizer {args.optimizer}": (args.optimizer in MATRIX_OPTIMIZERS, emerging),
        f"--wandb-project {args.wandb_project}": (args.wandb_project, ("wandb", "wandb")),
        f"--tensorboard-dir {args.tensorboard_dir}": (args.tensorboard_dir, ("tensorboard", "tensorboard")),
        # Without a GPU there is nothing to ask: runtime/cpu.py answers 0.
        "--log-straggler": (args.log_straggler and runtime.has_gpu(), ("pynvml", "nvidia-ml-py")),
        "--log-device-memory-used": (args.log_device_memory_used and runtime.has_gpu(), ("pynvml", "nvidia-ml-py")),
        "--log-energy": (args.log_energy, ("pynvml", "nvidia-ml-py")),
        "--non-persistent-ckpt-type local": (args.non_persistent_ckpt_type == "local", resiliency),
        "--async-strategy nvrx": (args.async_save and args.async_strategy == "nvrx", resiliency),
        "--enable-ft-package": (args.enable_ft_package, resiliency),
        "--fault-injector-ranks": (args.fault_injector_ranks is not None, resiliency),
        "--fault-injector-num-ranks": (args.fault_injector_num_ranks is not None, resiliency),
    }
    return {flag: package for flag, (is_asked, package) in asked.items() if is_asked}


def check(args: Namespace) -> None:
    """Raises ValueError for a package that is missing, naming flag and package."""
    for flag, (module, package) in needed(args).items():
        require(
            importlib.util.find_spec(module) is not None,
            f"{flag} needs the package {package}, which is missing here: pip install {package}, or remove the flag",
        )
