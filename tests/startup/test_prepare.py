"""`prepare` must run before Megatron is imported, in every process."""

import subprocess
import sys


def test_it_is_imported_without_megatron():
    code = "import sys, yoco_megatron.startup.prepare; print(*(name.partition('.')[0] for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "torch" in loaded and not {"megatron", "transformer_engine"} & loaded
