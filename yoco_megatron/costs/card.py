"""`Card`: how fast a GPU is in training, and its links; read from a file, of which two are here (cards/).

    Card.of("h100")            # cards/h100.yaml
    Card.of("my_node.yaml")    # as `tools/plan.py calibrate` writes it

A file has the fields of `Card`, all of them, in the units of their names.
"""

import math
from argparse import Namespace
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

from yoco_megatron.config.yaml_files import load_config_file
from yoco_megatron.costs.stage_time import Rates
from yoco_megatron.mixers import MIXERS
from yoco_megatron.utils.errors import nearest
from yoco_megatron.utils.small_files import BadFile, mismatch

SHIPPED = {path.stem: path for path in sorted((Path(__file__).parent / "cards").glob("*.yaml"))}
TRANSFORMER_LAUNCH = 0.92  # of a YOCO layer's: 3B at 512 tokens a micro-batch, which the host bounds
FP8_LAUNCH_MS = 1.7  # more a layer with FP8: 3B at micro-batch 1
CONTEXT_RATE = 0.92  # of attention with context parallelism: in parts, whose results are merged
BLOCKWISE_RATE = 0.84  # of FP8's other recipes, whose products have one scale a tensor


@dataclass(frozen=True)
class Link:
    """A way between GPUs."""

    bytes_per_second: float
    """That a rank sends in a ring of all-gathers or reduce-scatters."""
    latency: float
    """Seconds of a message."""

    def seconds(self, size: float) -> float:
        """For `size` bytes a rank."""
        return size / self.bytes_per_second + self.latency


@dataclass(frozen=True)
class Card:
    """A GPU in a node. Rates are those of training, below what one kernel reaches alone."""

    name: str
    source: str
    """Where the figures come from."""
    memory_gib: float
    """That a process can allocate."""
    peak_tflops: float
    """By the data sheet, bf16 without sparsity: MFU is a share of it."""
    linear_tflops: float
    """Of the layers' matrix products in bf16."""
    linear_fp8_tflops: float
    """In FP8, without casts."""
    head_in_chunks_tflops: float
    """Of head and loss in chunks (--loss-chunk-size)."""
    head_at_once_tflops: float
    """And with Megatron's loss."""
    attention_tflops: dict[int, float]
    """{tokens: TFLOP/s} of causal attention; between these it grows with the logarithm of the length."""
    mixing_tflops: dict[str, float]
    """Of the self-decoder's mixers, {name: TFLOP/s}."""
    elementwise_ps: float
    """As `Rates.elementwise`: for a token and value of hidden and FFN width, forward."""
    cast_ps: float
    """To cast a value of a linear layer's input or output gradient to FP8."""
    optimizer_ps: float
    """For a parameter of a rank's shard."""
    step_ms: float
    """Of a step, in which no kernel runs."""
    step_layer_ms: float
    """And for each layer of a rank, whose parameters and gradients the host goes through."""
    launch_ms: float
    """Of the host for the kernels of a YOCO layer, forward and backward, where one process trains alone."""
    launch_of_many_ms: float
    """The same of each of several."""
    launch_context_ms: float
    """More with context parallelism."""
    launch_tensor_pipeline_ms: float
    """More with tensor and pipeline parallelism together: ranks wait for each other's hosts."""
    launch_chunk_ms: float
    """More for a micro-batch on each chunk of a pipeline rank."""
    node_gb_per_s: float
    node_latency_us: float
    network_gb_per_s: float
    """Between nodes, for each GPU."""
    network_latency_us: float
    gpus_per_node: int
    watts: float
    """Of the GPU at full load, by its data sheet."""

    @classmethod
    def of(cls, name: str) -> "Card":
        """A card by its name here, or by its file.

        Raises:
            ValueError: no such card; a file that lacks a field or has one too many, or a figure that is none.
        """
        path = SHIPPED.get(name, Path(name))
        try:
            content = {key.replace("-", "_"): value for key, value in load_config_file(path).items()}
        except BadFile as error:
            raise ValueError(f"--card {error}: give one of {', '.join(SHIPPED)} or the file of a card") from None
        kinds = get_type_hints(cls)
        for key in content:
            if key not in kinds:
                raise ValueError(f"--card {path}: no figure {key!r}{nearest(key, kinds)}")
        for field in fields(cls):
            if field.name not in content:
                raise ValueError(f"--card {path}: {field.name} is missing: take it from {SHIPPED['h100']}")
            value = content[field.name]
            wrong = mismatch(value, kinds[field.name], field.name) or _not_positive(field.name, value)
            if wrong:
                raise ValueError(f"--card {path}: {wrong}")
        if not all(type(length) is int and length > 0 for length in content["attention_tflops"]):
            raise ValueError(f"--card {path}: attention_tflops: write {{tokens: TFLOP/s, ...}}")
        for mixer in content["mixing_tflops"]:
            if mixer not in MIXERS:
                raise ValueError(f"--card {path}: mixing_tflops: no mixer {mixer!r}{nearest(str(mixer), MIXERS)}")
        return cls(**content)

    @property
    def peak(self) -> float:
        """FLOP/s."""
        return self.peak_tflops * 1e12

    def link(self, span: int) -> Link:
        """Between ranks of a group that `span` neighbouring GPUs hold."""
        if span <= self.gpus_per_node:
            return Link(self.node_gb_per_s * 1e9, self.node_latency_us * 1e-6)
        return Link(self.network_gb_per_s * 1e9, self.network_latency_us * 1e-6)

    def rates(self, args: Namespace) -> Rates:
        """Of these flags."""
        linear = self.linear_tflops
        if args.fp8:
            linear = self.linear_fp8_tflops * (BLOCKWISE_RATE if args.fp8_recipe == "blockwise" else 1.0)
        attention = _between(self.attention_tflops, args.seq_length)
        if args.context_parallel_size > 1:
            attention *= CONTEXT_RATE
        head = self.head_in_chunks_tflops if args.loss_chunk_size else self.head_at_once_tflops
        return Rates(
            linear=linear * 1e12,
            attention=attention * 1e12,
            output_layer=head * 1e12,
            elementwise=self.elementwise_ps * 1e-12 * (1.05 if args.recompute_elementwise else 1.0),
            cast=self.cast_ps * 1e-12 if args.fp8 else 0.0,
            mixing={mixer: rate * 1e12 for mixer, rate in self.mixing_tflops.items()},
        )

    def launch(self, args: Namespace) -> float:
        """Seconds of the host for the kernels of a layer, forward and backward, without recompute."""
        bf16 = self.launch_ms if args.world_size == 1 else self.launch_of_many_ms
        if args.context_parallel_size > 1:
            bf16 += self.launch_context_ms
        if args.tensor_model_parallel_size > 1 and args.pipeline_model_parallel_size > 1:
            bf16 += self.launch_tensor_pipeline_ms
        bf16 *= TRANSFORMER_LAUNCH if args.architecture == "transformer" else 1.0
        return (bf16 + (FP8_LAUNCH_MS if args.fp8 else 0.0)) * 1e-3


def _not_positive(name: str, value: Any) -> str | None:
    """What is no positive, finite number in a figure or in a mapping to figures."""
    figures = list(value.values()) if isinstance(value, dict) else [] if isinstance(value, str) else [value]
    wrong = [figure for figure in figures if not 0 < figure < math.inf]
    if wrong:
        return f"{name} {wrong[0]} is no positive number"
    return None if figures or isinstance(value, str) else f"{name} is empty"


def _between(rates: dict[int, float], length: int) -> float:
    points = sorted(rates.items())
    if length <= points[0][0]:
        return points[0][1]
    for (shorter, low), (longer, high) in pairwise(points):
        if length <= longer:
            return low + (high - low) * math.log(length / shorter) / math.log(longer / shorter)
    return points[-1][1]


H100 = Card.of("h100")
