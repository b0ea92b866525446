"""What a run says and writes before its first step."""

from argparse import Namespace
from pathlib import Path

import yaml
from megatron.training import get_tokenizer
from megatron.training.models.gpt import GPTModelConfig

from yoco_megatron.checkpoint import architecture
from yoco_megatron.checkpoint.layout import RESOLVED
from yoco_megatron.costs.shape import ModelShape
from yoco_megatron.costs.stage_time import part_seconds_of_run
from yoco_megatron.data import carried_tokenizer, fingerprint
from yoco_megatron.data.document_ends import document_start
from yoco_megatron.parallel.pipeline import planner
from yoco_megatron.parallel.pipeline.layout import sequences_at_a_time
from yoco_megatron.parallel.pipeline.stages import StagePlan
from yoco_megatron.resilience import run_folder
from yoco_megatron.startup.data_flags import packing, repeated_validation
from yoco_megatron.startup.summary import summary
from yoco_megatron.utils.files import write_atomically


def make_folders(args: Namespace) -> None:
    """Make the folders that the run writes into.

    Raises:
        ValueError: one that cannot be made or written.
    """
    if args.run_folder:
        run_folder.make(Path(args.run_folder))
    folders = {
        "--save": args.save,
        "--tensorboard-dir": args.tensorboard_dir,
        "--data-cache-path": args.data_cache_path,
    }
    for flag, folder in folders.items():
        if folder is None or "://" in folder:
            continue
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{flag} {folder}: cannot write there ({error.strerror})") from error


def record_run(args: Namespace, model: GPTModelConfig) -> None:
    """Print what the run is; describe it beside its checkpoints. The first rank does it.

    `--load` compares the description with its flags; one process can read the run with it.
    """
    if args.rank != 0:
        return
    print(summary(args))
    for note in [*packing(args), *(f"WARNING: {note}" for note in repeated_validation(args))]:
        print(note)
    if args.architecture == "yoco" and args.pipeline_model_parallel_size > 1:
        print(pipeline_table(args, StagePlan.from_config(model.transformer)))
    if args.save and not args.skip_train:  # what is only evaluated stays as it was trained
        save_resolved_config(args, args.save)
        architecture.save(args, args.save)
        fingerprint.save(args, args.save, document_start(args, get_tokenizer()))
        carried_tokenizer.carry(args, args.save, carried_tokenizer.template_of_data(args))


def pipeline_table(args: Namespace, plan: StagePlan) -> str:
    """The stages of a pipelined YOCO, a line each: layers, parameters, FLOPs, bytes, expected bubble."""
    shape = ModelShape.from_args(args)
    return planner.table(
        plan,
        shape,
        part_seconds_of_run(shape, args),
        args.pipeline_model_parallel_size,
        args.global_batch_size // sequences_at_a_time(args),
        args.micro_batch_size,
        args.params_dtype.itemsize,
    )


def save_resolved_config(args: Namespace, folder: str) -> Path:
    """Write the merged flags beside the checkpoints; `--config` reads the file back."""
    flags = carried_tokenizer.absolute_paths(args.resolved_config)
    return write_atomically(Path(folder) / RESOLVED, yaml.safe_dump(flags, sort_keys=True))
