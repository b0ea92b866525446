"""A saved folder loads through Auto classes as remote code, without this package, and computes the same.

Reload and original are compared by logits, because buffers that are not saved are lost silently otherwise.
"""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.exported import small_config
from support.models import SELF_DECODERS, relative_error
from transformers import AutoModel, AutoModelForCausalLM

import yoco_megatron.hf
from yoco_megatron.hf.modeling_yoco import YocoForCausalLM

TOKENS = torch.randint(1, 97, (2, 21), generator=torch.Generator().manual_seed(1))
# A stranger's interpreter: neither this package nor Megatron can be imported.
STRANGER = """
import os, sys, torch
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("yoco_megatron", "megatron"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
class OtherConfig(PreTrainedConfig):
    model_type = "yoco"
class OtherModel(PreTrainedModel):
    config_class = OtherConfig
# As flash-linear-attention does, which Megatron imports: what is registered comes before the code of a folder.
AutoConfig.register("yoco", OtherConfig)
AutoModelForCausalLM.register(OtherConfig, OtherModel)
options = {"tp_plan": "auto"} if len(sys.argv) > 3 else {}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, **options).eval()
tokens = torch.load(sys.argv[2] + "/tokens.pt")
logits = model(tokens).logits.detach()
generated = model.generate(tokens, max_new_tokens=8, do_sample=False)
if options:
    weight = model.model.cross_layers[0].mixer.q_proj.weight
    assert getattr(weight, "to_local", lambda: weight)().shape[0] == 16, weight.shape
if os.environ.get("RANK", "0") == "0":
    torch.save((logits, generated), sys.argv[2] + f"/result.{len(sys.argv)}.pt")
if options:  # functional collectives keep the group's threads beyond destroy_process_group: torch may abort at exit
    torch.distributed.barrier()
    os._exit(0)
"""


@pytest.fixture(scope="module", params=SELF_DECODERS)
def saved(request, tmp_path_factory) -> tuple[YocoForCausalLM, Path]:
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(2)
    config = small_config(
        request.param,
        sliding_window=6,
        shared_kv_sets={"sliding_window": 2}.get(request.param, 1),
        qk_norm=request.param == "sliding_window",
        qkv_bias=request.param == "sliding_window",
        pad_token_id=0,
        auto_map={
            "AutoConfig": "configuration_yoco.YocoConfig",
            "AutoModel": "modeling_yoco.YocoModel",
            "AutoModelForCausalLM": "modeling_yoco.YocoForCausalLM",
        },
    )
    model = YocoForCausalLM(config).eval()
    model.save_pretrained(folder, max_shard_size="40KB")
    for file in Path(yoco_megatron.hf.__file__).parent.glob("*_yoco.py"):
        shutil.copy(file, folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return model, folder


def run_stranger(folder: Path, aside: Path, *more: str, launcher: tuple[str, ...] = ()) -> None:
    torch.save(TOKENS, aside / "tokens.pt")
    (aside / "stranger.py").write_text(STRANGER)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(aside / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *launcher, str(aside / "stranger.py"), str(folder), str(aside), *more]
    done = subprocess.run(command, env=environment, cwd=aside, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


@torch.no_grad()
def test_without_this_package(saved, tmp_path):
    """Alone, then with tp_plan="auto" over two processes: same logits (1e-5, partial sums in another order)."""
    model, folder = saved
    run_stranger(folder, tmp_path)
    logits, generated = torch.load(tmp_path / "result.3.pt")
    assert torch.equal(logits, model(TOKENS).logits)
    assert torch.equal(generated, model.generate(TOKENS, max_new_tokens=8, do_sample=False))

    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run_stranger(folder, tmp_path, "tp", launcher=launcher)
    logits, generated = torch.load(tmp_path / "result.4.pt")
    assert relative_error(logits, model(TOKENS).logits) < 1e-5
    assert torch.equal(generated, model.generate(TOKENS, max_new_tokens=8, do_sample=False))


@torch.no_grad()
def test_auto_classes(saved):
    model, folder = saved
    body = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    assert torch.equal(body(TOKENS).last_hidden_state, model.model(TOKENS).last_hidden_state)
    half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16).eval()
    assert torch.equal(half.model.self_rotary.inv_freq, model.model.self_rotary.inv_freq)
    assert relative_error(half(TOKENS).logits, model(TOKENS).logits) < 3e-2  # roundings of 2^-9


CASTS = {
    "to": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "type": lambda model: model.type(torch.bfloat16),
    "empty": lambda model: model.load_state_dict(model.to_empty(device="cpu").state_dict()),
    "there and back": lambda model: model.bfloat16().float(),
    "buffers alone": lambda model: [
        setattr(buffer, "data", buffer.to(torch.bfloat16)) for buffer in model.buffers() if buffer.is_floating_point()
    ],
}


@torch.no_grad()
@pytest.mark.parametrize("cast", CASTS)
def test_frequencies_survive_casts(saved, cast, tmp_path):
    """Whatever casts a model: modules, FSDP its buffers; then saved and loaded again."""
    model = copy.deepcopy(saved[0])
    CASTS[cast](model)
    position = torch.tensor([[4096]])
    model.save_pretrained(tmp_path)
    for one in (model, YocoForCausalLM.from_pretrained(tmp_path)):
        for part in ("self_rotary", "cross_rotary"):
            for found, wanted in zip(getattr(one.model, part)(position), getattr(saved[0].model, part)(position)):
                assert found.dtype == torch.float32 and torch.equal(found, wanted)
    assert not [name for name in model.state_dict() if "inv_freq" in name]
