"""Which tensors of a teacher each tensor of a YOCO is made of.

    embeddings, head, FFNs, norms, q and o    the teacher's
    k and v of windows                        the teacher's
    norms of queries and keys, biases         the teacher's, where attention is (Qwen3, Qwen2)
    k and v of gated retention                the teacher's, each head's repeated for the queries that share it
    decay and gate of gated retention         zero: half-life tau tokens; the layer's output is 0 until it is trained
    shared K,V, its norms and biases          for each set those of one of its readers, or the mean of all

The teacher's layers have a norm each before their k and v, the shared K,V have one norm. So each layer's norm weight is
multiplied into the columns of its k and v, and the weight of the shared norm is 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from yoco_megatron.config.kv_sets import layers_of_sets
from yoco_megatron.convert import tensor_names
from yoco_megatron.convert.readers import Source
from yoco_megatron.hf.configuration_yoco import YocoConfig
from yoco_megatron.mixers import GATED_RETENTION
from yoco_megatron.upcycling import MIXERS
from yoco_megatron.upcycling.teacher import Teacher
from yoco_megatron.utils.errors import require

NEW = ("decay_proj", "g_proj")  # of gated retention; attention has nothing like them


@dataclass(frozen=True)
class Recipe:
    """A tensor of the YOCO: `make` of the teacher's tensors `names`; of none, it is new."""

    names: tuple[str, ...]
    make: Callable[..., Tensor]


def student_config(
    teacher: Teacher, self_decoder: str, window: int | None, num_self_decoder_layers: int | None, shared_kv_sets: int
) -> YocoConfig:
    """The YOCO's configuration: the teacher's sizes, the other arguments as the flags of these names have them.

    Raises:
        ValueError: sizes that do not fit one another.
    """
    require(
        self_decoder in MIXERS,
        f"--self-decoder {self_decoder} cannot be made of a Transformer's attention: use one of {', '.join(MIXERS)}",
    )
    config = teacher.config
    layers = config.num_hidden_layers
    own = layers // 2 if num_self_decoder_layers is None else num_self_decoder_layers
    require(0 <= own < layers, f"--num-self-decoder-layers {own} must lie between 0 and {layers - 1}")
    cross = layers - own
    require(
        shared_kv_sets >= 1 and cross % shared_kv_sets == 0,
        f"--shared-kv-sets {shared_kv_sets} does not divide the {cross} cross-decoder layers: choose a divisor, or "
        "another --num-self-decoder-layers",
    )
    grouped = self_decoder != GATED_RETENTION.name
    for what, is_there in (("norms of queries and keys", teacher.qk_norm), ("biases of q, k, v", teacher.qkv_bias)):
        require(
            grouped or own == 0 or not is_there,
            f"--teacher {teacher.folder}: this {config.model_type} has {what}, for which --self-decoder {self_decoder} "
            "has no place: use sliding_window",
        )
    require(window is None or grouped, "--self-decoder-window is for --self-decoder sliding_window: remove it")
    require(window is None or window >= 2, f"--self-decoder-window {window} must be at least 2")
    fields: dict[str, Any] = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=layers,
        num_self_decoder_layers=own,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        self_decoder=self_decoder,
        self_decoder_heads=config.num_attention_heads,
        self_decoder_head_dim=config.head_dim,
        self_decoder_key_value_heads=config.num_key_value_heads if grouped else config.num_attention_heads,
        shared_kv_sets=shared_kv_sets,
        rope_theta=teacher.rope_theta,
        rope_variant="standard",
        rope_interleaved=False,
        **teacher.rope_scaling,
        qk_norm=teacher.qk_norm,
        qkv_bias=teacher.qkv_bias,
        scale_embedding=False,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
    )
    if window is not None:
        fields["sliding_window"] = window
    try:
        return YocoConfig(**fields)
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"--teacher {teacher.folder}: a YOCO of its sizes: {' '.join(str(error).split())}") from None


def readers(config: YocoConfig) -> list[range]:
    """For each set of shared K,V, the layers that read it."""
    return layers_of_sets(config.num_hidden_layers, config.num_self_decoder_layers, config.shared_kv_sets)


def kv_layers(config: YocoConfig, rule: str) -> list[list[int]]:
    """For each set of shared K,V, the teacher's layers that it is made of. `rule` is of upcycling.SHARED_KV_FROM."""
    groups = readers(config)
    place = {"first": 0, "middle": len(groups[0]) // 2, "last": -1}
    return [list(group) if rule == "mean" else [group[place[rule]]] for group in groups]


def recipes(config: YocoConfig, rule: str) -> dict[str, Recipe]:
    """How each of `tensor_names.shapes(config)` is made."""
    layers = {tensor_names.layer_name(config, i): f"model.layers.{i}." for i in range(config.num_hidden_layers)}
    found: dict[str, Recipe] = {}
    for name, shape in tensor_names.shapes(config).items():
        ours = ".".join(name.split(".")[:3]) + "."
        theirs = name.replace(ours, layers.get(ours, ours)).replace(".mixer.", ".self_attn.")
        module, _, end = name.rpartition(".")
        kind = module.rpartition(".")[2]
        if module.startswith("model.shared_kv.k_norm."):
            sources = kv_layers(config, rule)[int(kind)]
            found[name] = Recipe(tuple(f"model.layers.{i}.self_attn.k_norm.weight" for i in sources), _mean)
        elif name.startswith("model.shared_kv."):
            found[name] = _new(shape, 1.0) if kind == "norm" else _shared(config, rule, f"{kind}.{end}")
        elif kind in NEW:
            found[name] = _new(shape, 0.0)
        elif kind in ("k_proj", "v_proj"):
            groups = config.num_key_value_heads
            found[name] = Recipe((theirs,), partial(_per_head, groups, config.self_decoder_key_value_heads // groups))
        else:
            found[name] = Recipe((theirs,), lambda whole: whole)
    return found


def _new(shape: tensor_names.Shape, value: float) -> Recipe:
    return Recipe((), lambda: torch.full(shape, value))


def _per_head(groups: int, heads: int, whole: Tensor) -> Tensor:
    """Each of `groups` heads of whole [groups D, h] repeated `heads` times."""
    return whole.unflatten(0, (groups, -1)).repeat_interleave(heads, 0).flatten(0, 1)


def _mean(*read: Tensor) -> Tensor:
    """Of tensors of one shape, in fp32 or wider."""
    return torch.stack([tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in read]).mean(0)


def _shared(config: YocoConfig, rule: str, name: str) -> Recipe:
    """A weight or bias of the k_proj or v_proj of all sets: rows by head, and inside a head by set."""
    sets, groups = kv_layers(config, rule), config.num_key_value_heads
    is_weight = name.endswith(".weight")  # whose columns the norm's weight goes into
    tensors = (f"self_attn.{name}", *(["input_layernorm.weight"] if is_weight else []))
    names = tuple(f"model.layers.{i}.{tensor}" for layers in sets for i in layers for tensor in tensors)

    def make(*read: Tensor) -> Tensor:
        wide = torch.promote_types(read[-1].dtype, torch.float32)
        if is_weight:
            folded = torch.stack([weight * norm.to(wide) for weight, norm in zip(read[::2], read[1::2])])
        else:
            folded = torch.stack(read).to(wide)
        of_sets = folded.unflatten(0, (len(sets), -1)).mean(1)
        return of_sets.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 2)

    return Recipe(names, make)


def student(teacher: Teacher, config: YocoConfig, rule: str) -> Source:
    """The YOCO as something to read, each tensor made when it is asked for, in the dtype of the teacher's."""
    made = recipes(config, rule)
    embedding = teacher.found["model.embed_tokens.weight"][1]
    dtypes = {name: teacher.found[one.names[0]][1] if one.names else embedding for name, one in made.items()}

    def load(name: str) -> Tensor:
        return made[name].make(*(teacher.tensors.load(source) for source in made[name].names)).to(dtypes[name])

    tokenizer = any((teacher.folder / file).exists() for file in ("tokenizer_config.json", "tokenizer.json"))
    return Source(
        kind="upcycled",
        folder=teacher.folder,
        config=config,
        dtypes=dtypes,
        load=load,
        tokenizer=teacher.folder if tokenizer else None,
        flag="--teacher",
    )
