"""Reads a YOCO in any of its formats, one tensor at a time: `open_source` checks everything, `Source.load` reads.

No code of a source runs: safetensors holds none, torch.load runs with `weights_only=True`, and a training checkpoint is
unpickled by checkpoint/safe_unpickling.py.
"""

import functools
import json
import logging
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from yoco_megatron.checkpoint import safe_unpickling, validation_record
from yoco_megatron.checkpoint.architecture import ALWAYS_WAS
from yoco_megatron.checkpoint.common_state import common_state
from yoco_megatron.checkpoint.layout import RESOLVED, TRACKER, path_of, tracked
from yoco_megatron.config.yaml_files import load_config_files
from yoco_megatron.convert import config_fields, tensor_names
from yoco_megatron.data.fingerprint import FILE_NAME as DATA
from yoco_megatron.hf.configuration_yoco import YocoConfig
from yoco_megatron.utils import small_files
from yoco_megatron.utils.errors import nearest
from yoco_megatron.utils.small_files import BadFile

logger = logging.getLogger(__name__)
Evaluated = TypedDict("Evaluated", {"loss": float, "perplexity": float, "bits-per-byte": NotRequired[float]})
"""Of one validation set; nats a token."""


class TrainingFacts(TypedDict, total=False):
    """What an export says of the training, in its config.json."""

    iteration: int | None
    samples: int | None
    seq_length: int | None
    flags: dict[str, Any]
    data: list[str]
    evaluated_at: int | None
    validation: dict[str, Evaluated]


Found = dict[str, tuple[tensor_names.Shape, torch.dtype]]
# Flags of the run that the model card shows.
TRAINING = ("train-iters", "global-batch-size", "lr", "min-lr", "lr-decay-style", "lr-warmup-iters", "weight-decay")


@dataclass
class Source:
    """A model on disk: its configuration, and `load(name)` for each of `tensor_names.shapes(config)`."""

    kind: str
    folder: Path
    config: YocoConfig
    dtypes: dict[str, torch.dtype]
    load: Callable[[str], Tensor]
    tokenizer: Path | None = None
    """Of a training run only after `tokenizer_files.choose`."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What is known of its training, for the model card."""
    document_start: list[int] | None = None
    """The special tokens that begin a text; None: as the tokenizer's template says."""
    card: dict[str, str] = field(default_factory=dict)
    """What an exported model's card says at its head: license, language."""
    flag: str = "--input"
    """The flag that named the folder, for errors."""

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(
            self.dtypes[name].itemsize * torch.Size(shape).numel()
            for name, shape in tensor_names.shapes(self.config).items()
        )


def _require(condition: bool, message: str) -> None:
    """Raise BadFile with `message` unless `condition` holds."""
    if not condition:
        raise BadFile(message)


def open_source(kind: str, folder: str, iteration: int | None = None, flag: str = "--input") -> Source:
    """Open the checkpoint in `folder`, which `flag` named.

    Args:
        kind: one of convert.SOURCES.
        iteration: which one of a training run's checkpoints; the latest by default.
    Raises:
        ValueError: no such checkpoint there, files missing or cut short, another architecture, wrong shapes.
    """
    path = Path(folder)
    try:
        _require(path.is_dir(), f"{folder}: no such folder")
        return {"megatron": _megatron, "hf": _hf, "fla": _fla, "official": _official}[kind](path, iteration)
    except BadFile as error:
        raise ValueError(f"{flag} {error}") from error


def check_shapes(where: Path, found: Found, wanted: dict[str, tensor_names.Shape], config: str) -> None:
    """Raises ValueError unless exactly the wanted tensors are there, with these shapes and a float dtype.

    Args:
        where: file or folder of the tensors.
        config: file that describes them.
    """
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    near = _near(missing, found)
    _require(not missing, f"{where}: {len(missing)} tensors of its {config} are missing, first {missing[:1]}{near}")
    _require(not extra, f"{where}: {len(extra)} tensors belong to no model of its {config}, first {extra[:1]}")
    for name, shape in wanted.items():
        _require(
            tuple(found[name][0]) == tuple(shape),
            f"{where}: {name} is {list(found[name][0])}, its {config} asks for {list(shape)}",
        )
        _require(found[name][1].is_floating_point, f"{where}: {name} is {found[name][1]}, not a float type")


def _near(missing: list[str], found: Found) -> str:
    return nearest(missing[0], found) if missing else ""


# -- training checkpoints


def checkpoint_folder(folder: Path, iteration: int | None) -> Path:
    """The folder of one checkpoint under a run's --save. Raises ValueError if there is none."""
    _require(
        (folder / TRACKER).exists() and (folder / RESOLVED).exists(),
        f"{folder}: no checkpoint of pretrain_yoco.py there; give the folder that training had as --save",
    )
    latest = tracked(folder)
    _require(
        latest is not None or iteration is not None,
        f"{folder}: {TRACKER} holds no iteration: name one with --iteration",
    )
    released = latest == "release" and iteration is None
    name = "release" if released else path_of(folder, int(iteration or latest or 0)).name
    _require(
        (folder / name / ".metadata").is_file(),
        f"{folder}: {name} is no checkpoint in the torch_dist format; there are "
        f"{', '.join(sorted(p.name for p in folder.glob('iter_*'))) or 'none'}",
    )
    return folder / name


class _Reader(FileSystemReader):
    """Reads `.metadata` once, not for each tensor."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.metadata = super().read_metadata()

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self.metadata


class TrainingTensors:
    """Whole tensors of a torch_dist checkpoint, whatever mesh wrote it."""

    def __init__(self, folder: Path) -> None:
        safe_unpickling.check_installed()
        safe_unpickling.check_regular(folder)
        self.folder = folder
        self.reader = _Reader(folder)
        self.metadata = self.reader.metadata
        for info in self.metadata.storage_data.values():
            file = folder / info.relative_path
            _require(file.exists(), f"{file} is missing: copy the checkpoint again")
            whole = file.stat().st_size >= info.offset + info.length
            _require(whole, f"{file} is shorter than .metadata says: copy the checkpoint again")

    def found(self) -> Found:
        """The model's tensors: no optimizer, no random states."""
        entries = self.metadata.state_dict_metadata.items()
        skipped = ("optimizer.", "rng_state", "rerun_state")
        return {
            name: (tuple(entry.size), entry.properties.dtype)
            for name, entry in entries
            if isinstance(entry, TensorStorageMetadata) and not name.startswith(skipped)
        }

    def load(self, name: str) -> Tensor:
        """One tensor."""
        entry = self.metadata.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        return self._load(name, torch.empty(entry.size, dtype=entry.properties.dtype))

    def _load(self, name: str, into: Any) -> Any:
        import torch.distributed.checkpoint as dcp

        state = {name: into}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed is")
            try:
                dcp.load(state, storage_reader=self.reader, no_dist=True)
            except CheckpointException as error:  # no Exception
                raise BadFile(f"{self.folder}: {name} is damaged: copy the checkpoint again") from error
        return state[name]


def _megatron(folder: Path, iteration: int | None) -> Source:
    from yoco_megatron.startup.load_run import parse_run

    tensors = TrainingTensors(checkpoint_folder(folder, iteration))
    args, found, common = parse_run(str(folder), iteration), tensors.found(), common_state(tensors.folder)
    embedding = found.get("embedding.word_embeddings.weight")
    if embedding is None:
        raise BadFile(f"{folder}: no embedding.word_embeddings.weight there: not a model of this project")
    args.padded_vocab_size = embedding[0][0]
    # A run gains and loses these on its way.
    args.mtp_num_layers = len({name.partition(".")[0] for name in found if name.startswith("mtp_")})
    config = config_fields.from_args(args)
    entries = tensor_names.megatron(config)
    shapes = tensor_names.shapes(config)
    check_shapes(tensors.folder, found, {entry.name: entry.shape(shapes) for entry in entries}, RESOLVED)
    of = {name: entry for entry in entries for name in entry.names}

    # The parts of one fused matrix are loaded one after another; those of experts, when these run, from two.
    @functools.lru_cache(maxsize=1 if config.num_experts is None else 2)
    def split(entry: tensor_names.Fused) -> dict[str, Tensor]:
        return entry.split(tensors.load(entry.name))

    trained = common.get("args")
    flags = load_config_files([str(folder / RESOLVED)])
    facts = {
        "iteration": common.get("iteration"),
        "samples": getattr(trained, "consumed_train_samples", None),
        "seq_length": args.seq_length,
        "flags": {name: value for name, value in flags.items() if name in TRAINING},
        "data": _datasets(folder),
    }
    if evaluated := validation_record.of_checkpoint(folder, common.get("iteration") or 0):
        facts["evaluated_at"], facts["validation"] = evaluated
    return Source(
        kind="megatron",
        folder=folder,
        config=config,
        dtypes={name: found[entry.name][1] for name, entry in of.items()},
        load=lambda name: split(of[name])[name],
        facts=facts,
    )


def _datasets(folder: Path) -> list[str]:
    """Names of those that data.json describes by their files."""
    recorded = small_files.read_json(folder / DATA, missing={})
    return [name for name, about in recorded.items() if isinstance(about, dict) and "bin" in about]


# -- safetensors


class SafeTensors:
    """Tensors of a folder of safetensors files, with or without an index."""

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        index = folder / "model.safetensors.index.json"
        if index.exists():
            of = _json(index, "an exported model").get("weight_map")
            if not isinstance(of, dict):
                raise BadFile(f"{index} has no weight_map: copy the folder again")
            for tensor, file in of.items():
                _require(
                    isinstance(file, str) and re.fullmatch(r"[\w.-]{1,255}", file) is not None,
                    f"{index} gives {tensor!r:.80} the file {file!r:.80}, no name: copy the folder again",
                )
            listed = sorted(set(of.values()))
        else:
            listed = ["model.safetensors"]
        self.place = index if index.exists() else folder / listed[0]
        """The file that names the tensors."""
        self.files: dict[str, Any] = {}
        for name in listed:
            file = folder / name
            named = f", which {index.name} names" if index.exists() else ""
            _require(file.is_file(), f"{file} is missing{named}: copy the folder again")
            try:
                opened = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise BadFile(f"{file} is not a whole safetensors file ({error}){named}: copy it again") from None
            twice = sorted(self.files.keys() & opened.keys())
            _require(not twice, f"{file} holds {''.join(twice[:1])}, as another file does: copy the folder again")
            self.files |= dict.fromkeys(opened.keys(), opened)

    def found(self) -> Found:
        """Shapes and dtypes of all tensors, without reading them."""
        slices = {name: file.get_slice(name) for name, file in self.files.items()}
        return {name: (tuple(s.get_shape()), DTYPES.get(s.get_dtype(), torch.int8)) for name, s in slices.items()}

    def load(self, name: str) -> Tensor:
        """One tensor."""
        return self.files[name].get_tensor(name)


DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def _json(file: Path, what: str) -> dict[str, Any]:
    """The object in a file that the folder of `what` has. Raises ValueError."""
    try:
        text = small_files.read_text(file, missing=None)
        content = None if text is None else json.loads(text)  # its numbers are checked, and named, by who reads them
    except BadFile:
        raise
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{file} is not JSON: {error}") from None
    if text is None:
        raise BadFile(f"{file.parent}: no {file.name} there; give the folder of {what}")
    if not isinstance(content, dict):
        raise BadFile(f"{file} is not a JSON object: is it that of {what}?")
    return content


def _described(file: Path, read: Callable[..., Any], *args: Any, **more: Any) -> Any:
    """What `read` makes of the content. Raises ValueError for fields that describe no model."""
    try:
        return read(*args, **more)
    except (StrictDataclassError, ValueError) as error:
        raise BadFile(f"{file} describes no YOCO: {' '.join(str(error).split())}") from None
    except (KeyError, TypeError, AttributeError) as error:  # a key of another file's that is missing or of another type
        raise BadFile(f"{file} describes no YOCO: {type(error).__name__}: {error}") from None


def drop_tied_head(file: Path, tensors: Any, found: Found, head: str, embedding: str) -> None:
    """Take a tied head, which some writers repeat, out of `found`. Raises ValueError for another one."""
    if head in found and embedding in found:
        same = found.pop(head) == found[embedding] and torch.equal(tensors.load(head), tensors.load(embedding))
        _require(same, f"{file}: {head} is not {embedding}, but its config says tie_word_embeddings")


def _renamed(
    kind: str, file: Path, config: YocoConfig, tensors: Any, rename: Callable[[str], str], described_by: str
) -> Source:
    """A source whose names are `rename` of ours.

    Args:
        file: that has the tensors, or names them.
        tensors: with `found()` and `load(name)`.
        described_by: file of the configuration.
    """
    folder, found, load = file.parent, tensors.found(), tensors.load
    shapes = _described(folder / described_by, tensor_names.shapes, config)
    wanted = {rename(name): shape for name, shape in shapes.items()}
    head, embedding = rename("lm_head.weight"), rename("model.embed_tokens.weight")
    if config.tie_word_embeddings:
        drop_tied_head(file, tensors, found, head, embedding)
    check_shapes(file, found, wanted, described_by)
    dtypes = {name: found[rename(name)][1] for name in shapes}
    tokenizer = folder if (folder / "tokenizer_config.json").exists() else None
    return Source(kind, folder, config, dtypes, lambda name: load(rename(name)), tokenizer)


def _hf(folder: Path, _: int | None) -> Source:
    file = folder / "config.json"
    config = _json(file, "an exported model")
    architectures = config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else architectures
    _require(
        architecture == "YocoForCausalLM",
        f"{folder}: its config.json says {architecture or 'nothing'} under architectures, only YocoForCausalLM can be "
        "converted" + ("; use --from fla" if architecture == "YOCOForCausalLM" else ""),
    )
    # Every writer gives them all; a default in the place of a misspelt one would be another model.
    asked = [name for name, theirs in config_fields.SAME.items() if theirs not in ALWAYS_WAS]
    asked += config_fields.EXPERTS if config.get("num_experts") is not None else []
    missing = [name for name in asked if name not in config]
    _require(not missing, f"{file} lacks {', '.join(missing)}{nearest(missing[0], config) if missing else ''}")
    described = _described(file, YocoConfig.from_dict, config)
    tensors = SafeTensors(folder)
    source = _renamed("hf", tensors.place, described, tensors, str, file.name)
    facts = config.get("training_facts") or {}
    wrong = small_files.mismatch(facts, TrainingFacts, "training_facts")
    _require(wrong is None, f"{file}: {wrong}")
    source.facts = facts
    return source


def _fla(folder: Path, _: int | None) -> Source:
    file = folder / "config.json"
    config = _json(file, "an exported model")
    _require(
        "self_decoder_attn" in config and "cross_decoder_attn" in config,
        f"{folder}: its config.json is not that of flash-linear-attention's YOCOForCausalLM",
    )
    tensors = SafeTensors(folder)
    described = _described(file, config_fields.from_fla, config)
    theirs = _renamed("fla", tensors.place, described, tensors, tensor_names.fla, file.name)

    def load(name: str) -> Tensor:
        return tensor_names.pairs_to_halves(described, name, theirs.load(name), back=True)

    return replace(theirs, load=load)


# -- the authors' layout


@dataclass(frozen=True)
class _Loaded:
    """Tensors of a state dict."""

    state: dict[str, Tensor]

    def found(self) -> Found:
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self.state.items()}

    def load(self, name: str) -> Tensor:
        return self.state[name]


# microsoft/unilm YOCO/yoco/models/decoder/yoco.py:CrossDecoder views its K,V with all heads on every rank.
A_PART = (
    "one part of a model that was split by tensor parallelism. The authors' code cannot run such a model, so that no "
    "layout of theirs is known: give one checkpoint.pth with whole tensors"
)


def _official(folder: Path, _: int | None) -> Source:
    params, weights = folder / "params.json", folder / "checkpoint.pth"
    for part in folder.glob("*-model_part-*"):  # fairseq's names
        raise BadFile(f"{part} is {A_PART}")
    for file in (params, weights):
        _require(file.is_file(), f"{folder}: no {file.name} there; the authors' layout has params.json beside it")
    try:
        state = torch.load(weights, mmap=True, weights_only=True, map_location="cpu")
    except Exception as error:  # a broken or hostile pickle raises any type
        what = str(error).splitlines()[0]
        raise BadFile(f"{weights}: cannot be read as weights alone; no code of it was run: {what}") from None
    _require(isinstance(state, dict), f"{weights}: holds no state dict")
    state = {name.removeprefix("model."): tensor for name, tensor in state.items() if torch.is_tensor(tensor)}
    tied = "output_projection.weight" not in state
    if not tied and "embed_tokens.weight" in state:
        tied = state["output_projection.weight"].data_ptr() == state["embed_tokens.weight"].data_ptr()
    content = _json(params, "the authors' layout")
    config = _described(params, config_fields.from_official, content, tied, max_position_embeddings=4096)
    tensors = _Loaded(state)
    rows = tensors.found().get("embed_tokens.weight", ((0,), None))[0][0]
    split = 0 < rows < config.vocab_size and config.vocab_size % rows == 0
    _require(not split, f"{weights}: {rows} of {config.vocab_size} rows of embed_tokens are there; it is {A_PART}")
    return _renamed("official", weights, config, tensors, tensor_names.official, params.name)
