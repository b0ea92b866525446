"""Fingerprint of a run's data: compared on resume with the checkpoint's, and with the tokenizer before any training.

Megatron loads the number of consumed samples from the checkpoint and skips as many of the data that the flags now name.
With other data, another order or another tokenizer it would silently resume elsewhere in the stream.
"""

import json
import math
from argparse import Namespace
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import TypedDict

from yoco_megatron.checkpoint.layout import TRACKER
from yoco_megatron.data.check import data_prefixes_from_args, index_of, read_report
from yoco_megatron.data.content import dataset_fingerprint
from yoco_megatron.data.loss_masks import all_prefixes
from yoco_megatron.data.plan import DEFAULT_SPLIT, plan, train_samples
from yoco_megatron.data.token_sample import sample_tokens
from yoco_megatron.data.tokenizer import build_tokenizer, id_limit, tokenizer_sha256
from yoco_megatron.utils.files import write_atomically
from yoco_megatron.utils.small_files import read_json

FILE_NAME = "data.json"
# Flags that decide the content and order of samples. --seq-length may differ on resume, as it may for the model.
PATHS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
LISTS = ("data_args_path", "per_split_data_args_path")
FLAGS = (
    "split",
    "seed",
    "mock_data",
    "eod_mask_loss",
    "dataloader_inter_document_masking",
    "tokenizer_type",
    "sample_packing",
)
ORDER = "sample_order"
# Of .bin files without a record of their largest id, when a run starts: about a second.
READ_WHOLE = 1 << 30
START = "document_start"


class _Order(TypedDict):
    seq_length: int
    epochs: dict[str, tuple[int, bool]]


class _Recorded(TypedDict, total=False):
    sample_order: _Order | dict[str, None]


def describe(args: Namespace) -> dict[str, object]:
    """Flags, the tokenizer's hash, and the fingerprint of each dataset, for which every .idx is read.

    Folders of the prefixes are left out, so that data may move.
    """
    flags: dict[str, object] = {name: getattr(args, name) for name in FLAGS}
    if args.data_path and args.split is None:  # Megatron sets it between the check and the first save
        flags["split"] = DEFAULT_SPLIT
    flags |= {name: [Path(entry).name for entry in getattr(args, name) or []] for name in PATHS}
    lists = {name: getattr(args, name) for name in LISTS if getattr(args, name)}
    flags |= {name: sha256(Path(path).read_bytes()).hexdigest() for name, path in lists.items()}
    prefixes = all_prefixes(args)
    datasets = {name: dataset_fingerprint(prefix) for prefix, name in _names(prefixes).items()}
    return flags | {"tokenizer_sha256": tokenizer_sha256(args.tokenizer_model)} | datasets


def sample_order(args: Namespace) -> dict[str, object]:
    """What else decides the order: --seq-length, and for each dataset the epochs that Megatron shuffles together.

    A longer run may have more epochs, and then draws other samples from its first step on. {} without datasets,
    or where the flags do not say how long the run is.
    """
    prefixes = data_prefixes_from_args(args)
    if not prefixes:
        return {}
    try:
        sources = plan(args, train_samples(args))
    except ValueError:  # unknown length of the run, or no training part
        return {}
    names = _names(prefixes)
    return {"seq_length": args.seq_length, "epochs": {names[source.prefix]: source.order for source in sources}}


def _names(prefixes: list[str]) -> dict[str, str]:
    """Prefix -> its name without the folder; the second of one name is NAME#2."""
    names: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for prefix in prefixes:
        name = Path(prefix).name
        seen[name] += 1
        names[prefix] = name if seen[name] == 1 else f"{name}#{seen[name]}"
    return names


def _epochs(order: list) -> str:
    epochs, last_apart = order
    return f"{epochs} epochs" + (", the last separately" if last_apart else "")


def save(args: Namespace, folder: str, start: list[int] | None = None) -> Path:
    """Write data.json into a checkpoint folder, atomically. `start`: the special tokens that begin each document."""
    content = describe(args) | {ORDER: sample_order(args), START: start}
    return write_atomically(Path(folder) / FILE_NAME, json.dumps(content, indent=1) + "\n")


def check_tokenizer(args: Namespace) -> None:
    """Compare the flags with the tokenizer and the end of document in the reports of the data.

    Raises:
        ValueError: data of another tokenizer, or of a larger vocabulary than NullTokenizer has, or without
            end-of-document tokens where --eod-mask-loss needs them (it does without document masking).
    """
    ours = tokenizer_sha256(args.tokenizer_model)
    for prefix in data_prefixes_from_args(args):
        about = read_report(prefix).get("tokenizer", {})
        theirs = about.get("sha256")
        if theirs is not None and ours is not None and theirs != ours:
            raise ValueError(
                f"--tokenizer-model {args.tokenizer_model} (sha256 {ours[:12]}) did not make {prefix} "
                f"(sha256 {theirs[:12]}, see {prefix}.json); give that one, or preprocess the data with this one"
            )
        if args.tokenizer_type == "NullTokenizer":
            pad = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
            vocab_size = about.get("vocab_size", 0)
            if math.ceil(args.vocab_size / pad) * pad < vocab_size:
                raise ValueError(
                    f"--vocab-size {args.vocab_size} is too small for {prefix}, whose tokenizer has {vocab_size} ids "
                    f"(see {prefix}.json): give that size, or that tokenizer"
                )
        by_token = args.eod_mask_loss and not args.dataloader_inter_document_masking
        if by_token and "eod" in about and about["eod"] is None:
            raise ValueError(
                f"--eod-mask-loss has no effect on {prefix}, whose documents have no end-of-document token "
                f"(see {prefix}.json): preprocess with --append-eod, or add "
                "--dataloader-inter-document-masking, which needs none"
            )


def check_tokens(args: Namespace) -> None:
    """Compare the token ids of the data with the vocabulary, on rank 0: the largest that preprocessing recorded, or
    all of a small .bin, or a sample of it.

    Raises:
        ValueError: an id that the vocabulary lacks; with tensor parallelism Megatron would train on it without a word.
            Documents of which nothing is in the loss.
    """
    prefixes = data_prefixes_from_args(args)
    if args.rank != 0 or not prefixes:
        return
    limit = id_limit(build_tokenizer(args))
    for prefix in prefixes:
        content = index_of(prefix)
        if args.eod_mask_loss and args.dataloader_inter_document_masking and content.longest <= 1:
            raise ValueError(
                f"--eod-mask-loss: no document of {prefix} has two tokens, and without its last one nothing is left to "
                "learn: remove the flag, or preprocess the data again"
            )
        whole = 0 if "max_id" in read_report(prefix) else READ_WHOLE // len(prefixes)
        sample = sample_tokens(Path(f"{prefix}.bin"), content.header.dtype, whole)
        largest = max(sample.largest, read_report(prefix).get("max_id", 0))
        if sample.smallest < 0 or largest >= limit:
            wrong = sample.smallest if sample.smallest < 0 else largest
            raise ValueError(
                f"--data-path {prefix} holds the token id {wrong:,}, and the vocabulary of "
                f"{args.tokenizer_model or args.tokenizer_type} ends at {limit - 1:,}: give the tokenizer that made "
                "the data (--tokenizer-type, --tokenizer-model)"
            )


def _differ(saved: object, wanted: object) -> bool:
    """Of datasets what both know is compared: a report may be missing, or an older version have saved less."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        return any(saved[name] != wanted[name] for name in saved.keys() & wanted.keys())
    return saved != wanted


def _change(saved: object, wanted: object) -> str:
    """What became of a setting or of a dataset, without the digests, which say nothing to a reader."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        return f"has another {', '.join(name for name in saved if wanted.get(name, saved[name]) != saved[name])}"
    if isinstance(saved, dict) or isinstance(wanted, dict):
        return "was not read" if saved is None else "is not read"
    return f"was {_short(saved)}, is {_short(wanted)}"


def _short(value: object) -> object:
    return value[:12] if isinstance(value, str) and len(value) == 64 else value


def check_resumable(args: Namespace) -> None:
    """Compare the data of the --load checkpoint with the flags, unless --finetune starts over or nothing is trained.

    Raises:
        ValueError: everything that differs, with both values. A folder without data.json or a checkpoint passes.
    """
    # Only rank 0 reads the data.
    if args.rank != 0 or args.load is None or args.finetune or args.skip_train or args.allow_changed_data:
        return
    fix = "copy it again from the run, or add --allow-changed-data"
    saved = read_json(Path(args.load) / FILE_NAME, _Recorded, missing=None, fix=fix)
    # A run that ended before its first checkpoint has consumed nothing.
    if saved is None or not (Path(args.load) / TRACKER).exists():
        return
    wanted = json.loads(json.dumps(describe(args)))
    was = saved.pop(ORDER, {})
    saved.pop(START, None)  # follows from the data
    if None in (saved.get("tokenizer_sha256"), wanted["tokenizer_sha256"]):  # one was not in the hub's cache
        saved["tokenizer_sha256"] = wanted["tokenizer_sha256"]
    now = json.loads(json.dumps(sample_order(args))) if was else {}
    different = [
        f"{name} {_change(saved.get(name), wanted.get(name))}"
        for name in {**saved, **wanted}
        if _differ(saved.get(name), wanted.get(name))
    ]
    if now and was["seq_length"] == now["seq_length"]:
        different += [
            f"{name} was shuffled as {_epochs(was['epochs'][name])}, is as {_epochs(order)} "
            "(--train-iters, --train-samples)"
            for name, order in now["epochs"].items()
            if name in was["epochs"] and was["epochs"][name] != order
        ]
    if different:
        raise ValueError(
            f"--load {args.load} was trained on other data: {'; '.join(different)}. Give the same data, or add "
            "--allow-changed-data to skip as many samples of the new data as were read of the old"
        )
