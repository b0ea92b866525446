"""Configuration of a YOCO model (arXiv 2405.05254) in transformers."""

from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

# transformers' cache knows closed names of layer kinds; a retention layer is one with a recurrent state.
LAYER_TYPES = {"gated_retention": "linear_attention", "sliding_window": "sliding_attention"}

# Type of a size whose default follows from other sizes: None may be passed in, and is replaced when the config is made.
if TYPE_CHECKING:
    NotGiven = Any
else:
    NotGiven = None


@strict
class YocoConfig(PreTrainedConfig):
    """Sizes and switches of a YOCO.

    `num_attention_heads`, `num_key_value_heads` and `head_dim` describe the cross-decoder and the one shared K,V; the
    self-decoder has `self_decoder_heads` heads of width hidden_size / self_decoder_heads, and, with a sliding window,
    `self_decoder_key_value_heads`. `sliding_window` counts the keys that a query sees, itself included.

    `rope_variant` "yoco" has the frequencies theta^-linspace(0, 1) of the authors' code, "standard" theta^(-2j/d);
    `rope_interleaved` rotates pairs (2j, 2j + 1) instead of (j, j + d/2). Rows of the projections are ordered for it.
    """

    # Not "yoco": flash-linear-attention registers that, and a registered model comes before the code of a folder.
    model_type = "yoco_megatron"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "self_layers.*.mixer.q_proj": "colwise",
        "self_layers.*.mixer.k_proj": "colwise",
        "self_layers.*.mixer.v_proj": "colwise",
        "self_layers.*.mixer.g_proj": "colwise",
        "self_layers.*.mixer.decay_proj": "colwise",
        "self_layers.*.mixer.o_proj": "rowwise",
        "shared_kv.k_proj": "colwise",
        "shared_kv.v_proj": "colwise",
        "cross_layers.*.mixer.q_proj": "colwise",
        "cross_layers.*.mixer.o_proj": "rowwise",
        "self_layers.*.mlp.gate_proj": "colwise",
        "self_layers.*.mlp.up_proj": "colwise",
        "self_layers.*.mlp.down_proj": "rowwise",
        "cross_layers.*.mlp.gate_proj": "colwise",
        "cross_layers.*.mlp.up_proj": "colwise",
        "cross_layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 100352
    hidden_size: int = 3072
    intermediate_size: int = 8192
    num_hidden_layers: int = 26
    num_self_decoder_layers: int | NotGiven = None
    num_attention_heads: int = 24
    num_key_value_heads: int | NotGiven = None
    head_dim: int | NotGiven = None
    self_decoder: str = "gated_retention"
    self_decoder_heads: int | NotGiven = None
    self_decoder_key_value_heads: int | NotGiven = None
    sliding_window: int | None = 1024
    decay_temperature: float | int = 16.0
    rope_theta: float | int = 10000.0
    rope_variant: str = "yoco"
    rope_interleaved: bool = True
    scale_embedding: bool = True
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    max_position_embeddings: int = 4096
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    layer_types: list[str] | NotGiven = None

    def __post_init__(self, **kwargs):
        if self.self_decoder not in LAYER_TYPES:
            raise ValueError(f"self_decoder {self.self_decoder!r} is unknown; choose one of {', '.join(LAYER_TYPES)}")
        if self.rope_variant not in ("yoco", "standard"):
            raise ValueError(f"rope_variant {self.rope_variant!r} is unknown; choose yoco or standard")
        defaults = {
            "num_self_decoder_layers": self.num_hidden_layers // 2,
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": self.hidden_size // self.num_attention_heads,
            "self_decoder_heads": self.num_attention_heads,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.self_decoder_key_value_heads is None:
            self.self_decoder_key_value_heads = self.self_decoder_heads
        if not 0 <= self.num_self_decoder_layers < self.num_hidden_layers:
            raise ValueError(
                f"num_self_decoder_layers {self.num_self_decoder_layers} must lie between 0 and num_hidden_layers - 1"
            )
        cross = self.num_hidden_layers - self.num_self_decoder_layers
        self.layer_types = [LAYER_TYPES[self.self_decoder]] * self.num_self_decoder_layers + ["full_attention"] * cross
        super().__post_init__(**kwargs)

    @property
    def self_decoder_head_dim(self) -> int:
        """Width of one self-decoder head."""
        return self.hidden_size // self.self_decoder_heads

    @property
    def kv_sharing_modes(self) -> list[str | None]:
        """transformers' caches read this: the first cross layer stores the K,V, the others reuse them."""
        own, cross = self.num_self_decoder_layers, self.num_hidden_layers - self.num_self_decoder_layers
        return [*([None] * own), "store", *(["reuse"] * (cross - 1))]


__all__ = ["YocoConfig"]
