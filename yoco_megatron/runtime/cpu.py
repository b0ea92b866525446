"""Stand-ins for the parts of `torch.cuda` that Megatron-Core 0.19 calls without asking whether there is a GPU.

Each stand-in names the upstream place it serves (paths inside the installed package `megatron/`). Nothing here
computes: a device answer becomes "cpu", a stream or event an empty object, and the CUDA random state is the CPU's.
They stay out of the registry of `upstream/`, which imports megatron: they must be installed before that, and replace
answers of a device, not code. `tests/runtime/test_cpu.py` fails when upstream calls something that is not listed.
"""

import contextlib
import functools
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
import torch.utils._device

CPU = torch.device("cpu")

# Installed on a machine without a GPU they import, and Megatron would choose their optimizers and kernels.
GPU_ONLY = ("transformer_engine", "apex", "amp_C")

# Creation functions that upstream calls with a literal device="cuda" (core/pipeline_parallel/schedules.py,
# core/optimizer/clip_grads.py, core/rerun_state_machine.py, training/training.py, ...).
FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones", "ones_like",
    "rand", "randint", "randn", "randperm", "tensor", "zeros", "zeros_like",
)  # fmt: skip


class Stream:
    """A stream on a device without queues: every operation is done when it is called."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exc: object) -> None: ...

    def wait_stream(self, stream: "Stream") -> None:
        """Return at once."""

    def wait_event(self, event: "Event") -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """True: everything is done."""
        return True

    def record_event(self, event: "Event | None" = None) -> "Event":
        """`event`, or a new one, recorded now."""
        event = event or Event()
        event.record()
        return event


class Event:
    """An event that remembers the wall clock, for core/timers.py and core/utils.py's straggler detector."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        """Remember the time."""
        self.time = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """True: it has happened."""
        return True

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds from this event to `end`."""
        return (end.time - self.time) * 1e3


class DeviceProperties:
    """What core/utils.py and training/training.py read of a device."""

    name, major, minor, multi_processor_count = "cpu", 9, 0, os.cpu_count() or 1
    total_memory = psutil.virtual_memory().total


class DefaultGenerators:
    """`torch.cuda.default_generators[torch.cuda.current_device()]` (core/tensor_parallel/random.py)."""

    def __getitem__(self, index: object) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


def _always(value: Any) -> Callable[..., Any]:
    """A fresh function every time: torch._dynamo refuses one object under two names of `torch.cuda`."""
    return lambda *args, **kwargs: value


def _nothing() -> Callable[..., None]:
    return _always(None)


def _memory() -> Callable[..., int]:
    """Bytes of this process's resident memory, for every 'GPU memory' report."""
    return lambda *args, **kwargs: psutil.Process().memory_info().rss


def _memory_stats(*args: Any, **kwargs: Any) -> dict[str, int]:
    """What --log-memory-to-tensorboard reads."""
    size = psutil.Process().memory_info().rss
    sizes = dict.fromkeys(
        ("reserved_bytes.all.current", "allocated_bytes.all.current", "allocated_bytes.all.peak"), size
    )
    return sizes | {"allocation.all.current": 0}


# name in torch.cuda -> (replacement, the upstream place that calls it)
STAND_INS: dict[str, tuple[Any, str]] = {
    # Which device
    "is_available": (_always(True), "training/initialize.py: 'Megatron requires CUDA.'"),
    "device_count": (lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")), "training/initialize.py"),
    "current_device": (_always(CPU), "core/tensor_parallel/layers.py, p2p_communication.py, random.py"),
    "set_device": (_nothing(), "training/initialize.py"),
    "get_device_capability": (_always((9, 0)), "training/arguments.py, core/transformer/transformer_config.py"),
    "get_device_properties": (_always(DeviceProperties()), "training/utils, core/jit.py"),
    "is_bf16_supported": (_always(True), "core/utils.py"),
    # Queues
    "synchronize": (_nothing(), "core/timers.py, training/training.py, p2p_communication.py"),
    "current_stream": (lambda *a: Stream(), "core/distributed/param_and_grad_buffer.py"),
    "default_stream": (lambda *a: Stream(), "core/full_cuda_graph.py"),
    "stream": (lambda s: contextlib.nullcontext(), "training/models/dist_utils.py"),
    "set_stream": (_nothing(), "training/initialize.py"),
    "Stream": (Stream, "training/models/dist_utils.py"),
    "Event": (Event, "core/utils.py: straggler detector"),
    "is_current_stream_capturing": (_always(False), "core/transformer/cuda_graphs.py"),
    # Random state: the "CUDA" generator is the CPU's default generator
    "get_rng_state": (lambda *a, **k: torch.get_rng_state(), "training/checkpointing.py"),
    "set_rng_state": (lambda state, *a, **k: torch.set_rng_state(state), "training/checkpointing.py"),
    "manual_seed": (lambda seed: torch.manual_seed(seed), "core/tensor_parallel/random.py"),
    "manual_seed_all": (_nothing(), "torch.manual_seed, which has seeded the CPU already"),
    "default_generators": (DefaultGenerators(), "core/tensor_parallel/random.py"),
    "_lazy_init": (_nothing(), "core/tensor_parallel/random.py"),
    # Imported by name there; the real one queues the callback until CUDA starts, that is for ever.
    "_lazy_call": (lambda callback, **k: callback(), "core/tensor_parallel/random.py"),
    # Memory reports
    "empty_cache": (_nothing(), "training/training.py"),
    "memory_stats": (_memory_stats, "training/training.py: --log-memory-to-tensorboard"),
    "memory_allocated": (_memory(), "training/utils: report_memory"),
    "max_memory_allocated": (_memory(), "training/utils: report_memory"),
    "memory_reserved": (_memory(), "training/utils: report_memory"),
    "max_memory_reserved": (_memory(), "training/utils: report_memory"),
    "device_memory_used": (_memory(), "training/utils: --log-device-memory-used"),
    "reset_peak_memory_stats": (_nothing(), "training/training.py"),
    # Sensors, of which there are none
    "temperature": (_always(0), "core/utils.py: straggler detector"),
    "power_draw": (_always(0), "core/utils.py: straggler detector"),
    "utilization": (_always(0), "core/utils.py: straggler detector"),
    "clock_rate": (_always(0), "core/utils.py: straggler detector"),
    "mem_get_info": (lambda *a: psutil.virtual_memory()[1::-1], "training/training.py"),
}


def _to_cpu(device: Any) -> Any:
    """'cuda', 'cuda:1', a bare index or a cuda torch.device become the CPU; anything else stays."""
    if isinstance(device, torch.device):
        return CPU if device.type == "cuda" else device
    if isinstance(device, str):
        return CPU if device.startswith("cuda") else device
    return CPU if isinstance(device, int) and not isinstance(device, bool) else device


def _on_cpu(function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = _to_cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)  # core/models/common/embeddings/rope_utils.py pins for a copy to the GPU
        return function(*args, **kwargs)

    return wrapper


def _tensor_to(original: Callable) -> Callable:
    @functools.wraps(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") is not None:
            kwargs["device"] = _to_cpu(kwargs["device"])
        return original(self, *(_to_cpu(a) if isinstance(a, (str, torch.device, int)) else a for a in args), **kwargs)

    return to


def _tensor_type(original: Callable) -> Callable:
    """core/optimizer compares `param.type()` with 'torch.cuda.FloatTensor' and its like."""

    @functools.wraps(original)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return original(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return original(self, dtype, *args, **kwargs)

    return type_


def _with_plain_counts(all_to_all: Callable) -> Callable:
    """core/transformer/moe/token_dispatcher.py gives numpy's numbers, which NCCL takes and gloo does not."""

    @functools.wraps(all_to_all)
    def all_to_all_single(
        output: Any, input: Any, output_split_sizes: Any = None, input_split_sizes: Any = None, **kwargs: Any
    ) -> Any:
        counts = [None if sizes is None else list(map(int, sizes)) for sizes in (output_split_sizes, input_split_sizes)]
        return all_to_all(output, input, *counts, **kwargs)

    return all_to_all_single


def _of_unequal_parts(all_gather: Callable) -> Callable:
    """core/tensor_parallel/mappings.py gathers the rows that each rank has for an expert; gloo only as many of each."""

    @functools.wraps(all_gather)
    def gather(parts: list, own: Any, group: Any = None, **kwargs: Any) -> Any:
        if len({part.shape for part in parts}) == 1:
            return all_gather(parts, own, group, **kwargs)
        for rank, part in enumerate(parts):
            if rank == torch.distributed.get_rank(group):
                part.copy_(own)
            torch.distributed.broadcast(part, group=group, group_src=rank)

    return gather


def _to_unequal_parts(reduce_scatter: Callable) -> Callable:
    """The backward pass of that."""

    @functools.wraps(reduce_scatter)
    def scatter(output: Any, parts: list, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        if len({part.shape for part in parts}) == 1:
            return reduce_scatter(output, parts, *args, group=group, **kwargs)
        for rank, part in enumerate(parts):
            torch.distributed.reduce(part, group=group, group_dst=rank)
        output.copy_(parts[torch.distributed.get_rank(group)])

    return scatter


def install() -> None:
    """Install every stand-in. Must run before `megatron` is imported, which keeps some of them by name."""
    for name in GPU_ONLY:
        sys.modules[name] = None  # type: ignore[assignment]  # importing it now raises ImportError
    for name, (replacement, _) in STAND_INS.items():
        setattr(torch.cuda, name, replacement)
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "_lazy_init", "_lazy_call"):
        setattr(torch.cuda.random, name, STAND_INS[name][0])
    torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop = _nothing(), _nothing()  # core/utils.py
    # `with torch.device("meta")` knows factories by identity, and collects them when it is first asked.
    torch.utils._device._device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.to = _tensor_to(torch.Tensor.to)  # type: ignore[method-assign]
    torch.Tensor.type = _tensor_type(torch.Tensor.type)  # type: ignore[method-assign]
    torch.distributed.all_to_all_single = _with_plain_counts(torch.distributed.all_to_all_single)
    torch.distributed.all_gather = _of_unequal_parts(torch.distributed.all_gather)
    torch.distributed.reduce_scatter = _to_unequal_parts(torch.distributed.reduce_scatter)
    # With an "accelerator" the DataLoader would pin memory.
    torch.accelerator.is_available = _always(False)
    # core/jit.py compiles small helpers; dynamo, which reads this when it is imported, would ask CUDA for streams.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # The CPU's random state changes inside Megatron's "GPU" random contexts; here they are the same one.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
