"""torch.compile of an exported model: one graph for all lengths, and generate() by compiled steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILE = """
import sys
import torch
from transformers import CompileConfig
from yoco_megatron.hf.configuration_yoco import YocoConfig
from yoco_megatron.hf.modeling_yoco import YocoForCausalLM

sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
mixer = {"self_decoder": sys.argv[1], "sliding_window": 16}
model = YocoForCausalLM(YocoConfig(vocab_size=64, initializer_range=0.2, **mixer, **sizes)).eval()
graphs = []

def keep(graph, inputs):
    graphs.append(len(graph.graph.nodes))
    return graph.forward

compiled = torch.compile(model, fullgraph=True, backend=keep)
with torch.no_grad():
    for length in (200, 330, 700, 1000):
        ids = torch.randint(64, (2, length))
        logits, expected = (one(input_ids=ids, use_cache=False).logits for one in (compiled, model))
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)  # fp32, in the same order
assert len(graphs) == 2, f"one of the first length, one of any other: {graphs}"
assert graphs[1] < 1.1 * graphs[0], graphs

# generate() compiles steps with a static cache on a GPU, and pieces of the prompt; here it is made to on a CPU.
torch._dynamo.reset()
torch._dynamo.utils.counters.clear()
by_steps = CompileConfig(fullgraph=True, mode=None, backend="eager")
by_steps._compile_all_devices = True
prompts, mask = torch.randint(1, 64, (2, 37)), torch.ones(2, 37, dtype=torch.long)
mask[0, :5] = 0
how = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
static = {"cache_implementation": "static", "compile_config": by_steps, "prefill_chunk_size": 11}
assert torch.equal(model.generate(prompts, **how, **static), model.generate(prompts, **how))
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1, "nothing was compiled"
"""


@pytest.mark.parametrize("self_decoder", ["gated_retention", "sliding_window"])
def test_one_graph_for_all_lengths_and_generated_as_uncompiled(self_decoder):
    """In a process of its own: the CPU stand-in switches compilation off."""
    env = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    command = [sys.executable, "-c", COMPILE, self_decoder]
    run = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
