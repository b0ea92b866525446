"""The plan of a blend is what Megatron's builder builds; caches made beforehand are those that training looks for."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from support.cli import TINY, train
from support.datasets import write
from support.tools import ROOT, start

from yoco_megatron.config.yaml_files import load_config_files, to_argv
from yoco_megatron.data.dataset import CheckedGPTDataset
from yoco_megatron.data.plan import plan, table, train_samples
from yoco_megatron.data.provider import dataset_config
from yoco_megatron.startup import arguments
from yoco_megatron.startup.parser import build_parser

FLAGS = [flag for flag in TINY if flag != "--mock-data"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three datasets of very different size."""
    folder = tmp_path_factory.mktemp("sources")
    generator = np.random.default_rng(3)
    prefixes = []
    for name, documents in (("large", 900), ("middle", 200), ("small", 40)):
        builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=np.uint16)
        for length in generator.integers(1, 60, documents):
            builder.add_document(generator.integers(0, 250, length), [int(length)])
        builder.finalize(str(folder / f"{name}.idx"))
        prefixes.append(str(folder / name))
    return prefixes


def parsed(*flags: str):
    return arguments.parse_anywhere([*FLAGS, *flags])


@pytest.mark.parametrize("iterations", [3, 20, 60, 200])
def test_epochs_and_samples_are_those_that_megatron_builds(sources: list[str], iterations: int) -> None:
    large, middle, small = sources
    args = parsed("--data-path", "5", large, "3", middle, "2", small, "--train-iters", str(iterations))
    wanted = train_samples(args)
    assert wanted == 8 * iterations
    train_part = BlendedMegatronDatasetBuilder(
        CheckedGPTDataset, [wanted, 0, 0], lambda: True, dataset_config(args, build_tokenizer(args), {})
    ).build()[0]
    drawn = Counter(int(number) for number in train_part.dataset_index[:wanted])
    for number, source in enumerate(plan(args, wanted)):
        built = train_part.datasets[number]
        assert source.tokens == built._get_num_tokens_per_epoch()
        assert source.documents == len(built.indices)
        assert source.order[0] == built._get_num_epochs(source.tokens)
        assert source.order[0] * source.documents == len(built.document_index)
        # An epoch of its own is shuffled behind the others.
        before = built.shuffle_index[: ((source.order[0] - 1) * source.tokens - 1) // args.seq_length]
        apart = source.order[0] > 1 and before.max() < len(before)
        assert source.order[1] == apart
        assert abs(source.samples - drawn[number]) <= 1
        assert source.epochs == pytest.approx(source.samples * 32 / source.tokens)


def test_one_source_and_sources_without_weights(sources: list[str]) -> None:
    args = parsed("--data-path", sources[1])
    (source,) = plan(args, 500)
    assert (source.weight, source.samples) == (1.0, 500)
    args = parsed("--data-path", *sources)
    once = plan(args, 10**6)
    assert [source.order for source in once] == [(1, False)] * 3
    assert "read once: they end after" in table(once, args.seq_length, 10**6)
    assert plan(parsed("--data-path", sources[0], "--split", "1,0,0"), 10)[0].documents == 900
    with pytest.raises(ValueError, match=r"small: its training part holds \d+ tokens, less than one sample"):
        plan(parsed("--data-path", sources[2], "--split", "0,1,0", "--seq-length", "32"), 10)
    with pytest.raises(ValueError, match=r"--data-path is missing"):
        plan(arguments.parse_anywhere(list(TINY)), 10)


def test_blend_of_a_yaml_is_the_blend_of_the_flags(sources: list[str], tmp_path: Path) -> None:
    config = tmp_path / "blend.yaml"
    config.write_text(f"data-path:\n  {sources[0]}: 0.7\n  {sources[1]}: 1.0e-1\n  {sources[2]}: 2\n")
    argv = to_argv(load_config_files([str(config)]), build_parser())
    assert argv == ["--data-path", "0.7", sources[0], "0.1", sources[1], "2", sources[2]]
    flags = plan(parsed(*argv), 100)
    assert plan(parsed("--config", str(config)), 100) == flags
    for text, error in (
        ("lr: {a: 1}", r"config key 'lr': a mapping is for data-path"),
        ("data-path: {a: heavy}", r"config key 'data-path': the weight of a must be a positive number, not 'heavy'"),
        ("data-path: {a: 0}", r"the weight of a must be a positive number"),
    ):
        config.write_text(text)
        with pytest.raises(ValueError, match=error):
            to_argv(load_config_files([str(config)]), build_parser())


def run(tool: str, *flags: object) -> str:
    done = start(tool, *FLAGS, *flags)
    return done.stdout if done.returncode == 0 else f"{done.returncode} {done.stderr}"


@pytest.mark.parametrize("tool", ["plan_data", "prepare_cache"])
def test_help_comes_without_the_seconds_of_imports(tool: str) -> None:
    command = [sys.executable, "-X", "importtime", ROOT / "tools" / f"{tool}.py", "--help"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0 and "pretrain_yoco.py" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "encodings" in imported and not imported & {"torch", "megatron"}


def test_dry_run_of_a_large_mesh(sources: list[str]) -> None:
    """On one machine, with the flags of many; a budget instead of the run's length."""
    mesh = ["--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 4, "--data-path", *sources[:2]]
    flags = ["--data-path", 3, sources[0], 1, sources[1], *mesh[:4]]
    said = run("plan_data", *flags, "--token-budget", "0.32M")
    large, middle, everything = (line.split() for line in said.splitlines()[1:])
    assert large[:2] == [sources[0], "0.7500"]
    assert everything[4:6] == ["10,000", "320,000"]
    assert float(middle[6]) == pytest.approx(80_000 / int(middle[3].replace(",", "")), abs=0.01)
    assert json.loads(run("plan_data", *flags, "--token-budget", "0.32M", "--json"))[0]["samples"] == 7500
    assert "2 " in run("plan_data", *flags, "--token-budget", "many")


def test_training_finds_the_cache(sources: list[str], tmp_path: Path) -> None:
    flags = ["--data-path", "3", sources[0], "1", sources[1], "--data-cache-path", str(tmp_path)]
    said = run("prepare_cache", *flags)
    assert "train: 161 samples" in said or "train: 160 samples" in said, said
    built = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert len([path for path in built if path.name.endswith("shuffle_index.npy")]) >= 4
    train(1, *flags, "--train-iters", "20", "--exit-interval", "2", base=FLAGS)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == built
    assert "--data-cache-path is missing" in run("prepare_cache", *flags[:-2])


def test_packed_documents_beside_a_stream(sources: list[str], tmp_path: Path) -> None:
    """A blend: the source with a mask is packed, in whole epochs; both are counted as they are built."""
    large, *_ = sources
    lengths = [5, 30, 20, 20, 40] * 20  # 40 counts as 32: 20 + 5, 30, 20 and 32 make 80 samples
    answers = write(tmp_path / "answers", [range(n) for n in lengths], loss_masks=[np.ones(n) for n in lengths])
    flags = ("--data-path", "1", answers, "1", large, "--train-iters", "40", "--split", "1,0,0", "--eval-iters", "0")
    args = parsed(*flags)
    packed, stream = plan(args, train_samples(args))
    assert (packed.samples, packed.epochs, packed.order, stream.padding) == (160, 2.0, (1, False), 0.0)
    assert packed.padding == pytest.approx(1 - (5 + 30 + 20 + 20 + 32) / (4 * 32))
    built = BlendedMegatronDatasetBuilder(
        CheckedGPTDataset, [320, 0, 0], lambda: True, dataset_config(args, build_tokenizer(args), {})
    ).build()[0]
    of_packed, of_stream = built.datasets
    assert (of_packed.is_packed, of_stream.is_packed) == (True, False) and len(of_packed) == 240
    assert set(Counter(of_packed.document_index.tolist()).values()) == {3}
    assert of_packed.loss_masks is not None and of_stream.loss_masks is None
    said = table([packed, stream], 32, 320).splitlines()
    assert [line.split()[-1] for line in said] == ["padding", "16.41%", "0.00%", "8.20%"]
    assert table([packed], 32, 160).splitlines()[-1].split()[-2:] == ["2.00", "16.41%"]
    assert {source.padding for source in plan(parsed(*flags, "--sample-packing", "stream"), 320)} == {0.0}
