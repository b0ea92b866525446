"""The teacher: a Transformer of the Llama or Qwen family in a Hugging Face folder, read one tensor at a time.

What a YOCO cannot hold is refused by name, and so is every tensor that has no place in one: none is lost in silence. No
code of the folder runs, and no pickle is read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yoco_megatron.convert.readers import Found, SafeTensors, check_shapes, drop_tied_head
from yoco_megatron.costs.teacher import FAMILIES
from yoco_megatron.mixers.record import Shape
from yoco_megatron.utils import small_files
from yoco_megatron.utils.errors import require

# Tensors by the end of their name -> why the YOCO made of their model would be another one.
NO_PLACE = {
    ".o_proj.bias": "a bias behind attention, which a YOCO does not have",
    "_proj.bias": "biases, which a YOCO has of queries, keys and values alone",
}
# Numbers of Llama 3.1 to 3.3, which Megatron has no flags for.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
NOT_WEIGHTS = ".rotary_emb.inv_freq"  # old checkpoints repeat the frequencies of their config


@dataclass(frozen=True)
class Teacher:
    """A model on disk. Its tensors have transformers' names; `found` has their shapes and dtypes."""

    folder: Path
    config: Any
    """transformers' own, of a model_type in FAMILIES."""
    tensors: SafeTensors
    found: Found

    @property
    def qk_norm(self) -> bool:
        """Queries and keys are normalised, each head, before RoPE (Qwen3)."""
        return self.config.model_type == "qwen3"

    @property
    def qkv_bias(self) -> bool:
        """Projections to queries, keys and values have biases (Qwen2)."""
        return self.config.model_type == "qwen2"

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies."""
        return self.config.rope_parameters["rope_theta"]

    @property
    def rope_scaling(self) -> dict[str, Any]:
        """How its low frequencies are divided, as the fields of these names in YOCOConfig and YocoConfig."""
        rope = self.config.rope_parameters
        scaled = rope.get("rope_type") == "llama3"
        return {"use_rope_scaling": scaled} | ({"rope_scaling_factor": rope["factor"]} if scaled else {})

    @property
    def window(self) -> int | None:
        """Keys that a query of its windowed layers sees; None: no layer has a window."""
        windows = getattr(self.config, "layer_types", None) or ["sliding_attention"]
        return getattr(self.config, "sliding_window", None) if "sliding_attention" in windows else None

    @property
    def is_mixed(self) -> bool:
        """Some layers have a window, and others none (Qwen's max_window_layers)."""
        return self.window is not None and len(set(getattr(self.config, "layer_types", None) or ())) > 1


def open_teacher(folder: str) -> Teacher:
    """Open the Transformer in `folder`, which --teacher named.

    Raises:
        ValueError: no such model there, files missing or cut short, wrong shapes, or a model that no YOCO can hold.
    """
    path = Path(folder)
    try:
        require(
            path.suffix != ".gguf",
            f"{folder}: a GGUF file is quantised: have transformers write a folder of it first (docs/upcycling.md)",
        )
        require(path.is_dir(), f"{folder}: no such folder")
        config = _config(path)
        pickled = sorted(file.name for file in path.glob("*.bin"))
        require(
            not pickled or any(path.glob("*.safetensors")),
            f"{folder}: {''.join(pickled[:1])} is a pickle, which could run code: save the model as safetensors "
            "(save_pretrained of transformers does)",
        )
        tensors = SafeTensors(path)
        found = {name: what for name, what in tensors.found().items() if not name.endswith(NOT_WEIGHTS)}
        if config.tie_word_embeddings:
            drop_tied_head(tensors.place, tensors, found, "lm_head.weight", "model.embed_tokens.weight")
        wanted = shapes(config)
        for name in found.keys() - wanted.keys():
            why = next((why for end, why in NO_PLACE.items() if name.endswith(end)), None)
            require(why is None, f"{folder}: {name} is there: this {config.model_type} has {why}")
        check_shapes(tensors.place, found, wanted, "config.json")
    except ValueError as error:
        raise ValueError(f"--teacher {error}") from error
    return Teacher(path, config, tensors, found)


def shapes(config: Any) -> dict[str, Shape]:
    """Every tensor of the model that transformers' config describes; [out, in] for matrices."""
    h, ffn = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer: dict[str, Shape] = {
        "input_layernorm": (h,),
        "self_attn.q_proj": (q, h),
        "self_attn.k_proj": (kv, h),
        "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, q),
        "post_attention_layernorm": (h,),
        "mlp.gate_proj": (ffn, h),
        "mlp.up_proj": (ffn, h),
        "mlp.down_proj": (h, ffn),
    }
    layer = {f"{name}.weight": shape for name, shape in layer.items()}
    if config.model_type == "qwen2":
        layer |= {f"self_attn.{name}_proj.bias": (rows,) for name, rows in (("q", q), ("k", kv), ("v", kv))}
    if config.model_type == "qwen3":
        layer |= {f"self_attn.{name}_norm.weight": (config.head_dim,) for name in "qk"}
    found: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, h)}
    for index in range(config.num_hidden_layers):
        found |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    found["model.norm.weight"] = (h,)
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = (config.vocab_size, h)
    return found


def _config(folder: Path) -> Any:
    """transformers' configuration of the model, with `head_dim` filled in. Raises ValueError."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    file = folder / "config.json"
    content = small_files.read_json(file)
    family = content.get("model_type")
    require(
        family in FAMILIES,
        f"{folder}: its config.json says model_type {family!r}; known here are {', '.join(FAMILIES)}",
    )
    quantised = content.get("quantization_config")
    require(not quantised, f"{folder}: its weights are quantised (quantization_config): give the original's")
    try:
        config: Any = CONFIG_MAPPING[family].from_dict(content)
    except (StrictDataclassError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} describes no {family}: {' '.join(str(error).split())}") from None
    if getattr(config, "head_dim", None) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    known = kind == "default" or (kind == "llama3" and all(rope.get(name) == is_ for name, is_ in LLAMA3.items()))
    require(
        known,
        f"{folder}: its RoPE is {rope}; a YOCO knows theta^(-2j/d), and that with Llama 3's own scaling, by any factor",
    )
    require(
        rope.get("partial_rotary_factor", 1.0) == 1.0 and "rope_theta" in rope,
        f"{folder}: its rope_parameters {rope} are not those of whole heads with one theta",
    )
    require(config.hidden_act in ("silu", "swish"), f"{folder}: hidden_act {config.hidden_act!r} is no SwiGLU's")
    return config
