"""Configuration of a YOCO model (arXiv 2405.05254) in transformers."""

from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.configuration_utils import PreTrainedConfig

# transformers' cache knows closed names of layer kinds; a retention layer is one with a recurrent state.
LAYER_TYPES = {
    "gated_retention": "linear_attention",
    "sliding_window": "sliding_attention",
    "mamba2": "linear_attention",
    "gated_delta_net": "linear_attention",
}
# Mixers of the self-decoder by their letters in a pattern.
LETTERS = {"R": "gated_retention", "S": "sliding_window", "M": "mamba2", "G": "gated_delta_net"}
# Mixers whose layers tensor parallelism does not cut.
UNCUT = {"mamba2", "gated_delta_net"}
MAMBA = ("mamba_num_heads", "mamba_head_dim", "mamba_state_dim", "mamba_num_groups")

# Largest values: far above any model, and low enough that a damaged file cannot make a loader build for hours.
MOST_LAYERS, MOST_EXPERTS, MOST = 10_000, 1_000_000, 2**31 - 1
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "self_decoder_heads",
    "self_decoder_head_dim",
    "self_decoder_key_value_heads",
    "max_position_embeddings",
    "num_hidden_layers",
    *MAMBA,
    "shared_kv_sets",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "n_group",
    "topk_group",
)
# Numbers and what they must lie between, inclusive.
NUMBERS = {
    "sliding_window": (2, MOST),  # transformers' cache keeps one less, and takes 0 for all of them
    "decay_temperature": (1e-3, 1e6),
    "rope_theta": (1.0, 1e12),
    "rope_scaling_factor": (1.0, 1e6),
    "rms_norm_eps": (1e-30, 0.1),
    "initializer_range": (0.0, 1e3),
    "routed_scaling_factor": (0.0, 1e6),
    "mtp_num_layers": (0, MOST_LAYERS),
}
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")

# Type of a size whose default follows from other sizes: None may be passed in, and is replaced when the config is made.
if TYPE_CHECKING:
    NotGiven = Any
else:
    NotGiven = None


@strict
class YocoConfig(PreTrainedConfig):
    """Sizes and switches of a YOCO.

    `num_attention_heads`, `num_key_value_heads` and `head_dim` describe the cross-decoder and its shared K,V; the
    self-decoder has `self_decoder_heads` of width `self_decoder_head_dim`, and, with a sliding window,
    `self_decoder_key_value_heads`. `self_decoder` names the mixer of its layers, or has a letter for each (RRSS: gated
    retention, sliding window). `sliding_window` counts the keys that a query sees, itself included.

    Mamba-2 (M, mamba2) has `mamba_num_heads` of width `mamba_head_dim` and a state of `mamba_state_dim` values for each
    of these; its heads are in `mamba_num_groups` groups.

    `qk_norm` normalises the heads of queries and keys before RoPE, `qkv_bias` gives projections to q, k, v biases: in
    softmax attention, which gated retention is not.

    Of `shared_kv_sets` K,V each is read by equally many neighbouring cross-decoder layers; the paper has one. They are
    projected from the output of the self-decoder's last layer, or equally many from each of the layers
    `shared_kv_sources`, ascending from 1.

    `cross_decoder_pattern` has a letter for each cross-decoder layer: A attends to the shared K,V, G is a gated memory
    unit, which reads the memory of the self-decoder's last layer that is recurrent. None: all attend.

    `rope_variant` "yoco" has the frequencies theta^-linspace(0, 1) of the authors' code, "standard" theta^(-2j/d);
    `rope_interleaved` rotates pairs (2j, 2j + 1) instead of (j, j + d/2). Rows of the projections are ordered for it.
    `use_rope_scaling` divides low frequencies by `rope_scaling_factor`, as Llama 3.1 does.

    With `num_experts` the FFN of every `moe_layer_freq`-th layer from the first on (or of those for which its list has
    a 1) is a mixture of experts of width `moe_intermediate_size`; what follows it says which of them a token goes
    through. `scoring_func` softmax is over the chosen experts, with `router_pre_softmax` over all; the others are
    normalised over the chosen ones. `router_dtype` (fp32, fp64, or None for the model's) is that of the router's
    product. `use_expert_bias`: its choice has a bias.

    `mtp_num_layers`: layers of multi-token prediction among the weights. The model does not load them; training goes on
    with them.
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
        "shared_kv_*.k_proj": "colwise",
        "shared_kv_*.v_proj": "colwise",
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
    self_decoder_head_dim: int | NotGiven = None
    self_decoder_key_value_heads: int | NotGiven = None
    sliding_window: int | None = 1024
    mamba_num_heads: int | NotGiven = None
    mamba_head_dim: int | NotGiven = None
    mamba_state_dim: int | NotGiven = None
    mamba_num_groups: int | NotGiven = None
    shared_kv_sets: int = 1
    shared_kv_sources: list[int] | None = None
    cross_decoder_pattern: str | None = None
    num_experts: int | None = None
    moe_layer_freq: int | list[int] = 1
    moe_intermediate_size: int | NotGiven = None
    num_experts_per_tok: int = 2
    shared_expert_intermediate_size: int | None = None
    shared_expert_gate: bool = False
    scoring_func: str = "softmax"
    router_pre_softmax: bool = False
    router_dtype: str | None = None
    use_expert_bias: bool = False
    routed_scaling_factor: float | int | None = None
    n_group: int | None = None
    topk_group: int | None = None
    mtp_num_layers: int = 0
    qk_norm: bool = False
    qkv_bias: bool = False
    decay_temperature: float | int = 16.0
    rope_theta: float | int = 10000.0
    rope_variant: str = "yoco"
    rope_interleaved: bool = True
    use_rope_scaling: bool = False
    rope_scaling_factor: float | int = 8.0
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
        self._check_choices(kwargs)
        self._check_sizes()  # those that are given: others are derived from them
        defaults = {
            "num_self_decoder_layers": self.num_hidden_layers // 2,
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": self.hidden_size // self.num_attention_heads,
            "self_decoder_heads": self.num_attention_heads,
            "moe_intermediate_size": self.intermediate_size,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.self_decoder_key_value_heads is None:
            self.self_decoder_key_value_heads = self.self_decoder_heads
        if self.self_decoder_head_dim is None:
            if self.hidden_size % self.self_decoder_heads:
                raise ValueError(
                    f"self_decoder_heads {self.self_decoder_heads} does not divide hidden_size {self.hidden_size}: "
                    "self_decoder_head_dim is missing"
                )
            self.self_decoder_head_dim = self.hidden_size // self.self_decoder_heads
        self._check_shape()
        self._check_experts()
        cross = self.num_hidden_layers - self.num_self_decoder_layers
        if set(self.cross_decoder_pattern or "") == {"A"}:
            self.cross_decoder_pattern = None
        if UNCUT & {*self.self_decoder_mixers} or self.cross_decoder_pattern:  # the memory is whole
            cut = {name: how for name, how in self.base_model_tp_plan.items() if "self_layers.*.mixer" not in name}
            vars(self)["base_model_tp_plan"] = cut
        self.layer_types = [LAYER_TYPES[mixer] for mixer in self.self_decoder_mixers] + ["full_attention"] * cross
        super().__post_init__(**kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "YocoConfig":
        """As transformers', with the folder in what is wrong with its config.json."""
        try:
            return super().from_pretrained(*args, **kwargs)
        except (StrictDataclassError, ValueError) as error:
            what = " ".join(str(error).split())
            folder = args[0] if args else kwargs.get("pretrained_model_name_or_path")
            raise ValueError(f"{folder}: config.json describes no YOCO: {what}") from error

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', but attention code of a hub, which it would download and run, is for the caller to name."""
        for name in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
            value = config_dict.get(name)
            if "/" in str(value):
                raise ValueError(f"{name} {value!r} names code on a hub: remove it, or pass it to from_pretrained")
        return super().from_dict(config_dict, **kwargs)

    def _check_choices(self, others: dict[str, Any]) -> None:
        choices = {
            "rope_variant": ("yoco", "standard"),
            "hidden_act": ("silu", "swish"),
            "scoring_func": ("softmax", "sigmoid", "sqrtsoftplus"),
            "router_dtype": ("fp32", "fp64", None),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; choose {' or '.join(map(str, known))}")
        names = [*LAYER_TYPES, f"a letter of {', '.join(LETTERS)} for each layer"]
        if self.self_decoder not in LAYER_TYPES and not (self.self_decoder and set(self.self_decoder) <= set(LETTERS)):
            raise ValueError(f"self_decoder {self.self_decoder!r:.80} is unknown; choose {' or '.join(names)}")
        for name in ("rope_scaling", "rope_parameters"):
            if others.get(name):
                raise ValueError(f"{name} is not supported: the frequencies are those of rope_theta and rope_variant")
        if not isinstance(self.architectures, list | None):
            raise ValueError(f"architectures {self.architectures!r} must be a list of names of classes")
        for name, dtype in (("dtype", self.dtype), ("torch_dtype", others.get("torch_dtype"))):
            text = str(dtype).removeprefix("torch.")
            if dtype is not None and text not in ("float64", "float32", "bfloat16", "float16"):
                raise ValueError(f"{name} {dtype!r} must be float32, bfloat16, float16 or float64")

    def _check_sizes(self) -> None:
        for name in SIZES:
            value, most = getattr(self, name), MOST_LAYERS if name == "num_hidden_layers" else MOST
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{name} {value!r} must be a whole number from 1 to {most}")
        for name, (low, high) in NUMBERS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # NaN neither
                raise ValueError(f"{name} {value!r} must be a number from {low:g} to {high:g}")
        for name in TOKENS:
            value = getattr(self, name)
            for token in value if isinstance(value, list) else [value]:
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ValueError(f"{name} {token!r} is no token id: vocab_size is {self.vocab_size}")

    def _check_shape(self) -> None:
        parts = {
            "num_attention_heads": ("num_key_value_heads", self.num_attention_heads, self.num_key_value_heads),
        }
        if not 0 <= self.num_self_decoder_layers < self.num_hidden_layers:
            raise ValueError(
                f"num_self_decoder_layers {self.num_self_decoder_layers} must lie between 0 and num_hidden_layers - 1"
            )
        mixers = self.self_decoder_mixers
        if len(mixers) != self.num_self_decoder_layers:
            raise ValueError(
                f"self_decoder {self.self_decoder} has {len(mixers)} letters for {self.num_self_decoder_layers} layers"
            )
        if "sliding_window" in mixers or self.self_decoder == "sliding_window":
            groups = self.self_decoder_key_value_heads
            parts["self_decoder_heads"] = ("self_decoder_key_value_heads", self.self_decoder_heads, groups)
            if self.sliding_window is None:
                raise ValueError("sliding_window is missing, which a self_decoder of this kind needs")
        elif self.self_decoder_key_value_heads != self.self_decoder_heads:
            raise ValueError(
                f"self_decoder_key_value_heads {self.self_decoder_key_value_heads} must be self_decoder_heads "
                f"{self.self_decoder_heads}: retention shares no K,V"
            )
        if "mamba2" in mixers:
            missing = [name for name in MAMBA if getattr(self, name) is None]
            if missing:
                raise ValueError(f"{' and '.join(missing)} missing, which a self_decoder of mamba2 needs")
            parts["mamba_num_heads"] = ("mamba_num_groups", self.mamba_num_heads, self.mamba_num_groups)
        for whole, (part, number, divisor) in parts.items():
            if number % divisor:
                raise ValueError(f"{part} {divisor} does not divide {whole} {number}")
        for name in ("head_dim", "self_decoder_head_dim"):
            width = getattr(self, name)
            if width % 2 or not width:
                raise ValueError(f"{name} {width}: heads must have an even width for RoPE")
        cross = self.num_hidden_layers - self.num_self_decoder_layers
        if cross % self.shared_kv_sets:
            raise ValueError(f"shared_kv_sets {self.shared_kv_sets} does not divide the {cross} cross-decoder layers")
        letters, readers = self.cross_decoder_pattern, cross // self.shared_kv_sets
        if letters is not None:
            if len(letters) != cross or not set(letters) <= {"A", "G"}:
                raise ValueError(
                    f"cross_decoder_pattern {letters!r:.80} must have a letter, A or G, for {cross} layers"
                )
            if not all("A" in letters[first : first + readers] for first in range(0, cross, readers)):
                raise ValueError(f"cross_decoder_pattern {letters!r:.80}: of each {readers} layers one must attend, A")
            if "G" in letters and self.memory_source is None:
                raise ValueError(f"cross_decoder_pattern {letters!r:.80}: no layer of the self_decoder has a memory")
        sources, last = self.shared_kv_sources, self.num_self_decoder_layers
        if sources is None:
            return
        if not sources or sources != sorted({*sources}) or not 1 <= sources[0] <= sources[-1] <= last:
            raise ValueError(f"shared_kv_sources {sources!r:.80} must be layers from 1 to {last}, ascending")
        if self.shared_kv_sets % len(sources):
            raise ValueError(f"shared_kv_sets {self.shared_kv_sets} is no multiple of {len(sources)} shared_kv_sources")

    def _check_experts(self) -> None:
        if self.num_experts is None:
            return
        count, k, each, groups = self.num_experts, self.num_experts_per_tok, self.moe_layer_freq, self.topk_group
        if count * self.num_hidden_layers > MOST_EXPERTS:
            raise ValueError(f"num_experts {count} in each of {self.num_hidden_layers} layers are above {MOST_EXPERTS}")
        if self.mtp_num_layers:
            raise ValueError(f"mtp_num_layers {self.mtp_num_layers} must be 0 in a model with num_experts")
        if k > count:
            raise ValueError(f"num_experts_per_tok {k} is more than num_experts {count}")
        if isinstance(each, list) and (len(each) != self.num_hidden_layers or not set(each) <= {0, 1}):
            raise ValueError(f"moe_layer_freq {each!r:.80} must be 0 or 1 for each of {self.num_hidden_layers} layers")
        if isinstance(each, int) and each < 1:
            raise ValueError(f"moe_layer_freq {each} must be at least 1: every how many layers there are experts")
        if self.use_expert_bias and self.scoring_func == "softmax":
            raise ValueError("use_expert_bias needs a scoring_func of sigmoid or sqrtsoftplus")
        if groups is None:
            return
        if self.n_group is None or count % self.n_group or groups > self.n_group:
            raise ValueError(
                f"n_group {self.n_group} must divide num_experts {count} and be at least topk_group {groups}"
            )
        if not groups <= k <= groups * (count // self.n_group):
            raise ValueError(
                f"num_experts_per_tok {k} must be at least topk_group {groups}, and the experts of as many groups"
            )

    @property
    def self_decoder_mixers(self) -> list[str]:
        """The mixer of each layer of the self-decoder."""
        if self.self_decoder in LAYER_TYPES:
            return [self.self_decoder] * self.num_self_decoder_layers
        return [LETTERS[letter] for letter in self.self_decoder]

    @property
    def cross_letters(self) -> str:
        """Of each layer of the cross-decoder."""
        return self.cross_decoder_pattern or "A" * (self.num_hidden_layers - self.num_self_decoder_layers)

    @property
    def memory_source(self) -> int | None:
        """The layer, counted from 0, whose memory gated memory units read; None without such units."""
        recurrent = [i for i, mixer in enumerate(self.self_decoder_mixers) if mixer != "sliding_window"]
        return recurrent[-1] if recurrent and "G" in self.cross_letters else None

    @property
    def memory_width(self) -> int:
        """Values of a token's memory."""
        if self.memory_source is not None and self.self_decoder_mixers[self.memory_source] == "mamba2":
            return self.mamba_num_heads * self.mamba_head_dim
        return self.self_decoder_heads * self.self_decoder_head_dim

    @property
    def layers_with_experts(self) -> list[bool]:
        """For each layer, self-decoder first, whether its FFN is a mixture of experts."""
        if self.num_experts is None:
            return [False] * (self.num_hidden_layers + self.mtp_num_layers)
        if isinstance(self.moe_layer_freq, int):
            return [index % self.moe_layer_freq == 0 for index in range(self.num_hidden_layers)]
        return [bool(has) for has in self.moe_layer_freq]

    @property
    def kv_names(self) -> dict[int, str]:
        """Of each projection to shared K,V the layers before it, and its module; that of the last is `shared_kv`."""
        *others, last = self.shared_kv_sources or [self.num_self_decoder_layers]
        return {source: f"shared_kv_{source}" for source in others} | {last: "shared_kv"}

    @property
    def kv_sharing_modes(self) -> list[str | None]:
        """transformers' caches read this: the first cross layer of a set's stores its K,V, the others reuse them."""
        own, sets = self.num_self_decoder_layers, self.shared_kv_sets
        readers = (self.num_hidden_layers - own) // sets
        return [None] * own + ["store", *["reuse"] * (readers - 1)] * sets


__all__ = ["YocoConfig"]
