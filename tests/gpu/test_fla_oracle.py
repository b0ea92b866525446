"""Our logits against flash-linear-attention's independent YOCOForCausalLM, for copied weights (gated retention).

Both run in float32 on the GPU. fla's Triton kernels multiply in TF32 (10 bits) by default, hence 5e-3 on the logits.
"""

import pytest
import torch
from support.models import SEQ, VOCAB, batch, build, relative_error, tiny_config

pytestmark = pytest.mark.gpu
LOGITS = 5e-3


def fla_state(model, config) -> dict[str, torch.Tensor]:
    """Our state dict under fla's names."""
    ours = {name: value for name, value in model.state_dict().items() if torch.is_tensor(value)}
    heads_self, heads = config.self_decoder_heads, config.num_attention_heads
    state = {
        "model.embeddings.weight": ours["embedding.word_embeddings.weight"],
        "model.norm.weight": ours["final_layernorm.weight"],
        "lm_head.weight": ours["output_layer.weight"],
        "model.shared_kv_builder.kv_norm.weight": ours["decoder.shared_kv.layernorm.weight"],
    }
    kv = ours["decoder.shared_kv.linear_kv.weight"].view(config.num_query_groups, 2, config.hidden_size // heads, -1)
    for i, part in enumerate(("k_proj", "v_proj")):
        state[f"model.shared_kv_builder.{part}.weight"] = kv[:, i].flatten(0, 1)
    for index in range(config.num_layers):
        own = f"decoder.layers.{index}."
        retention = index < config.num_self_decoder_layers
        there = (
            f"model.self_layers.{index}."
            if retention
            else (f"model.cross_layers.{index - config.num_self_decoder_layers}.")
        )
        state[there + "attn_norm.weight"] = ours[own + "input_layernorm.weight"]
        state[there + "mlp_norm.weight"] = ours[own + "pre_mlp_layernorm.weight"]
        gate, up = ours[own + "mlp.linear_fc1.weight"].chunk(2)
        state |= {there + "mlp.gate_proj.weight": gate, there + "mlp.up_proj.weight": up}
        state[there + "mlp.down_proj.weight"] = ours[own + "mlp.linear_fc2.weight"]
        state[there + "attn.o_proj.weight"] = ours[own + "self_attention.linear_proj.weight"]
        if retention:
            qkvg = ours[own + "self_attention.linear_qkvg.weight"].view(heads_self, 4, -1, config.hidden_size)
            for i, part in enumerate(("q_proj", "k_proj", "v_proj", "g_proj")):
                state[f"{there}attn.{part}.weight"] = qkvg[:, i].flatten(0, 1)
            state[there + "attn.gk_proj.weight"] = ours[own + "self_attention.linear_decay.weight"]
        else:
            state[there + "attn.q_proj.weight"] = ours[own + "self_attention.linear_q.weight"]
    return state


def test_logits_equal_fla(one_process) -> None:
    yoco = pytest.importorskip("fla.models.yoco")
    # fla's kernels want heads of 64 and more, and a vocabulary of its own kind.
    config = tiny_config(
        hidden_size=256, num_attention_heads=4, num_query_groups=2, self_decoder_heads=2, ffn_hidden_size=512
    )
    model = build(config).eval()
    peer = yoco.YOCOForCausalLM(
        yoco.YOCOConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_self_decoder_layers=config.num_self_decoder_layers,
            intermediate_size=config.ffn_hidden_size,
            vocab_size=VOCAB,
            max_position_embeddings=SEQ,
            norm_eps=config.layernorm_epsilon,
            self_decoder_attn={
                "type": "gated_retention",
                "num_heads": config.self_decoder_heads,
                "rope_inv_freq": "yoco",
            },
            cross_decoder_attn={
                "num_heads": config.num_attention_heads,
                "num_kv_heads": config.num_query_groups,
                "rope_inv_freq": "yoco",
            },
        )
    ).cuda()
    missing, unexpected = peer.load_state_dict(fla_state(model, config), strict=False)
    assert not unexpected
    assert all("rotary" in name for name in missing), missing
    tokens, _ = batch()
    with torch.no_grad():
        ours, theirs = model(tokens), peer.eval()(input_ids=tokens).logits
    error = relative_error(ours, theirs)
    print(f"relative error of the logits against fla: {error:.1e}")
    assert error < LOGITS
