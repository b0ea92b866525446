"""flash-linear-attention's own YOCOForCausalLM loads our export and computes our logits; and its folders load here.

float32 on the GPU; fla's Triton kernels multiply in TF32 (10 bits) by default, hence 5e-3.
"""

import pytest
import torch
from support.models import relative_error

from yoco_megatron.convert.readers import Source, open_source
from yoco_megatron.convert.writers import write_fla, write_hf
from yoco_megatron.hf.configuration_yoco import YocoConfig
from yoco_megatron.hf.modeling_yoco import YocoForCausalLM

pytestmark = pytest.mark.gpu
LOGITS = 5e-3


def small(**more) -> YocoConfig:
    return YocoConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        self_decoder_heads=2,
        max_position_embeddings=256,
        initializer_range=0.06,
        **more,
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gated_retention", "gated_delta_net", "sliding_window"])
@pytest.mark.parametrize("tied", [False, True])
def test_fla_loads_our_export(tied, kind, tmp_path):
    yoco = pytest.importorskip("fla.models.yoco")
    torch.manual_seed(0)
    windows: dict[str, object] = {}
    if kind == "sliding_window":
        pytest.importorskip("flash_attn", reason="fla's windows need it")
        windows = {"rope_variant": "standard", "sliding_window": 9}
    config = small(self_decoder=kind, **windows, tie_word_embeddings=tied, rope_theta=640000.0)
    ours = YocoForCausalLM(config).cuda().eval()
    state = {name: tensor.cpu() for name, tensor in ours.state_dict().items()}
    source = Source("hf", tmp_path, config, dict.fromkeys(state, torch.float32), state.__getitem__)
    write_fla(source, tmp_path, 10**8)
    theirs, report = yoco.YOCOForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"] and set(report["missing_keys"]) <= {"lm_head.weight"}
    tokens = torch.randint(0, 512, (2, 100), generator=torch.Generator().manual_seed(1)).cuda()
    error = relative_error(theirs.cuda().eval()(input_ids=tokens).logits, ours(tokens).logits)
    print(f"relative error of fla's logits from our export: {error:.1e}")
    assert error < LOGITS


@torch.no_grad()
def test_we_load_what_fla_saves(tmp_path):
    yoco = pytest.importorskip("fla.models.yoco")
    torch.manual_seed(0)
    attention = {"rope_inv_freq": "yoco", "num_heads": 4}
    theirs = yoco.YOCOForCausalLM(
        yoco.YOCOConfig(
            vocab_size=512,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=5,
            num_self_decoder_layers=2,
            self_decoder_attn={"type": "gated_retention", **attention},
            cross_decoder_attn={"num_kv_heads": 2, **attention},
        )
    ).cuda()
    theirs.save_pretrained(tmp_path / "fla")
    (tmp_path / "hf").mkdir()
    write_hf(open_source("fla", str(tmp_path / "fla")), tmp_path / "hf", 10**8)
    ours = YocoForCausalLM.from_pretrained(tmp_path / "hf").cuda().eval()
    tokens = torch.randint(0, 512, (2, 100), generator=torch.Generator().manual_seed(1)).cuda()
    error = relative_error(ours(tokens).logits, theirs.eval()(input_ids=tokens).logits)
    print(f"relative error of our logits from fla's model: {error:.1e}")
    assert error < LOGITS
