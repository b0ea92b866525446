"""Pretrain a YOCO model, or its Transformer baseline, with Megatron's own trainer.

    torchrun --nproc-per-node 8 pretrain_yoco.py --config configs/model/yoco_3b.yaml configs/recipe/3b_1t.yaml \\
        --data-path DATA_text_document --tokenizer-type HuggingFaceTokenizer --tokenizer-model TOKENIZER ...

The flags are those of Megatron's pretrain_gpt.py, and ours, which `--help-yoco` shows alone. docs/flags.md says
which work, and which are refused; docs/configuration.md has more.
"""

import gc
import os
import sys

gc.disable()  # until all is imported: none of it is garbage

from yoco_megatron.startup.prepare import prepare

prepare()  # before anything imports megatron; also in the processes that write checkpoints

from megatron.core.enums import ModelType
from megatron.training import get_args, get_tokenizer, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args

from yoco_megatron import upstream
from yoco_megatron.data.provider import build_datasets
from yoco_megatron.distillation import builder as distillation
from yoco_megatron.evaluation import in_training
from yoco_megatron.resilience import exit_record, run_lock, secrets
from yoco_megatron.startup import agreement
from yoco_megatron.startup.arguments import parse_and_validate
from yoco_megatron.startup.record import record_run
from yoco_megatron.training.step import forward_step
from yoco_megatron.upstream import log_lines, quiet, throughput
from yoco_megatron.upstream.resilience_hooks import managed_run

# All that was imported stays to the end. Later collections, and those with which the interpreter ends, leave it out.
gc.freeze()
gc.enable()


def datasets_provider(num_samples, vp_stage=None):
    """(train, validation, test) datasets of the run."""
    datasets = build_datasets(get_args(), get_tokenizer(), num_samples)
    log_lines.measure_text(datasets[1])
    return datasets


datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def main(argv: list[str]) -> None:
    """Train as the command line says.

    Raises:
        ValueError: a mistake in the command line or in the files it names, before anything is started.
    """
    try:
        args, model = parse_and_validate(argv)
        model = distillation.prepare(args, model)
        in_training.prepare(args)
        record_run(args, model)
        upstream.install(args)
        with managed_run(args):
            pretrain(
                pretrain_cfg_container_from_args(args, model),
                datasets_provider,
                ModelType.encoder_or_decoder,
                forward_step,
            )
    finally:
        run_lock.release()
        quiet.end()
        throughput.close_curves()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Exception as error:
        how = exit_record.record_exception(sys.argv, error)
        if how.kind == "crash" or os.environ.get("YOCO_TRACEBACK"):
            raise
        if how.kind == "storage" or agreement.tells_error():
            print(f"pretrain_yoco.py: error: {secrets.redact(str(error))}", file=sys.stderr)
        sys.exit(how.code)
