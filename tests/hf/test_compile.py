"""torch.compile of an exported model: the graph does not grow with the text, and is not made anew for each length."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILE = """
import sys
import torch
from yoco_megatron.hf.configuration_yoco import YocoConfig
from yoco_megatron.hf.modeling_yoco import YocoForCausalLM

sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = YocoForCausalLM(YocoConfig(vocab_size=64, self_decoder=sys.argv[1], sliding_window=16, **sizes)).eval()
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
"""


@pytest.mark.parametrize("self_decoder", ["gated_retention", "sliding_window"])
def test_one_graph_for_all_lengths(self_decoder):
    """In a process of its own: the CPU stand-in switches compilation off."""
    env = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    command = [sys.executable, "-c", COMPILE, self_decoder]
    run = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
