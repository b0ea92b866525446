"""Writes a YOCO in any of its formats, with one tensor (or one shard) in memory at a time.

Each writer fills an empty folder: convert.py passes a hidden one and renames it after verification.
"""

import copy
import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import yoco_megatron.hf
from yoco_megatron.checkpoint import architecture
from yoco_megatron.checkpoint.layout import COMPLETE, RESOLVED, TRACKER
from yoco_megatron.convert import config_fields, tensor_names, tokenizer_files
from yoco_megatron.convert.model_card import model_card
from yoco_megatron.convert.readers import Source
from yoco_megatron.data import carried_tokenizer
from yoco_megatron.data.tokenizer import template_ids
from yoco_megatron.utils.progress import progress

logger = logging.getLogger(__name__)
AUTO_MAP = {
    "AutoConfig": "configuration_yoco.YocoConfig",
    "AutoModel": "modeling_yoco.YocoModel",
    "AutoModelForCausalLM": "modeling_yoco.YocoForCausalLM",
    "AutoModelForSequenceClassification": "classification_yoco.YocoForSequenceClassification",
}


def checked(source: Source, name: str) -> Tensor:
    """A tensor of the source. Raises ValueError if it holds NaN or infinity."""
    tensor = source.load(name)
    if not torch.stack(torch.aminmax(tensor)).isfinite().all():  # NaN is both; a mask would take half the tensor's size
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        raise ValueError(f"{source.flag} {source.folder}: {name} holds {bad} values that are NaN or infinite")
    return tensor


# -- safetensors: ours and fla's


def write_hf(source: Source, folder: Path, shard_bytes: int) -> None:
    """The folder that `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads."""
    _write_tensors(source, folder, shard_bytes, rename=str)
    tokenizer: Any = source.tokenizer and tokenizer_files.copy(source.tokenizer, folder, source.document_start)
    config = source.config
    knows = config if tokenizer is None else tokenizer
    special = {name: getattr(knows, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    if tokenizer is not None and (start := template_ids(tokenizer)[0]):
        special["bos_token_id"] = start[0]  # whatever the tokenizer calls it: so training began
    special = {name: value for name, value in special.items() if value is not None}
    dtype = str(source.dtypes["model.embed_tokens.weight"]).removeprefix("torch.")
    facts = {name: value for name, value in source.facts.items() if value is not None}
    config_json = {
        **config.to_diff_dict(),
        "architectures": ["YocoForCausalLM"],
        "model_type": config.model_type,
        "auto_map": AUTO_MAP,
        "dtype": dtype,
        "training_facts": facts,
        **{name: getattr(config, name) for name in config_fields.arguments_of(config)},
        "tie_word_embeddings": config.tie_word_embeddings,
        **special,
    }
    _write_json(folder / "config.json", config_json)
    generation: dict[str, Any] = {"do_sample": False, **special}
    if tokenizer is not None:
        # Padding of the vocabulary was never trained: its ids must not be generated.
        unused = set(range(config.vocab_size)) - set(tokenizer.get_vocab().values())
        generation |= {"suppress_tokens": sorted(unused)} if unused else {}
    _write_json(folder / "generation_config.json", generation)
    for file in Path(yoco_megatron.hf.__file__).parent.glob("*_yoco.py"):
        shutil.copyfile(file, folder / file.name)
    (folder / "README.md").write_text(model_card(source, dtype))


def write_fla(source: Source, folder: Path, shard_bytes: int) -> None:
    """The folder that flash-linear-attention's YOCOForCausalLM loads, which has no multi-token prediction."""
    if source.config.mtp_num_layers:
        logger.warning("--to fla leaves out the layers of --mtp-num-layers %s", source.config.mtp_num_layers)
        source = dataclasses.replace(source, config=copy.copy(source.config))
        source.config.mtp_num_layers = 0
    config = config_fields.to_fla(source.config)
    ours = source

    def load(name: str) -> Tensor:
        return tensor_names.pairs_to_halves(ours.config, name, ours.load(name))

    source = dataclasses.replace(source, load=load)
    _write_tensors(source, folder, shard_bytes, rename=tensor_names.fla)
    if source.tokenizer is not None:
        tokenizer_files.copy(source.tokenizer, folder, source.document_start)
    dtype = str(source.dtypes["model.embed_tokens.weight"]).removeprefix("torch.")
    _write_json(folder / "config.json", config | {"torch_dtype": dtype})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_tensors(source: Source, folder: Path, shard_bytes: int, rename: Callable[[str], str]) -> None:
    """safetensors shards of at most `shard_bytes` (or one tensor) with their index."""
    shapes = tensor_names.shapes(source.config)
    plan: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        bytes_ = torch.Size(shape).numel() * source.dtypes[name].itemsize
        if plan[-1] and size + bytes_ > shard_bytes:
            plan.append([])
            size = 0
        plan[-1].append(name)
        size += bytes_
    weight_map: dict[str, str] = {}
    with _progress(source) as bar:
        for number, shard in enumerate(plan, 1):
            file = "model.safetensors" if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
            tensors = {}
            for name in shard:
                # A slice of a memory-mapped file would keep the whole mapping.
                tensors[rename(name)] = checked(source, name).clone(memory_format=torch.contiguous_format)
                bar.update(tensors[rename(name)].nbytes)
            _save_file(tensors, folder / file)
            weight_map |= dict.fromkeys(tensors, file)
            tensors.clear()
    if len(plan) > 1:
        index = {"metadata": {"total_size": source.bytes}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _save_file(tensors: dict[str, Tensor], path: Path) -> None:
    """One safetensors file, readable by whom the folder's other files are: the library makes it for the owner alone."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def _progress(source: Source) -> Any:
    return progress(total=source.bytes, unit="B", unit_scale=True, desc="tensors")


# -- training checkpoints


def write_megatron(source: Source, folder: Path) -> None:
    """A folder for --load: a "release" checkpoint (weights alone, iteration 0) that any mesh can read."""
    from yoco_megatron.startup.load_run import parse_run

    checkpoint = folder / "release"
    checkpoint.mkdir()
    dtype = source.dtypes["model.embed_tokens.weight"]
    flags = {
        **config_fields.to_flags(source.config),
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "micro-batch-size": 1,
        **_tokenizer_flags(source, folder),
    }
    resolved = folder / RESOLVED
    resolved.write_text(yaml.safe_dump(flags, sort_keys=True))
    args = parse_run(str(folder))  # validates the flags
    architecture.save(args, str(folder))
    common = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": {"singleton_local_shards": False},
    }
    _save_streaming(source, checkpoint, common)
    _write_json(checkpoint / COMPLETE, {"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    (folder / TRACKER).write_text("release")


def _tokenizer_flags(source: Source, folder: Path) -> dict[str, Any]:
    if source.tokenizer is None:
        return {"tokenizer-type": "NullTokenizer", "vocab-size": source.config.vocab_size - 1}
    tokenizer_files.copy(source.tokenizer, folder / carried_tokenizer.FOLDER)
    return {"tokenizer-type": "HuggingFaceTokenizer", "tokenizer-model": str(folder / carried_tokenizer.FOLDER)}


def _save_streaming(source: Source, folder: Path, common: dict[str, Any]) -> None:
    """Save every tensor through torch.distributed.checkpoint, which asks for them one by one as it writes."""
    import warnings

    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

    shapes = tensor_names.shapes(source.config)
    entries = {entry.name: entry for entry in tensor_names.megatron(source.config)}

    class OneByOne(dcp.DefaultSavePlanner):
        """Resolves a tensor only when its bytes are written."""

        def resolve_data(self, write_item: WriteItem) -> Any:
            if write_item.type == WriteItemType.BYTE_IO:
                return super().resolve_data(write_item)
            entry = entries[write_item.index.fqn]
            tensor = entry.join([checked(source, name) for name in entry.names])
            bar.update(tensor.nbytes)
            return tensor

    state: dict[str, Any] = {
        name: torch.empty(entry.shape(shapes), dtype=source.dtypes[entry.names[0]], device="meta")
        for name, entry in entries.items()
    }
    state |= {name: [None] for name in _extra_states(entries)}
    state["common_state/shard_0_1"] = [common]
    with _progress(source) as bar, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is")
        planner = OneByOne(flatten_state_dict=False)
        # torch's writer holds all tensors of a file until it is closed: hence one file per tensor.
        writer = dcp.FileSystemWriter(folder, single_file_per_rank=False)
        try:
            dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)
        except dcp.CheckpointException as wrapped:  # not an Exception, so most handlers miss it
            raise next(iter(wrapped.failures.values()))[0] from None


def _extra_states(entries: dict[str, tensor_names.Fused]) -> Iterator[str]:
    """Transformer Engine's modules, and Megatron's linear layers in its name, save an (empty) extra state."""
    without = (
        *("word_embeddings.weight", "linear_decay.weight", "router.weight", "projection.weight"),
        *("linear_dt.weight", "linear_ba.weight", "self_attention.conv.weight", "self_attention.norm.weight"),
    )
    for name, entry in entries.items():
        if name.endswith(".weight") and not name.endswith(without):
            count = entry.groups if isinstance(entry, tensor_names.Stacked) else 1
            for number in range(count):
                yield name.removesuffix("weight") + f"_extra_state/shard_{number}_{count}"
    yield "output_layer._extra_state/shard_0_1"
