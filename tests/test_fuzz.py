"""Damaged files, in hundreds of ways each: one error, or the right result; never a traceback, a hang, or a wrong one.

A new format is an entry in FORMATS: see tests/support/damage.py.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from safetensors.torch import save_file
from support.damage import Format, check

from yoco_megatron.checkpoint import architecture, integrity, layout, validation_record
from yoco_megatron.checkpoint.common_state import common_state
from yoco_megatron.config.yaml_files import load_config_file
from yoco_megatron.convert import tensor_names
from yoco_megatron.convert.readers import TrainingTensors, open_source
from yoco_megatron.corpus import resume_state
from yoco_megatron.data import fingerprint
from yoco_megatron.data.check import check_data_prefixes, read_report
from yoco_megatron.data.idx import IndexContent, check_index
from yoco_megatron.data.tokenizer import tokenizer_sha256
from yoco_megatron.hf.configuration_yoco import YocoConfig
from yoco_megatron.resilience import records
from yoco_megatron.resilience.arguments import skipped_iterations
from yoco_megatron.startup import arguments
from yoco_megatron.utils.small_files import mismatch

RELEASED = Path(__file__).parent / "fixtures/release_0.1/gated_retention/checkpoint/iter_0000005"
FLAGS = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --micro-batch-size 1 --mock-data"
TOKENIZER = "--tokenizer-type NullTokenizer --vocab-size 100"


def of_run(name: str, write: Any, check_args: Any) -> Format:
    """A file beside the checkpoints that a start compares with its flags: nothing comes back but errors."""
    args = arguments.parse([*FLAGS.split(), *TOKENIZER.split()])

    def save(folder: Path) -> Path:
        layout.write_tracker(folder, 1)
        args.load = str(folder)
        return write(args, str(folder))

    return Format(name, save, lambda path: check_args(args), named=False)  # it names the folder, and what differs


def text(name: str, content: Any) -> Any:
    def write(folder: Path) -> Path:
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return folder / name

    return write


# -- checkpoints


def checkpoint(folder: Path, name: str) -> Path:
    """A file of a checkpoint of 200 bytes a file, with its manifest."""
    for index, file in enumerate(("__0_0.distcp", ".metadata")):
        (folder / file).write_bytes(bytes([index]) * 200)
    (folder / layout.COMPLETE).write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    integrity.write_manifest(folder)
    return folder / name


def whole(path: Path) -> None:
    """As loading asks: what is wrong passes the checkpoint over."""
    wrong = integrity.find_corruption(path.parent)
    if wrong:
        raise ValueError(wrong)


def released(name: str) -> Any:
    def write(folder: Path) -> Path:
        shutil.copytree(RELEASED, folder, dirs_exist_ok=True)
        return folder / name

    return write


def tensors_of(path: Path) -> dict:
    return TrainingTensors(path.parent).found()


# -- exported models

CONFIG = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1)


def exported(name: str) -> Any:
    def write(folder: Path) -> Path:
        config = YocoConfig(**CONFIG, architectures=["YocoForCausalLM"])
        config.save_pretrained(folder)
        tensors = {tensor: torch.zeros(shape) for tensor, shape in tensor_names.shapes(config).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder / name

    return write


def of_export(path: Path) -> tuple[dict, dict]:
    source = open_source("hf", str(path.parent))
    config = {name: value for name, value in source.config.to_dict().items() if name not in ("_name_or_path",)}
    return config, {name: (dtype, source.load(name).shape) for name, dtype in source.dtypes.items()}


def same_tensors(result: tuple[dict, dict]) -> bool:
    """What decides shapes was compared with the tensors; other numbers could be another model's."""
    config, tensors = result
    return set(tensors) == set(tensor_names.shapes(YocoConfig.from_dict(dict(config))))


def is_config(found: Any) -> bool:
    return mismatch(found, dict[str, Any]) is None


def dataset(folder: Path) -> Path:
    builder = IndexedDatasetBuilder(str(folder / "d.bin"), dtype=np.uint16)
    for length in (5, 12, 0, 1, 30) * 8:
        builder.add_document(np.arange(length), [length])
    builder.finalize(str(folder / "d.idx"))
    return folder / "d.idx"


def indexed(path: Path) -> IndexContent:
    check_data_prefixes([str(path.with_suffix(""))])
    return check_index(path, path.with_suffix(".bin"))


FORMATS = [
    # No other number can change unnoticed: int16 is as large as uint16.
    Format("idx", dataset, indexed, lambda found: found.header.dtype == np.int16, count=300),
    of_run("architecture.json", architecture.save, architecture.check_loadable),
    of_run("data.json", fingerprint.save, fingerprint.check_resumable),
    Format(
        "skipped_iterations.json",
        text("skipped_iterations.json", [1, 2, 30]),
        lambda path: skipped_iterations(path.parent),
        lambda found: mismatch(found, list[int]) is None,
    ),
    Format(
        "tracker",
        text(layout.TRACKER, "1200"),
        lambda path: layout.tracked_iteration(path.parent),
        lambda found: found is None or 0 <= found < 10**18,
    ),
    Format(
        validation_record.FILE_NAME,
        text(validation_record.FILE_NAME, {"20": {"": {"loss": 3.5, "perplexity": 33.1}}, "40": {"wiki": {"loss": 3}}}),
        lambda path: validation_record.of_checkpoint(path.parent, 40),
        lambda found: found is None or (found[0] <= 40 and mismatch(found[1], dict[str, dict[str, float]]) is None),
    ),
    # The error may name another file of the checkpoint, which is not what the damaged one says.
    Format("integrity.json", lambda folder: checkpoint(folder, layout.MANIFEST), whole, named=False),
    Format("metadata.json", lambda folder: checkpoint(folder, layout.COMPLETE), whole),
    Format(".metadata", released(".metadata"), tensors_of, is_config),
    Format(
        "common state",
        released("__0_0.distcp"),
        lambda path: common_state(path.parent)["iteration"],
        lambda found: isinstance(found, int),
        count=60,
        named=False,  # the folder is
    ),
    Format(
        "attempts.jsonl",
        text("attempts.jsonl", '{"event": "begin", "attempt": 0, "checkpoint": null}\n' * 3),
        lambda path: records.attempts(path.parent),
        lambda found: mismatch(found, list[records.Begin | records.End]) is None,
    ),
    Format(
        "report",
        text("a.json", {"documents": 2, "files": {name: {"sha256": "0" * 64} for name in ("bin", "idx")}}),
        lambda path: read_report(str(path.with_suffix(""))),
        is_config,
    ),
    Format(
        "state.json",
        lambda folder: (resume_state.ResumeState(folder, [], {"a": 1}).save(position=[1, 2]), folder / "state.json")[1],
        resume_state._read,
        lambda found: found is None,
    ),
    Format(
        "resolved_config.yaml",
        text("resolved_config.yaml", "num-layers: 2\nbf16: true\ndata-path: {a: 1.0, b: 2}\nx: [1, a]\n"),
        load_config_file,
        is_config,
    ),
    Format(
        "tokenizer.json",
        text("tokenizer.json", {"model": {"vocab": {"a": 0, "b": 1}, "merges": ["a b"]}, "padding": None}),
        lambda path: tokenizer_sha256(str(path.parent)),
        lambda found: found is None or isinstance(found, str),  # another tokenizer
    ),
    Format("config.json", exported("config.json"), of_export, same_tensors),
    Format("model.safetensors", exported("model.safetensors"), of_export),
    Format("index.json", exported("model.safetensors.index.json"), of_export),
]


@pytest.mark.filterwarnings("ignore:.*left out|.*passed over")
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_damaged_files_are_refused_or_make_no_difference(form: Format, tmp_path: Path) -> None:
    check(form, tmp_path)
