"""Pretrain a YOCO model, or its Transformer baseline, with Megatron's own trainer.

    torchrun --nproc-per-node 8 pretrain_yoco.py --config configs/model/yoco_3b.yaml configs/recipe/3b_1t.yaml \\
        --data-path DATA_text_document --tokenizer-type HuggingFaceTokenizer --tokenizer-model TOKENIZER ...

Every flag of Megatron's pretrain_gpt.py works; `--help` shows ours in the group YOCO. docs/configuration.md has more.
"""

import gc
import os
import sys
from pathlib import Path

gc.disable()  # until all is imported: none of it is garbage

from yoco_megatron.startup.prepare import prepare

prepare()  # before anything imports megatron; also in the processes that write checkpoints

from megatron.core.enums import ModelType
from megatron.training import get_args, get_tokenizer, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args

from yoco_megatron.checkpoint import architecture, safe_unpickling
from yoco_megatron.data import fingerprint
from yoco_megatron.data.provider import build_datasets
from yoco_megatron.model.builder import model_config_from_args
from yoco_megatron.parallel.pipeline.stages import StagePlan
from yoco_megatron.resilience import exit_record, run_folder
from yoco_megatron.startup import arguments
from yoco_megatron.training.step import forward_step
from yoco_megatron.upstream import checkpointing
from yoco_megatron.upstream.resilience_hooks import run_folder_kept
from yoco_megatron.upstream.training_loop import (
    compile_what_is_called,
    count_yoco,
    schedule_steps,
    skip_batches,
    take_norms_of_cudnn,
)

# All that was imported stays to the end. Later collections, and those with which the interpreter ends, leave it out.
gc.freeze()
gc.enable()


def datasets_provider(num_samples, vp_stage=None):
    """(train, validation, test) datasets of the run."""
    return build_datasets(get_args(), get_tokenizer(), num_samples)


datasets_provider.is_distributed = True


def main(argv: list[str]) -> None:
    """Train as the command line says.

    Raises:
        ValueError: a mistake in the command line or in the files it names, before anything is started.
    """
    args = arguments.parse(argv)
    arguments.check_machine(args)
    arguments.check_run(args)
    arguments.check_started()
    if args.run_folder and args.rank == 0:
        run_folder.make(Path(args.run_folder))
    if args.rank == 0:
        arguments.check_writable(args)
    arguments.finalize(args)
    with arguments.refusals():
        model = model_config_from_args(args)
    if args.rank == 0 and args.architecture == "yoco" and args.pipeline_model_parallel_size > 1:
        print(arguments.pipeline_table(args, StagePlan.from_config(model.transformer)))
    if args.save and args.rank == 0:
        arguments.save_resolved_config(args, args.save)
        architecture.save(args, args.save)
        fingerprint.save(args, args.save)
    safe_unpickling.install()
    checkpointing.install()
    count_yoco()
    schedule_steps()
    skip_batches()
    compile_what_is_called()
    take_norms_of_cudnn(args)
    with run_folder_kept(args):
        pretrain(
            pretrain_cfg_container_from_args(args, model),
            datasets_provider,
            ModelType.encoder_or_decoder,
            forward_step,
        )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Exception as error:
        how = exit_record.record_exception(sys.argv, error)
        if how.kind == "crash" or os.environ.get("YOCO_TRACEBACK"):
            raise
        if os.environ.get("RANK", "0") == "0" or how.kind == "storage":
            print(f"pretrain_yoco.py: error: {error}", file=sys.stderr)
        sys.exit(how.code)
