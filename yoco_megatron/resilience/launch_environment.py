"""Environment variables for the processes of a run, by GPU generation and parallel mode."""

from argparse import Namespace

from yoco_megatron.utils.errors import require


def launch_environment(gpu: str, args: Namespace, run_folder: str) -> dict[str, str]:
    """Variables for a GPU generation (ampere, hopper, blackwell or none) and a parallel mode. Raises ValueError."""
    require(gpu in ("ampere", "hopper", "blackwell", "none"), f"gpu '{gpu}': must be ampere, hopper, blackwell or none")
    common = {"OMP_NUM_THREADS": "1"}
    if gpu == "none":
        return common | {"CUDA_VISIBLE_DEVICES": ""}
    sharded = getattr(args, "use_megatron_fsdp", False) or getattr(args, "use_torch_fsdp2", False)
    ordered = args.tensor_model_parallel_size > 1 or args.context_parallel_size > 1
    # One queue where tensor-parallel collectives must start before the matmul that hides them. With FSDP the gathers
    # would wait for compute in it; Blackwell keeps the order by itself.
    connections = "32" if sharded or gpu == "blackwell" else "1" if ordered else "8"
    return common | {
        "CUDA_DEVICE_MAX_CONNECTIONS": connections,
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
        "NCCL_NVLS_ENABLE": "0",  # it takes GPU memory; a site that wants it sets it in its config
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",  # the flight recorder: which collective hung
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": f"{run_folder}/stacks/nccl_",
    }
