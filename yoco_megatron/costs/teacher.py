"""The frozen teacher beside a student (--teacher): its sizes, and what it adds to memory and to a step.

It is in the dtype of training, on the student's mesh, each stage with the same layers of both. A rank holds

    its weights; of a micro-batch in flight the hidden states that arrived and, for the loss, the last ones: e h' each
    and for a moment, while its forward pass goes through a layer: e (3 h' + 3 F') and the K,V of context parallelism

with h', F' its widths and e bytes a value. The loss makes logits of both models. No gradient, optimizer or recompute.
With --attention-transfer only the student's attention is trained, layer by layer beside the teacher's, without a head.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from yoco_megatron.costs.shape import ModelShape
from yoco_megatron.costs.stage_time import Parts, of_rank, stage_parameters
from yoco_megatron.utils import small_files
from yoco_megatron.utils.errors import require

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def teacher_shape(args: Namespace, shape: ModelShape) -> ModelShape | None:
    """The sizes of the Transformer in the folder --teacher, with the student's vocabulary and lengths; None without it.

    Its layers see the whole sequence, those of a window, too.

    Raises:
        BadFile: its config.json cannot be read here.
        ValueError: it describes no such model.
    """
    if args.teacher is None:
        return None
    return _shape(args.teacher, shape.padded_vocab_size, shape.seq_length, shape.num_queries)


def check_mesh(args: Namespace, shape: ModelShape) -> None:
    """Raises ValueError, naming the flag, where teacher, student and mesh do not fit."""
    teacher, name = teacher_shape(args, shape), f"--teacher {args.teacher}"
    if teacher is None:
        require(not args.attention_transfer, "--attention-transfer needs --teacher")
        return
    require(shape.architecture == "yoco", f"{name} is for a YOCO: remove it, or --architecture transformer")
    require(not shape.mtp_num_layers, f"{name} goes without --mtp-num-layers")
    have = f"{name} has {teacher.num_layers} layers, and the student {shape.num_layers}"
    alike, pp = teacher.num_layers == shape.num_layers, args.pipeline_model_parallel_size
    require(alike or not args.attention_transfer, f"{have}: --attention-transfer goes layer by layer")
    require(
        alike or pp == 1,
        f"{have}: pipeline stages hold the same layers of both; set --pipeline-model-parallel-size 1",
    )
    full = args.recompute_granularity == "full"
    require(not (args.attention_transfer and full), "--attention-transfer: remove --recompute-granularity full")
    require(not (args.attention_transfer and args.fp8), "--attention-transfer: remove --fp8-format")
    tp = args.tensor_model_parallel_size
    require(divides(tp, teacher), f"{name}: --tensor-model-parallel-size {tp} does not divide its heads or widths")


def divides(tensor_parallel: int, teacher: ModelShape) -> bool:
    """Whether tensor parallelism does, heads and widths."""
    sizes = (teacher.num_attention_heads, teacher.num_query_groups, teacher.ffn_hidden_size)
    return all(size % tensor_parallel == 0 for size in sizes)


@cache
def _shape(folder: str, vocabulary: int | None, seq_length: int, num_queries: int | None) -> ModelShape:
    config = _config(folder)
    heads = config["num_attention_heads"]
    return ModelShape(
        architecture="transformer",
        self_decoder="sliding_window",
        num_layers=config["num_hidden_layers"],
        num_self_decoder_layers=0,
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        kv_channels=config.get("head_dim") or config["hidden_size"] // heads,
        self_decoder_heads=0,
        self_decoder_head_dim=0,
        self_decoder_query_groups=0,
        self_decoder_window=0,
        padded_vocab_size=vocabulary,
        seq_length=seq_length,
        tied=bool(config.get("tie_word_embeddings")),
        qk_layernorm=config["model_type"] == "qwen3",
        add_qkv_bias=config["model_type"] == "qwen2",
        num_queries=num_queries,
    )


@cache
def _config(folder: str) -> dict[str, Any]:
    try:
        content = small_files.read_json(Path(folder, "config.json"))
    except small_files.BadFile as error:
        raise small_files.BadFile(f"--teacher {error}") from None
    name, sizes = f"--teacher {folder}: its config.json", ("num_hidden_layers", "hidden_size", "intermediate_size")
    family = content.get("model_type")
    require(family in FAMILIES, f"{name} says model_type {family!r}; known here are {', '.join(FAMILIES)}")
    for key in (*sizes, "num_attention_heads", "num_key_value_heads", "head_dim"):
        # Old files lack these two, and their families have no defaults of their own.
        may_lack = (key, family) == ("num_key_value_heads", "llama") or (key == "head_dim" and family != "qwen3")
        value = content.get(key)
        is_size = type(value) is int and value > 0
        require(is_size or (value is None and may_lack), f"{name} has {key} {value!r}, where a size should be")
    return content


@dataclass(frozen=True)
class TeacherMemory:
    """Bytes of a teacher on one rank."""

    args: Namespace
    student: ModelShape
    shape: ModelShape
    bytes_per_value: int

    def weights(self, chunks: Sequence[Parts]) -> float:
        """Between steps, of a rank that holds these chunks of the student."""
        held = of_rank([teacher_parts(chunk, self.student, self.shape) for chunk in chunks])
        return self.bytes_per_value * stage_parameters(held, self.shape) / self.args.tensor_model_parallel_size

    def stored(self, chunk: Parts, tokens: float, rows: float, split: int) -> float:
        """Of one micro-batch until its backward pass; `rows`: positions with a loss, `split`: ranks that share the
        hidden states between layers."""
        if self.args.attention_transfer:
            return 0.0
        arrived = 0.0 if chunk.get("embedding") else tokens / split
        return self.bytes_per_value * self.shape.hidden_size * (arrived + rows * bool(chunk.get("output_layer")))

    def crossing(self, tokens: float, split: int) -> float:
        """Of a tensor between stages."""
        return 0.0 if self.args.attention_transfer else self.bytes_per_value * self.shape.hidden_size * tokens / split

    def layer_in_forward(self, tokens: float, split: int) -> float:
        """While the forward pass goes through one of its layers."""
        tp, cp, shape = self.args.tensor_model_parallel_size, self.args.context_parallel_size, self.shape
        hidden = shape.hidden_size * (2 / split + 1)
        kv = 2 * cp * shape.kv_width / tp if cp > 1 else 0.0
        values = hidden + 3 * shape.ffn_hidden_size / tp + kv
        compared = 8 * shape.hidden_size / split if self.args.attention_transfer else 0.0  # both outputs in fp32
        return tokens * (self.bytes_per_value * values + compared)


def teacher_parts(stage: Parts, student: ModelShape, teacher: ModelShape) -> Parts:
    """What of the teacher stands beside a stage of the student: the same layers, and both ends."""
    ends = {name: stage.get(name, 0) for name in ("embedding", "output_layer")}
    if all(ends.values()):  # alone it may have another number of layers
        return {"decoder": teacher.num_layers} | ends
    return {"decoder": stage.get("self_decoder", 0) + stage.get("cross_decoder", 0)} | ends
