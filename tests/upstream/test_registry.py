"""Every entry of the registry fits what is installed of upstream, and is applied. CONTRIBUTING.md says what to do."""

import ast
import fnmatch
import hashlib
import importlib.metadata
import importlib.util
import inspect
import io
import textwrap
import tokenize
import tomllib
from argparse import Namespace
from pathlib import Path

import pytest
from support.upstream import restored

from yoco_megatron import runtime

# Importing them enters their entries.
from yoco_megatron.upstream import (  # noqa: F401
    background_writer,
    between_steps,
    compiled_extension,
    core_fixes,
    expert_optimizers,
    index_caches,
    matrix_optimizers,
    new_layers,
    optimizer_state,
    registry,
    relied_on,
    resilience_hooks,
    safe_loading,
    validation,
)

ROOT = Path(__file__).parents[2]
REPLACED, RELIED_ON = registry.replacements, registry.dependencies
ANY_RUN = Namespace(
    run_folder="run",
    save=None,
    guard_sigmas=6.0,
    validates_whole=True,
    validation_sets=[],
    evaluate_suite="suite.yaml",
)


def name_of(entry: registry.Replacement | registry.Dependency) -> str:
    return f"{entry.module.rpartition('.')[2]}.{entry.name}"


def code_of(text: str) -> str:
    """The tokens of a function without comments, layout and docstring."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(textwrap.dedent(text)).readline)
    texts = [token.string for token in tokens if token.type not in skipped]
    return " ".join(text for text in texts if not text.startswith('"""'))


def digest_of(entry: registry.Replacement | registry.Dependency) -> str:
    """Of the code that upstream has, whatever stands in its place now."""
    try:
        owner, attribute = registry.find_owner(entry.module, entry.name)
        value = getattr(owner, attribute)
    except (ImportError, AttributeError):
        return "nothing: it is gone"
    while hasattr(value, "original"):
        value = value.original
    return hashlib.sha256(code_of(inspect.getsource(value)).encode()).hexdigest()[:16]


@pytest.mark.parametrize("entry", [entry for entry in [*REPLACED, *RELIED_ON] if entry.digest is not None], ids=name_of)
def test_upstream_is_what_was_read(entry: registry.Replacement | registry.Dependency) -> None:
    ours = entry.used_by if isinstance(entry, registry.Dependency) else inspect.getfile(entry.ours)
    found = digest_of(entry)
    assert found == entry.digest, (
        f"{entry.module}: {entry.name} has changed. Read it. Decide whether {ours} is still right and "
        f"needed ({entry.why}), run its tests, then write the new digest {found!r} into its entry"
    )


def is_here(entry: registry.Replacement | registry.Dependency) -> bool:
    return not entry.module.startswith("transformer_engine") or runtime.has_transformer_engine()


@pytest.mark.parametrize("entry", [*REPLACED, *RELIED_ON], ids=name_of)
def test_every_entry_says_why_and_names_what_there_is(entry: registry.Replacement | registry.Dependency) -> None:
    assert len(entry.why) > 20
    if isinstance(entry, registry.Dependency):
        assert (ROOT / "yoco_megatron" / entry.used_by).exists(), f"{entry.used_by} has moved"
    if is_here(entry):
        assert hasattr(*registry.find_owner(entry.module, entry.name))


@pytest.mark.parametrize("entry", [entry for entry in REPLACED if entry.calls is not None], ids=name_of)
def test_upstream_calls_what_is_replaced_by_that_name(entry: registry.Replacement) -> None:
    """As often as when it was read, with arguments that ours takes."""
    text = Path(importlib.util.find_spec(entry.module).origin).read_text()
    calls = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == entry.name
    ]
    assert len(calls) == entry.calls, f"{entry.module} calls {entry.name} at {[one.lineno for one in calls]}: read them"
    for call in calls:
        keywords = dict.fromkeys(keyword.arg for keyword in call.keywords)
        inspect.signature(entry.ours).bind(*call.args, **keywords)  # a TypeError here: the call passes something new


def test_a_run_gets_every_entry_of_runs_and_a_process_the_others() -> None:
    with restored():
        registry.install(False, ANY_RUN)
        for entry in filter(is_here, REPLACED):
            if entry.in_every_process and not entry.when(Namespace()):
                continue
            assert entry.is_installed, name_of(entry)
            place = getattr(*registry.find_owner(entry.module, entry.name))
            outermost = [one for one in REPLACED if (one.module, one.name) == (entry.module, entry.name)][-1]
            assert place is outermost.ours, name_of(entry)


def test_of_two_entries_for_one_name_the_later_one_is_outside() -> None:
    both = [entry for entry in REPLACED if entry.name == "get_forward_backward_func"]
    assert [entry.ours.__module__.rpartition(".")[2] for entry in both] == ["training_loop", "resilience_hooks"]
    with restored():
        registry.install(False, ANY_RUN)
        inner, outer = (entry.ours for entry in both)
        assert outer.original is inner and inner.original.__module__ == "megatron.core.pipeline_parallel.schedules"
        registry.install(False, ANY_RUN)
        assert inner.original is not outer, "wrapped once, however often it is installed"


def test_conditions_and_only() -> None:
    def installed(run_folder: str | None, only: set[str] | None) -> set[str]:
        with restored():
            args = Namespace(
                run_folder=run_folder,
                save=run_folder,
                guard_sigmas=None,
                validates_whole=False,
                validation_sets=[],
                evaluate_suite=None,
            )
            registry.install(False, args, only)
            return {name_of(entry) for entry in REPLACED if entry.is_installed and not entry.in_every_process}

    every = {name_of(entry) for entry in REPLACED if not entry.in_every_process}
    by_flag = (".get_grad_norm", ".evaluate_and_print_results", ".post_training_step_callbacks")
    assert installed("run", None) == {name for name in every if not name.endswith(by_flag)}
    assert installed(None, None).isdisjoint({"training.train_step", "training.save_checkpoint_and_time"})
    assert installed("run", {"train_step"}) == {"training.train_step"}
    with pytest.raises(AssertionError, match="no such entries"):
        installed("run", {"trian_step"})


def test_version_is_the_one_that_was_read() -> None:
    pinned = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (version,) = (one.removeprefix("megatron-core==") for one in pinned if one.startswith("megatron-core"))
    assert fnmatch.fnmatch(importlib.metadata.version("megatron-core"), version), "see CONTRIBUTING.md"


def test_digest_sees_code_and_nothing_else() -> None:
    plain = 'def f(x):\n    """Old."""\n    return x + 1\n'
    assert code_of(plain) == code_of('def f(x):\n    """New,\n    longer."""\n\n    # why\n    return x + 1\n')
    assert code_of(plain) != code_of(plain.replace("1", "2"))
    assert code_of(plain) != code_of(plain.replace("x):", "x, y=None):"))


FOREIGN = ("megatron", "torch", "transformer_engine", "transformers")


def foreign_names(tree: ast.AST) -> set[str]:
    """What a file has imported of theirs."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(a.asname or a.name).split(".")[0] for a in node.names if a.name.split(".")[0] in FOREIGN}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FOREIGN:
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def patched_places(text: str) -> list[str]:
    """Assignments to attributes of imported foreign modules and classes, as `line: code`."""
    tree = ast.parse(text)
    foreign, found = foreign_names(tree), []
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = [one for one in node.targets if isinstance(one, ast.Attribute)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "mock.patch.object") and node.args:
            targets = [ast.Attribute(node.args[0], "attribute")]
        for target in targets:
            root = target.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in foreign:
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_nothing_foreign_is_changed_elsewhere() -> None:
    package = ROOT / "yoco_megatron"
    # A dry run replaces what would need a GPU or peers, in a process of its own that never trains.
    dry_run = {package / "dry_run" / name for name in ("fake_rank.py", "gpu.py", "live_bytes.py")}
    allowed = {package / "runtime" / "cpu.py", *dry_run, *(package / "upstream").glob("*.py")}
    for file in [*package.rglob("*.py"), ROOT / "pretrain_yoco.py", *(ROOT / "tools").glob("*.py")]:
        if file not in allowed:
            assert not patched_places(file.read_text()), f"{file}: enter it in upstream/ instead (`replaces`)"


@pytest.mark.parametrize(
    "code", ["training.x = 1", "training.a.b = 1", "setattr(training, 'x', 1)", "mock.patch.object(training, 'x', 1)"]
)
def test_a_change_elsewhere_is_seen(code: str) -> None:
    assert patched_places(f"from megatron.training import training\n{code}")
    assert not patched_places(f"from ours import training\n{code}")
