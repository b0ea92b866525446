"""From the flags to a student beside its teacher: what --teacher changes of a run."""

from argparse import Namespace
from dataclasses import dataclass, fields
from math import prod
from typing import Any, ClassVar

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import get_tokenizer
from megatron.training.models.gpt import GPTModelConfig

from yoco_megatron.distillation import teacher_model
from yoco_megatron.distillation.beside_teacher import YOCOBesideTeacher
from yoco_megatron.distillation.distilled_model import DistilledYOCO
from yoco_megatron.distillation.transfer_model import TransferYOCO
from yoco_megatron.model.builder import YOCOModelBuilder, YOCOModelConfig
from yoco_megatron.model.yoco_model import YOCOModel
from yoco_megatron.startup import agreement
from yoco_megatron.upcycling.teacher import Teacher, open_teacher
from yoco_megatron.utils.errors import require


@dataclass(kw_only=True)
class TransferModelConfig(YOCOModelConfig):
    """A student's, and what it learns from."""

    builder: ClassVar[str] = "yoco_megatron.distillation.builder.TransferModelBuilder"
    teacher: Teacher


@dataclass(kw_only=True)
class DistilledModelConfig(TransferModelConfig):
    """The same for distillation."""

    builder: ClassVar[str] = "yoco_megatron.distillation.builder.DistilledModelBuilder"
    temperature: float


class TransferModelBuilder(YOCOModelBuilder):
    """Builds a `TransferYOCO` with its teacher."""

    model_class: type[YOCOBesideTeacher] = TransferYOCO

    def build_model(self, pg_collection: ProcessGroupCollection, *args: Any, **kwargs: Any) -> YOCOModel:
        """One process's part of both; the student's with its initial weights."""
        student, config = super().build_model(pg_collection, *args, **kwargs), self._model_config
        assert isinstance(student, YOCOBesideTeacher)
        teacher = teacher_model.build(student, config.teacher, pg_collection, student.vp_stage)
        options = {"temperature": config.temperature} if isinstance(config, DistilledModelConfig) else {}
        student.attach(teacher, **options)
        return student


class DistilledModelBuilder(TransferModelBuilder):
    """Builds a `DistilledYOCO` with its teacher."""

    model_class = DistilledYOCO


@agreement.of_all_ranks()
def prepare(args: Namespace, model: GPTModelConfig) -> GPTModelConfig:
    """What builds the model, beside the teacher of --teacher if that is given. Megatron's globals are set.

    Raises:
        ValueError: no teacher there, or one that does not fit the student or the mesh.
    """
    if args.teacher is None:
        return model
    teacher = open_teacher(args.teacher)
    check(args, teacher)
    if args.rank == 0:
        print(f"{describe(teacher)}; its forward pass is in no figure of FLOP/s or MFU", flush=True)
    own = {field.name: getattr(model, field.name) for field in fields(model)}
    if not args.attention_transfer:
        return DistilledModelConfig(**own, teacher=teacher, temperature=args.distillation_temperature)
    check_transfer(args, teacher)
    args.cross_decoder_positions = "all"  # every position's attention is compared
    return TransferModelConfig(**own, teacher=teacher)


def describe(teacher: Teacher) -> str:
    """What it is, and its size."""
    weights = sum(prod(shape) for shape, _ in teacher.found.values())
    return f"teacher: {teacher.folder}, a {teacher.config.model_type} of {weights:,} parameters, frozen"


def check_transfer(args: Namespace, teacher: Teacher) -> None:
    """Raises ValueError, naming the flag, for what attention transfer cannot do."""
    name, config = f"--attention-transfer from --teacher {teacher.folder}", teacher.config
    for flag, own, of_teacher in (
        ("--num-layers", args.num_layers, config.num_hidden_layers),
        ("--hidden-size", args.hidden_size, config.hidden_size),
    ):
        require(own == of_teacher, f"{name} goes layer by layer: {flag} {own} must be the teacher's {of_teacher}")
    require(
        args.cross_decoder_pattern is None,
        f"{name} compares attention, which gated memory units have none of: remove --cross-decoder-pattern",
    )
    require(not args.fp8, f"{name} is for bf16 and fp32: remove --fp8-format; distillation takes it")
    require(
        args.recompute_granularity != "full",
        f"{name} stores activations of the mixers alone: remove --recompute-granularity full",
    )
    require(
        args.evaluate_suite is None,
        f"{name} trains no language model: remove --evaluate-suite, and evaluate after distillation",
    )


def check(args: Namespace, teacher: Teacher) -> None:
    """Raises ValueError, naming the flag, where student, teacher and mesh do not fit."""
    folder, config, tp = teacher.folder, teacher.config, args.tensor_model_parallel_size
    name = f"--teacher {folder}"
    require(args.architecture == "yoco", f"{name} is for a YOCO: remove it, or --architecture transformer")
    require(0 <= args.distillation_weight <= 1, f"--distillation-weight {args.distillation_weight} must be from 0 to 1")
    require(
        args.distillation_temperature > 0, f"--distillation-temperature {args.distillation_temperature} must be above 0"
    )
    require(
        args.loss_chunk_size > 0,
        f"{name} needs the loss in chunks: remove --loss-chunk-size 0, --fp16-lm-cross-entropy and "
        "--cross-entropy-loss-fusion",
    )
    require(not args.z_loss_coeff, f"{name} has losses of its own: remove --z-loss-coeff {args.z_loss_coeff}")
    ids = get_tokenizer().vocab_size
    require(
        ids <= config.vocab_size <= args.padded_vocab_size,
        f"{name} has a vocabulary of {config.vocab_size}, the tokenizer one of {ids}, and the model one of "
        f"{args.padded_vocab_size}: train with the teacher's tokenizer",
    )
    require(
        args.pipeline_model_parallel_size == 1 or config.num_hidden_layers == args.num_layers,
        f"{name} has {config.num_hidden_layers} layers, and the student {args.num_layers}: pipeline stages hold the "
        "same layers of both; set --pipeline-model-parallel-size 1",
    )
    require(
        not teacher.is_mixed or teacher.window >= args.seq_length,
        f"{name} has windows of {teacher.window} in some layers alone: a teacher has them in all layers or in none; or "
        f"--seq-length {teacher.window}",
    )
    for what, size in (
        ("heads", config.num_attention_heads),
        ("K,V heads", config.num_key_value_heads),
        ("intermediate_size", config.intermediate_size),
    ):
        require(size % tp == 0, f"{name}: --tensor-model-parallel-size {tp} does not divide its {size} {what}")
