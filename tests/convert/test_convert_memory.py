"""Conversion holds the largest few tensors and one output shard, never the model."""

import subprocess
import sys

import pytest

# Anonymous memory alone: pages of mapped files belong to the cache, and go when they are needed.
MEASURE = """
import shutil, sys, threading, time, torch
from pathlib import Path
from yoco_megatron import runtime
from yoco_megatron.startup.prepare import prepare
prepare()
from yoco_megatron.convert import convert, readers, tensor_names, writers
from yoco_megatron.hf.configuration_yoco import YocoConfig

folder, to = Path(sys.argv[1]), sys.argv[2]
MB = 2**20
config = YocoConfig(vocab_size=8192, hidden_size=1024, intermediate_size=2048, num_hidden_layers=16,
                    num_attention_heads=8, self_decoder_heads=4, max_position_embeddings=64)
dtypes = dict.fromkeys(tensor_names.shapes(config), torch.float32)
tensor = lambda name: torch.full(tensor_names.shapes(config)[name], 0.01)
made = readers.Source("hf", folder, config, dtypes, tensor)
(folder / "first").mkdir()
if to == "from hf":
    writers.write_hf(made, folder / "first", 32 * MB)
    made = readers.open_source("hf", str(folder / "first"))
else:
    writers.write_megatron(made, folder / "first")
    made = readers.open_source("megatron", str(folder / "first"))

def anonymous():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0]) * 1024

output = folder / "output"
output.mkdir()
before, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)
watcher = threading.Thread(target=watch)
watcher.start()
if to == "from hf":
    writers.write_megatron(made, output)
else:
    writers.write_hf(made, output, 32 * MB)
done.set()
watcher.join()
print(made.bytes, peak[0] - before)
"""


@pytest.mark.parametrize("to", ["from hf", "from megatron"])
def test_peak(to, tmp_path):
    """A model of 680 MB whose largest tensor has 32 MB, in shards of 32 MB."""
    command = [sys.executable, "-c", MEASURE, str(tmp_path), to]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    size, peak = map(int, done.stdout.split()[-2:])
    print(f"{to}: model {size / 2**20:.0f} MiB, peak {peak / 2**20:.0f} MiB")
    # A shard, the largest tensor on its way in and out; allocators keep some.
    assert peak < 6 * 32 * 2**20 < size / 2
