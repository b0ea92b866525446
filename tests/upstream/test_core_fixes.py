"""The repairs of upstream fit the upstream that is installed.

Each repair was written for certain functions of megatron-core; a digest of each is kept here. When one changes, its
test fails and says what to do: read the new code, keep, adapt or drop the repair, then put the new digest here.
Comments, docstrings and layout do not count.
"""

import ast
import hashlib
import importlib.metadata
import inspect
import io
import re
import tokenize
import tomllib
from pathlib import Path

import megatron.core
import pytest

from yoco_megatron.upstream import core_fixes as runtime_upstream
from yoco_megatron.upstream import training_loop as training_upstream

ROOT = Path(__file__).parents[2]
MEGATRON = Path(megatron.core.__file__).parents[1]

# our repair -> {(file inside megatron/, function): digest of what it was written for}
OPTIMIZER = "core/optimizer/distrib_optimizer.py"
REPAIRS = {
    "runtime.upstream._dataset_helpers_are_compiled": {
        ("core/datasets/utils.py", "compile_helpers"): "20d3f59483a0752b",
    },
    "runtime.upstream._torch_adam_resumes": {
        (OPTIMIZER, "DistributedOptimizer.sharded_state_dict"): "bb03031188cd8484",
        (OPTIMIZER, "DistributedOptimizer.state_dict"): "b689e6bd27484901",
        (OPTIMIZER, "DistributedOptimizer.load_state_dict"): "064a16b31c6dc1af",
        (OPTIMIZER, "DistributedOptimizer._set_main_param_and_optimizer_states"): "606d970ea2136729",
    },
    "runtime.upstream._norm_recompute_without_transformer_engine": {
        ("core/tensor_parallel/random.py", "CheckpointWithoutOutput.__init__"): "a92cf7833cbbdecb",
        ("core/tensor_parallel/random.py", "CheckpointWithoutOutputFunction.forward"): "25f06df387940dd3",
    },
    "runtime.upstream._optimizer_state_behind_padded_buckets": {
        (OPTIMIZER, "DistributedOptimizer.sharded_param_state_fully_reshardable"): "67a01a93840e6b16",
        (OPTIMIZER, "DistributedOptimizer.get_parameter_state_dp_zero"): "c87e8ab28bfd9cae",
    },
    "runtime.upstream._checkpoint_helper_follows_its_process": {
        ("core/dist_checkpointing/strategies/filesystem_async.py", "get_write_results_queue"): "d5428d9062471d52",
    },
}


def source_of(file: str, function: str) -> str:
    """The text of a function of the installed package, whatever was put in its place at run time."""
    text = (MEGATRON / file).read_text()
    nodes = ast.parse(text).body
    for name in function.split("."):
        node = next(n for n in nodes if getattr(n, "name", None) == name)
        nodes = node.body
    return ast.get_source_segment(text, node)


def code_of(text: str) -> str:
    """The tokens of a function without comments, layout and docstring."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = io.StringIO(inspect.cleandoc(text)).readline
    tokens = [t.string for t in tokenize.generate_tokens(lines) if t.type not in skipped]
    return " ".join(token for token in tokens if not token.startswith('"""'))


def digest(file: str, function: str) -> str:
    return hashlib.sha256(code_of(source_of(file, function)).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("repair", "place", "written_for"),
    [
        pytest.param(repair, place, known, id=place[1])
        for repair, places in REPAIRS.items()
        for place, known in places.items()
    ],
)
def test_upstream_is_what_the_repair_was_written_for(repair, place, written_for):
    try:
        found = digest(*place)
    except (OSError, StopIteration):
        found = "nothing: it is gone"
    assert found == written_for, (
        f"megatron/{place[0]}: {place[1]} has changed. Read it, decide whether yoco_megatron.{repair} is still right "
        f"and needed, run tests/test_resume.py and tests/parallel, then write its new digest {found!r} here"
    )


def test_every_repair_is_listed():
    repairs = {name for name, value in vars(runtime_upstream).items() if inspect.isfunction(value)} - {"repair"}
    assert {f"runtime.upstream.{name}" for name in repairs} == REPAIRS.keys()
    called = re.findall(r"^    (_\w+)\(\)$", inspect.getsource(runtime_upstream.repair), re.MULTILINE)
    assert set(called) == repairs


def test_version_is_the_one_that_was_read():
    assert importlib.metadata.version("megatron-core").startswith("0.19."), "read REPAIRS again for the new version"
    pinned = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert "megatron-core==0.19.*" in pinned


def test_digest_sees_code_and_nothing_else():
    plain = 'def f(x):\n    """Old."""\n    return x + 1\n'
    assert code_of(plain) == code_of('def f(x):\n    """New,\n    longer."""\n\n    # why\n    return x + 1\n')
    assert code_of(plain) != code_of(plain.replace("1", "2"))
    assert code_of(plain) != code_of(plain.replace("x):", "x, y=None):"))


# Each repair is in place, and what it repairs is still broken; once it is not, the repair can go.


def test_dataset_helpers(monkeypatch):
    from megatron.core.datasets import helpers_cpp, utils

    assert helpers_cpp.build_sample_idx_int32
    monkeypatch.setattr("subprocess.run", lambda *a, **k: pytest.fail("ran make"))
    utils.compile_helpers()
    assert not (MEGATRON / "core" / "datasets" / "Makefile").exists(), "the wheel can compile now: drop the repair"


def test_norm_recompute():
    from megatron.core.tensor_parallel import random

    if random.HAVE_TE:
        pytest.skip("with Transformer Engine nothing is repaired")
    repaired = random.CheckpointWithoutOutput(False)
    assert repaired.fp8 is False
    original = object.__new__(random.CheckpointWithoutOutput)
    random.CheckpointWithoutOutput.__init__.__wrapped__(original, False)
    assert original.fp8 is True, "upstream takes fp8=False for what it says now: drop the repair"


def test_distributed_optimizer():
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        pytest.skip("with Apex or Transformer Engine nothing is repaired")
    for name in ("sharded_state_dict", "load_state_dict", "_set_main_param_and_optimizer_states"):
        assert hasattr(getattr(distrib_optimizer.DistributedOptimizer, name), "__wrapped__"), name


# What upstream/training_loop.py puts in the place of Megatron's, Megatron must call by that name, with those arguments.
REPLACED = {
    "num_floating_point_operations": (training_upstream.num_floating_point_operations, 2),
    "report_theoretical_memory": (training_upstream.report_model, 1),
    "set_jit_fusion_options": (training_upstream.compile_nothing, 1),
}


@pytest.mark.parametrize("name", REPLACED)
def test_training_calls_what_is_replaced(name):
    text = (MEGATRON / "training" / "training.py").read_text()
    calls = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == name
    ]
    ours, known_calls = REPLACED[name]
    assert len(calls) == known_calls, f"training.py calls {name} at {[node.lineno for node in calls]}: read them"
    for call in calls:
        keywords = dict.fromkeys(keyword.arg for keyword in call.keywords)
        inspect.signature(ours).bind(*call.args, **keywords)  # a TypeError here: the call passes something new


def test_replacements_reach_the_training_loop(monkeypatch):
    from megatron.training import training

    for name in REPLACED:
        monkeypatch.setattr(training, name, None)  # put back afterwards
    training_upstream.count_yoco()
    training_upstream.compile_what_is_called()
    for name, (ours, _) in REPLACED.items():
        assert getattr(training, name) is ours


def test_megatrons_help_still_fails():
    """startup/arguments.py escapes a lone % in its help texts."""
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    with pytest.raises(ValueError, match="unsupported format character"):
        add_megatron_arguments(argparse.ArgumentParser()).format_help()


def test_repairs_change_nothing_where_transformer_engine_is():
    """They ask for the very flags by which upstream chooses its own way."""
    text = inspect.getsource(runtime_upstream)
    assert "if distrib_optimizer.HAVE_APEX_OR_TE:\n        return" in text
    assert "if random.HAVE_TE:\n        return" in text
