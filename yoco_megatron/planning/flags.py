"""The flags of pretrain_yoco.py that decide memory and speed, read without Megatron, whose import takes seconds.

tests/planning/test_flags.py holds names, types and defaults against Megatron's own parser. Every other flag of the
table of flags is taken and has no effect here, whatever its value, unless training refuses it; one that the table lacks
is an error.
"""

import argparse
import functools
import math
from dataclasses import Field, fields
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from yoco_megatron.config import experts, numbers
from yoco_megatron.config import flags as table
from yoco_megatron.config.resolve import resolve_loss_chunk
from yoco_megatron.config.rules import MATRIX_OPTIMIZERS
from yoco_megatron.config.yaml_files import load_config_files, to_argv
from yoco_megatron.config.yoco_fields import YOCOFields
from yoco_megatron.utils.errors import nearest, require

# Megatron's, and two of distillation: flag -> (type, default). A type of bool is a switch, and one that starts with
# "no-" turns its field off; a tuple has the words to choose from, and a list those of which there may be several.
Kind = type | tuple[str, ...] | list[str]
MEGATRONS: dict[str, tuple[Kind, Any]] = {
    "num-layers": (int, None),
    "hidden-size": (int, None),
    "ffn-hidden-size": (int, None),
    "num-attention-heads": (int, None),
    "num-experts": (int, None),
    "moe-layer-freq": (str, 1),
    "moe-ffn-hidden-size": (int, None),
    "moe-router-topk": (int, 2),
    "moe-shared-expert-intermediate-size": (int, None),
    "moe-shared-expert-gate": (bool, False),
    "moe-router-load-balancing-type": (
        ["aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "quantile_balancing", "none"],
        "aux_loss",
    ),
    "moe-aux-loss-coeff": (list, 0.0),
    "moe-z-loss-coeff": (float, None),
    "moe-token-dispatcher-type": (("allgather", "alltoall", "flex"), "allgather"),
    "moe-grouped-gemm": (bool, False),
    "expert-model-parallel-size": (int, 1),
    "expert-tensor-parallel-size": (int, None),
    "calculate-per-token-loss": (bool, False),
    "mamba-num-heads": (int, None),
    "mamba-head-dim": (int, 64),
    "mamba-state-dim": (int, 128),
    "mamba-num-groups": (int, 8),
    "mtp-num-layers": (int, None),
    "mtp-loss-scaling-factor": (float, 0.1),
    "group-query-attention": (bool, False),
    "num-query-groups": (int, 1),
    "kv-channels": (int, None),
    "qk-layernorm": (bool, False),
    "add-qkv-bias": (bool, False),
    "seq-length": (int, None),
    "max-position-embeddings": (int, None),
    "untie-embeddings-and-output-weights": (bool, False),
    "vocab-size": (int, None),
    "make-vocab-size-divisible-by": (int, 128),
    "tokenizer-type": (str, None),
    "micro-batch-size": (int, None),
    "global-batch-size": (int, None),
    "train-iters": (int, None),
    "train-samples": (int, None),
    "lr-warmup-iters": (int, 0),
    "lr-decay-iters": (int, None),
    "bf16": (bool, False),
    "fp16": (bool, False),
    "fp8-format": (("e4m3", "hybrid"), None),
    "fp8-param-gather": (bool, False),
    "fp8-recipe": (("tensorwise", "delayed", "mxfp8", "blockwise", "custom"), "delayed"),
    "optimizer": (str, "adam"),
    "muon-num-ns-steps": (int, 5),
    "optimizer-cpu-offload": (bool, False),
    "overlap-param-gather-with-optimizer-step": (bool, False),
    "use-distributed-optimizer": (bool, False),
    "use-precision-aware-optimizer": (bool, False),
    "tensor-model-parallel-size": (int, 1),
    "sequence-parallel": (bool, False),
    "tp-comm-overlap": (bool, False),
    "pipeline-model-parallel-size": (int, 1),
    "num-virtual-stages-per-pipeline-rank": (int, None),
    "num-layers-per-virtual-pipeline-stage": (int, None),
    "decoder-first-pipeline-num-layers": (int, None),
    "decoder-last-pipeline-num-layers": (int, None),
    "pipeline-model-parallel-layout": (str, None),
    "account-for-embedding-in-pipeline-split": (bool, False),
    "account-for-loss-in-pipeline-split": (bool, False),
    "context-parallel-size": (int, 1),
    "recompute-activations": (bool, False),
    "recompute-granularity": (("full", "selective"), None),
    "recompute-method": (("uniform", "block"), None),
    "recompute-num-layers": (int, None),
    "recompute-modules": (list, None),
    "deterministic-mode": (bool, False),
    "transformer-impl": (("local", "transformer_engine", "inference_optimized"), "transformer_engine"),
    "mlp-chunks-for-training": (int, 1),
    "loss-scale": (float, None),
    "initial-loss-scale": (float, 2**32),
    "min-loss-scale": (float, 1.0),
    "attention-dropout": (float, 0.0),
    "hidden-dropout": (float, 0.0),
    "dataloader-inter-document-masking": (bool, False),
    "timing-log-level": (int, 0),
    "cuda-graph-impl": (("none", "local", "transformer_engine", "full_iteration"), "none"),
    "fp16-lm-cross-entropy": (bool, False),
    "cross-entropy-loss-fusion": (bool, False),
    "no-gradient-accumulation-fusion": (bool, True),
    "teacher": (str, None),
    "attention-transfer": (bool, False),
}
DESTINATIONS = {"fp8-format": "fp8"}
# Flags that change sizes which the formulas take as they are without them: {field: default}.
NOT_COUNTED = {
    "optimizer_cpu_offload": False,
    "grad_reduce_in_bf16": False,
    "fp32_residual_connection": False,
    "first_last_layers_bf16": False,
    "main_grads_dtype": "fp32",
    "main_params_dtype": "fp32",
    "exp_avg_dtype": "fp32",
    "exp_avg_sq_dtype": "fp32",
}


class _Unread(argparse.Action):
    """Stores what stands behind a flag of which nothing is known but its name: True, a word, or several."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        """A config's false is as if it were not there."""
        if values != ["False"]:
            setattr(namespace, self.dest, (values or [True])[0] if len(values) < 2 else values)


@functools.cache
def build_parser() -> argparse.ArgumentParser:
    """Of the flags above and those of a YOCO; the other ones of the table are taken."""
    parser = argparse.ArgumentParser(prog="plan.py", add_help=False, allow_abbrev=False)

    def error(message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            flag = message.split(": ", 1)[1].split()[0]
            message += nearest(flag, parser._option_string_actions)
        raise ValueError(message)

    parser.error = error  # type: ignore[method-assign]
    for flag, (kind, default) in (MEGATRONS | _of_yoco()).items():
        dest = DESTINATIONS.get(flag, flag.removeprefix("no-").replace("-", "_"))
        if kind is bool:
            action = "store_false" if flag.startswith("no-") else "store_true"
            parser.add_argument(f"--{flag}", dest=dest, action=action)
        elif kind is list or isinstance(kind, list):
            words = kind if isinstance(kind, list) else None
            parser.add_argument(f"--{flag}", dest=dest, nargs="+", choices=words, default=default)
        elif isinstance(kind, tuple):
            parser.add_argument(f"--{flag}", dest=dest, type=str, choices=kind, default=default)
        else:
            parser.add_argument(f"--{flag}", dest=dest, type=kind, default=default)
    for field in _read_as_told():
        told = dict(field.metadata["argparse_meta"])
        parser.add_argument(*told.pop("arg_names"), dest=field.name, default=field.default, **told)
    for entry in table.table():
        for flag in entry.flags:
            if f"--{flag}" not in parser._option_string_actions and flag != "config":
                parser.add_argument(f"--{flag}", nargs="*", action=_Unread, default=argparse.SUPPRESS)
    return parser


def parse(argv: list[str], gpus: int) -> tuple[argparse.Namespace, dict[str, Any]]:
    """(arguments as Megatron names them, with `world_size` and `padded_vocab_size`; the fields that `argv` sets itself,
    without --config).

    Raises:
        ValueError: a flag that does not exist, a value of the wrong type or that no size can have, a config that cannot
            be read, sizes missing, what training refuses of any machine and mesh, what formulas do not know.
    """
    parser = build_parser()
    config_only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_only.add_argument("--config", action="append", nargs="+", default=[])
    config_only.error = parser.error  # type: ignore[method-assign]
    given, rest = config_only.parse_known_args(argv)
    configs = to_argv(load_config_files([source for group in given.config for source in group]), parser)
    args = parser.parse_args([*configs, *rest])
    numbers.check(args, parser)
    _check_effects(args, _named([*configs, *rest]), parser)
    actions = [parser._option_string_actions[f"--{name}"] for name in _named(rest)]
    own = {action.dest: getattr(args, action.dest) for action in actions if hasattr(args, action.dest)}
    if isinstance(args.moe_layer_freq, str):
        args.moe_layer_freq = experts.layer_freq(args.moe_layer_freq)
    if isinstance(args.moe_aux_loss_coeff, list):
        try:
            args.moe_aux_loss_coeff = [float(weight) for weight in args.moe_aux_loss_coeff]
        except ValueError:
            raise ValueError(f"--moe-aux-loss-coeff {' '.join(args.moe_aux_loss_coeff)} is no number") from None
    require(args.num_layers is not None, "no model: name its file, for example --config configs/model/yoco_3b.yaml")
    for dest in ("vocab_size", "seq_length", "global_batch_size", "micro_batch_size"):
        require(getattr(args, dest) is not None, f"--{dest.replace('_', '-')} is missing: set it")
    require(
        args.optimizer in ("adam", *MATRIX_OPTIMIZERS),
        f"--optimizer {args.optimizer}: plans count the memory of adam, muon and lion alone",
    )
    require(gpus >= 1, f"--gpus {gpus} must be at least 1")
    args.world_size, args.has_loss_masks = gpus, False
    if args.recompute_activations:
        args.recompute_granularity = "selective"
    set_padded_vocab_size(args)
    resolve_loss_chunk(args)
    return args, own


def _named(argv: list[str]) -> list[str]:
    """The flags in it, without their dashes."""
    return list(dict.fromkeys(word.partition("=")[0][2:] for word in argv if word.startswith("--")))


def _check_effects(args: argparse.Namespace, names: list[str], parser: argparse.ArgumentParser) -> None:
    """As startup/checks.py does, of the flags that are known here; `names`: of those that were given."""
    unread = {action.dest for action in parser._actions if isinstance(action, _Unread)}
    given = {name: None for name in names if hasattr(args, parser._option_string_actions[f"--{name}"].dest)}
    said = argparse.Namespace(**vars(args), resolved_config=given)
    refused = table.refusals(said, parser, args.architecture, alone=unread)
    require(not refused, f"{'; '.join(refused)} (docs/flags.md has every flag)")
    for flag in uncounted(args):
        raise ValueError(f"{flag}: plans do not count what it changes; remove it")


def uncounted(args: argparse.Namespace) -> list[str]:
    """The flags that change sizes which the formulas take as they are without them; also of Megatron's own parser."""
    same = {"torch.float32": "fp32"}  # what that makes of a word
    values = {dest: (getattr(args, dest, default), default) for dest, default in NOT_COUNTED.items()}
    return [
        f"--{dest.replace('_', '-')}"
        for dest, (value, default) in values.items()
        if same.get(str(value), value) != default
    ]


def set_padded_vocab_size(args: argparse.Namespace) -> None:
    """As Megatron pads it, for this tensor parallelism."""
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    args.padded_vocab_size = math.ceil(args.vocab_size / multiple) * multiple


def _read_as_told() -> list[Field]:
    """The fields of a YOCO that say themselves how they are read."""
    return [field for field in fields(YOCOFields) if "argparse_meta" in field.metadata]


def _of_yoco() -> dict[str, tuple[Kind, Any]]:
    """The fields of a YOCO, in the form of MEGATRONS."""
    hints = get_type_hints(YOCOFields)
    found: dict[str, tuple[Kind, Any]] = {}
    for field in fields(YOCOFields):
        if field in _read_as_told():
            continue
        flag = field.name.replace("_", "-")
        if hints[field.name] is bool:
            found[f"no-{flag}" if field.default else flag] = (bool, field.default)
        else:
            number = hints[field.name] in (int, float, int | None)
            words = get_args(hints[field.name]) if get_origin(hints[field.name]) is Literal else str
            found[flag] = (float if hints[field.name] is float else int if number else words, field.default)
    return found
