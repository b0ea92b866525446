"""The CPU runtime: every stand-in stands for something real, behaves as upstream expects, and none is missing.

The guard at the end trains, evaluates, saves and loads while every function of torch.cuda WITHOUT a stand-in raises: a
new megatron-core or torch that reaches for one more of them fails there, with the name and the place.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import cli

from yoco_megatron import runtime
from yoco_megatron.runtime import cpu
from yoco_megatron.startup.prepare import prepare
from yoco_megatron.utils.ports import free_port

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(runtime.has_gpu(), reason="there is a GPU: the stand-ins are not installed")

NAMES = """
import json, torch
names = lambda place: sorted(vars(place))
print(json.dumps({
    "torch": names(torch), "torch.cuda": names(torch.cuda), "torch.cuda.random": names(torch.cuda.random),
    "torch.cuda.nvtx": names(torch.cuda.nvtx), "torch.accelerator": names(torch.accelerator),
    "Stream": dir(torch.cuda.Stream), "Event": dir(torch.cuda.Event), "Tensor": dir(torch.Tensor),
    "default_generators": type(torch.cuda.default_generators).__name__,
}))
"""


@pytest.fixture(scope="module")
def real() -> dict[str, list[str]]:
    """The names that torch has before anything is replaced, from a process of its own."""
    out = subprocess.run([sys.executable, "-c", NAMES], capture_output=True, text=True, check=True)
    return json.loads(out.stdout)


def test_every_stand_in_names_something_of_torch(real):
    """A name that torch has renamed or dropped would stand for nothing."""
    assert cpu.STAND_INS.keys() <= set(real["torch.cuda"])
    assert set(cpu.FACTORIES) <= set(real["torch"])
    assert {"get_rng_state", "set_rng_state", "manual_seed", "_lazy_init", "_lazy_call"} <= set(
        real["torch.cuda.random"]
    )
    assert {"range_push", "range_pop"} <= set(real["torch.cuda.nvtx"])
    assert "is_available" in real["torch.accelerator"]
    assert real["default_generators"] == "tuple"


@pytest.mark.parametrize("stand_in", [cpu.Stream, cpu.Event], ids=["Stream", "Event"])
def test_methods_of_streams_and_events_are_torchs(stand_in, real):
    methods = {name for name in vars(stand_in) if not name.startswith("__")} - {"time"}
    assert methods <= set(real[stand_in.__name__])


def test_every_stand_in_is_installed_and_says_whom_it_serves():
    for name, (replacement, place) in cpu.STAND_INS.items():
        assert getattr(torch.cuda, name) is replacement, name
        assert place, name


def test_no_function_stands_in_twice():
    """torch._dynamo refuses one object under two names."""
    replacements = [id(replacement) for replacement, _ in cpu.STAND_INS.values()]
    assert len(set(replacements)) == len(replacements)


def test_every_stand_in_answers():
    """Called as torch.cuda's functions are called, with and without a device."""
    seed, before = torch.initial_seed(), torch.get_rng_state()
    arguments = {
        "stream": (cpu.Stream(),),
        "set_stream": (cpu.Stream(),),
        "set_device": (0,),
        "set_rng_state": (before,),
        "manual_seed": (seed,),
        "manual_seed_all": (seed,),
        "_lazy_call": (lambda: None,),
    }
    for name, (replacement, _) in cpu.STAND_INS.items():
        if callable(replacement):
            replacement(*arguments.get(name, ()))
    torch.set_rng_state(before)
    assert torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    assert torch.cuda.current_device() == torch.device("cpu")
    assert torch.cuda.get_device_properties(0).total_memory > 2**20
    assert 0 < torch.cuda.memory_allocated() < torch.cuda.mem_get_info()[1]
    assert torch.cuda.memory_stats()["reserved_bytes.all.current"] > 0


def test_one_device_per_local_process(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert torch.cuda.device_count() == 4
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert torch.cuda.device_count() == 1


def test_an_event_keeps_time():
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    time.sleep(0.05)
    end.record(torch.cuda.current_stream())
    assert 45 < start.elapsed_time(end) < 5000  # milliseconds
    assert end.query()
    end.synchronize()
    end.wait()


def test_a_stream_is_always_done():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), stream:
        event = stream.record_event()
    stream.wait_event(event)
    stream.wait_stream(torch.cuda.current_stream())
    stream.synchronize()
    assert stream.query() and isinstance(event, cpu.Event) and event.time > 0


def test_random_state_is_the_cpus():
    torch.cuda.manual_seed(7)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    assert torch.cuda.default_generators[torch.cuda.current_device()] is torch.default_generator
    assert len(torch.cuda.default_generators) == 1


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:3", 0, 2, torch.device("cuda"), torch.device("cuda", 1)])
def test_every_cuda_device_is_the_cpu(device):
    assert cpu._to_cpu(device) == torch.device("cpu")
    assert torch.zeros(2, device=device).device.type == "cpu"
    assert torch.ones(2).to(device).device.type == "cpu"
    assert torch.ones(2).to(device=device, dtype=torch.int8).dtype == torch.int8


@pytest.mark.parametrize("value", ["cpu", "meta", torch.device("meta"), None, True, torch.float16])
def test_anything_else_stays(value):
    assert cpu._to_cpu(value) is value


def test_other_uses_of_to_stay():
    x = torch.arange(3)
    assert x.to("meta").device.type == "meta"
    assert x.to(torch.float16).dtype == torch.float16
    assert x.to(torch.ones(1, dtype=torch.int8)).dtype == torch.int8
    assert x.to("cuda", torch.float64, non_blocking=True).dtype == torch.float64
    assert torch.zeros(2, device="meta").device.type == "meta"


FACTORY_ARGUMENTS = {
    "arange": (3,),
    "as_tensor": ([1.0],),
    "empty_like": (torch.ones(2),),
    "full": ((2,), 1.0),
    "full_like": (torch.ones(2), 2.0),
    "linspace": (0, 1, 3),
    "ones_like": (torch.ones(2),),
    "randint": (0, 9, (2,)),
    "randperm": (3,),
    "tensor": ([1, 2],),
    "zeros_like": (torch.ones(2),),
}


@pytest.mark.parametrize("name", cpu.FACTORIES)
def test_factories_take_cuda(name):
    arguments = FACTORY_ARGUMENTS.get(name, (2,))
    for device in ("cuda", None):
        assert getattr(torch, name)(*arguments, device=device).device.type == "cpu"


def test_pinning_is_for_copies_to_a_gpu():
    assert torch.tensor([1, 2], pin_memory=True).tolist() == [1, 2]


def test_modules_and_tensors_stay_where_they_are():
    module, x = torch.nn.Linear(2, 2), torch.ones(2)
    assert module.cuda() is module and x.cuda() is x and x.cuda(0, non_blocking=True) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_type_names_are_those_of_a_gpu(dtype):
    """core/optimizer takes 'torch.cuda.FloatTensor' and its like for what it can train."""
    x = torch.ones(2, dtype=dtype)
    name = {torch.float32: "Float", torch.bfloat16: "BFloat16", torch.float16: "Half"}[dtype]
    assert x.type() == f"torch.cuda.{name}Tensor"
    assert torch.ones(2, dtype=torch.float64).type(f"torch.cuda.{name}Tensor").dtype == dtype
    assert x.type(torch.int8).dtype == torch.int8


def test_the_data_loader_will_not_pin():
    assert not torch.accelerator.is_available()


def test_prepare_is_idempotent():
    before = torch.Tensor.type, torch.zeros, torch.cuda.current_device
    prepare()
    assert before == (torch.Tensor.type, torch.zeros, torch.cuda.current_device)
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"


# The guard.

FLAGS = """--train-iters 6 --save-interval 3 --eval-interval 2 --bf16 --use-distributed-optimizer --overlap-grad-reduce
--overlap-param-gather --log-params-norm"""


def guarded_run(*flags: str) -> tuple[subprocess.CompletedProcess, list]:
    """(the finished process, the calls that it should not have made)."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(ROOT / "tests" / "support" / "guarded_run.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    return done, json.loads(done.stdout.strip().splitlines()[-1])


def test_training_needs_no_other_function_of_torch_cuda(tmp_path):
    flags = [*cli.TINY, *FLAGS.split(), "--save", str(tmp_path), "--load", str(tmp_path)]
    for wanted, extra in (("successfully saved", ["--exit-interval", "3"]), ("successfully loaded", [])):
        done, violations = guarded_run(*flags, *extra)
        assert not violations, (
            f"add to STAND_INS of yoco_megatron/runtime/cpu.py, or with a reason to ALLOWED of "
            f"tests/support/guarded_run.py: {violations}"
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert wanted in done.stdout
    assert " 6/6  lm loss " in done.stdout


def test_the_guard_sees_a_stand_in_that_is_missing():
    done, violations = guarded_run("--without", "synchronize", *cli.TINY, *FLAGS.split())
    assert done.returncode != 0
    assert violations[0][0] == "synchronize" and "megatron" in violations[0][1]


def test_meta_device_still_works():
    """transformers builds models without memory; its own initialisation is skipped where memory is there already."""
    with torch.device("meta"):
        assert all(
            t.is_meta for t in (torch.empty(2), torch.linspace(0, 1, 3), torch.arange(3), torch.nn.Linear(2, 2).weight)
        )
    assert not torch.empty(2).is_meta
