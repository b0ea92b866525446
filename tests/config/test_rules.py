"""Every rule of sizes and meshes: a mistake raises one ValueError, of one line, that names the flag to change.

Each case changes one thing in a command line that is accepted as it stands, so that the rule alone can be the reason.
"""

import pytest
import torch
from support.datasets import write
from support.models import STORED_ATTENTION, tiny_config

from yoco_megatron.startup import arguments

GOOD = {
    "num-layers": 4,
    "hidden-size": 64,
    "ffn-hidden-size": 96,
    "num-attention-heads": 8,
    "group-query-attention": True,
    "num-query-groups": 4,
    "self-decoder": "sliding_window",
    "self-decoder-heads": 4,
    "self-decoder-query-groups": 4,
    "self-decoder-window": 16,
    "seq-length": 64,
    "micro-batch-size": 2,
    "global-batch-size": 16,
    "tensor-model-parallel-size": 2,
    "sequence-parallel": True,
    "mock-data": True,
}
WORLD = 4
RETENTION = {"self-decoder": "gated_retention", "self-decoder-query-groups": None, "self-decoder-window": None}
BASELINE = {"architecture": "transformer", "self-decoder": None, "self-decoder-heads": None}
BASELINE |= {"self-decoder-query-groups": None, "self-decoder-window": None}

# what is wrong -> (the change, what the message must name)
MISTAKES = {
    "mesh that does not divide the processes": (
        {"tensor-model-parallel-size": 3},
        ["tensor-model-parallel-size 3", "4"],
    ),
    "mesh larger than the world": (
        {"tensor-model-parallel-size": 8},
        ["tensor-model-parallel-size 8", "multiple of 8"],
    ),
    "mesh of nothing": ({"tensor-model-parallel-size": 0}, ["tensor-model-parallel-size 0"]),
    "sequence against context parallelism": (
        {"context-parallel-size": 2, "seq-length": 66},
        ["seq-length 66", "2 x --context-parallel-size 2 = 4"],
    ),
    "context parallel baseline in torch": (
        BASELINE | {"context-parallel-size": 2},
        ["context-parallel-size 2", "architecture transformer", "transformer-impl transformer_engine"],
    ),
    "document masks of the baseline": (
        BASELINE | {"dataloader-inter-document-masking": True},
        ["dataloader-inter-document-masking", "architecture transformer"],
    ),
    "global batch": ({"global-batch-size": 15}, ["global-batch-size 15", "micro-batch-size 2 x 2 data-parallel"]),
    "no layers": ({"num-layers": 0}, ["num-layers 0"]),
    "odd layers": ({"num-layers": 5}, ["num-layers 5", "num-self-decoder-layers"]),
    "no cross-decoder": ({"num-self-decoder-layers": 4}, ["num-self-decoder-layers 4", "architecture transformer"]),
    "negative self-decoder": ({"num-self-decoder-layers": -1}, ["num-self-decoder-layers -1"]),
    "no heads": ({"num-attention-heads": 0}, ["num-attention-heads 0"]),
    "heads that do not divide": ({"num-attention-heads": 12}, ["num-attention-heads 12", "hidden-size 64"]),
    "heads that do not divide, self": ({"self-decoder-heads": 12}, ["self-decoder-heads 12", "hidden-size 64"]),
    "heads of odd width": ({"kv-channels": 7}, ["num-attention-heads", "7", "RoPE"]),
    "heads of odd width, self": ({"self-decoder-heads": 64}, ["self-decoder-heads", "RoPE"]),
    "groups": ({"num-query-groups": 3}, ["num-query-groups 3", "num-attention-heads 8"]),
    "no groups": ({"num-query-groups": 0}, ["num-query-groups 0"]),
    "groups without their switch": ({"group-query-attention": None}, ["num-query-groups 4", "group-query-attention"]),
    "groups, self": ({"self-decoder-query-groups": 3}, ["self-decoder-query-groups 3", "self-decoder-heads 4"]),
    "K,V for unequal groups of layers": (
        {"num-layers": 6, "shared-kv-sets": 2},
        ["cross-decoder layers 3", "shared-kv-sets 2"],
    ),
    "a source of K,V in the cross-decoder": (
        {"shared-kv-sources": "1 3"},
        ["shared-kv-sources 1 3", "num-self-decoder-layers 2"],
    ),
    "sources of K,V in another order": ({"shared-kv-sources": "2 1"}, ["shared-kv-sources 2 1", "ascending"]),
    "sources of unequal sets of K,V": (
        {"shared-kv-sources": "1 2", "shared-kv-sets": 1},
        ["shared-kv-sets 1", "shared-kv-sources 2"],
    ),
    "a pattern of units for other layers": (
        {"cross-decoder-pattern": "AGA"},
        ["cross-decoder-pattern AGA", "cross-decoder 2 layers"],
    ),
    "an unknown layer of the cross-decoder": ({"cross-decoder-pattern": "AM"}, ["cross-decoder-pattern AM", "letters"]),
    "K,V that nothing reads": ({**RETENTION, "cross-decoder-pattern": "GG"}, ["cross-decoder-pattern GG", "attend"]),
    "units without a memory": ({"cross-decoder-pattern": "GA"}, ["sliding_window has a memory", "recurrent"]),
    "no K,V": ({"shared-kv-sets": 0}, ["shared-kv-sets 0", "at least 1"]),
    "groups of retention": (
        {**RETENTION, "self-decoder-query-groups": 2},
        ["self-decoder-query-groups", "sliding_window"],
    ),
    "FFN against tensor parallelism": ({"ffn-hidden-size": 97}, ["ffn-hidden-size 97", "tensor-model-parallel-size 2"]),
    "K,V heads against tensor parallelism": (
        {"num-query-groups": 1},
        ["num-query-groups 1", "tensor-model-parallel-size 2"],
    ),
    "self-decoder heads against tensor parallelism": (
        {**RETENTION, "self-decoder-heads": 1},
        ["self-decoder-heads 1", "tensor-model-parallel-size 2"],
    ),
    "sequence against tensor parallelism": ({"seq-length": 63}, ["seq-length 63", "sequence-parallel"]),
    "window 0": ({"self-decoder-window": 0}, ["self-decoder-window 0"]),
    "loss chunk": ({"loss-chunk-size": -1}, ["loss-chunk-size -1"]),
    "CUDA graphs of layers": ({"cuda-graph-impl": "local"}, ["cuda-graph-impl", "full_iteration"]),
    "CUDA graphs of layers, the old flag": ({"external-cuda-graph": True}, ["cuda-graph-impl", "full_iteration"]),
    "CUDA graphs over stages": (
        {"cuda-graph-impl": "full_iteration", "pipeline-model-parallel-size": 2},
        ["cuda-graph-impl", "pipeline-model-parallel-size 2"],
    ),
    "CUDA graphs of documents": (
        {"cuda-graph-impl": "full_iteration", "dataloader-inter-document-masking": True},
        ["cuda-graph-impl", "dataloader-inter-document-masking"],
    ),
    "CUDA graphs and a loss that the host reads": (
        {"cuda-graph-impl": "full_iteration", "check-for-spiky-loss": True},
        ["cuda-graph-impl", "check-for-spiky-loss"],
    ),
    "CUDA graphs and batches that grow": (
        {"cuda-graph-impl": "full_iteration", "step-batch-size-schedule": "0:8"},
        ["cuda-graph-impl", "step-batch-size-schedule"],
    ),
    "CUDA graphs and timers": (
        {"cuda-graph-impl": "full_iteration", "timing-log-level": 1},
        ["cuda-graph-impl", "timing-log-level"],
    ),
    "loss chunk, half": (
        {"loss-chunk-size": 32, "fp16-lm-cross-entropy": True, "fp16": True},
        ["loss-chunk-size", "fp16-lm-cross-entropy"],
    ),
    "loss chunk, fused": (
        {"loss-chunk-size": 32, "cross-entropy-loss-fusion": True},
        ["loss-chunk-size", "cross-entropy-loss-fusion"],
    ),
    "window -1": ({"self-decoder-window": -1}, ["self-decoder-window -1"]),
    "temperature 0": (RETENTION | {"decay-temperature": 0}, ["decay-temperature 0"]),
    "chunk 0": ({"retention-chunk-size": 0}, ["retention-chunk-size"]),
    "no sequence": ({"seq-length": 0}, ["seq-length 0"]),
    "batch of nothing": ({"micro-batch-size": 0}, ["micro-batch-size 0"]),
    "hidden size missing": ({"hidden-size": None}, ["hidden-size", "configs/model"]),
    "no data": ({"mock-data": None}, ["data-path", "mock-data"]),
    "positions": ({"position-embedding-type": "learned_absolute"}, ["position-embedding-type", "rope-variant"]),
}


def argv(**flags) -> list[str]:
    tokens = []
    for name, value in flags.items():
        if value is True:
            tokens.append(f"--{name}")
        elif value is not None:
            tokens += [f"--{name}", *str(value).split()]
    return tokens


@pytest.fixture(autouse=True)
def world(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(WORLD))
    monkeypatch.setenv("RANK", "0")


def message_of(mistake: dict) -> str:
    with pytest.raises(ValueError) as caught:
        arguments.parse(argv(**GOOD | mistake))
    message = str(caught.value)
    assert "\n" not in message, "one line"
    return message


@pytest.mark.parametrize(
    "also", [{}, RETENTION, {"num-self-decoder-layers": 1}, {"num-layers": 3, "num-self-decoder-layers": 1}]
)
def test_the_good_command_line_is_accepted(also):
    arguments.parse(argv(**GOOD | also))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_names_its_flag(mistake):
    change, named = MISTAKES[mistake]
    message = message_of(change)
    for part in named:
        assert part in message, message


def test_the_transformer_baseline_may_use_pipelines():
    change = BASELINE | {"pipeline-model-parallel-size": 2, "num-layers": 5, "mock-data": True}
    assert arguments.parse(argv(**GOOD | change)).pipeline_model_parallel_size == 2


@pytest.mark.parametrize(
    "flags",
    [
        {"cuda-graph-impl": "full_iteration"},
        {"cp-cross-attention": "queries", "context-parallel-size": 2, "loss-suffix": 8},
    ],
)
def test_what_does_not_go_with_loss_masks(flags, tmp_path):
    data = write(tmp_path / "data", [[1, 2, 3]], loss_masks=[[0, 1, 1]])
    data_flags = {"mock-data": None, "data-path": data, "sample-packing": "stream"}
    tokenizer = {"tokenizer-type": "NullTokenizer", "vocab-size": 99}
    message = message_of(data_flags | tokenizer | flags)
    assert "data with loss masks" in message and f"--{next(iter(flags))}" in message


# The same rules hold for models that are built from Python, without a command line.
IN_PYTHON = {
    "--num-layers": {"num_layers": 5},
    "--num-self-decoder-layers": {"num_self_decoder_layers": 4},
    "--self-decoder-heads": {"self_decoder_heads": 12},
    "--num-query-groups": {"num_query_groups": 3},
    "--shared-kv-sets": {"shared_kv_sets": 3},
    "--shared-kv-sources": {"shared_kv_sources": [0, 1]},
    "--cross-decoder-pattern": {"cross_decoder_pattern": ""},
    "--self-decoder-window": {"self_decoder_window": 0},
    "--loss-chunk-size": {"loss_chunk_size": -1},
    "--recompute-elementwise": {"recompute_elementwise": True, "fp8": "hybrid"},
    "--keep-cross-attention": {"keep_cross_attention": True},
    "--attention-dropout": STORED_ATTENTION | {"attention_dropout": 0.1},
    "--hidden-dropout": STORED_ATTENTION | {"hidden_dropout": 0.1},
    "--self-decoder-query-groups": {"self_decoder_query_groups": 2},
    "--ffn-hidden-size": {"ffn_hidden_size": 97, "tensor_model_parallel_size": 2},
    "--decay-temperature": {"decay_temperature": 0.0},
}


@pytest.mark.parametrize("flag", IN_PYTHON)
def test_yoco_config_obeys_the_same_rules(flag):
    with pytest.raises(ValueError, match=flag):
        tiny_config(**IN_PYTHON[flag])


def test_defaults_that_depend_on_other_sizes():
    config = tiny_config(num_layers=6, self_decoder_heads=None)
    assert (config.num_self_decoder_layers, config.num_cross_decoder_layers) == (3, 3)
    assert config.self_decoder_heads == config.self_decoder_query_groups == config.num_attention_heads


def test_self_decoder_view():
    """Self-decoder layers are built from a view with their own heads."""
    config = tiny_config(self_decoder="sliding_window", self_decoder_query_groups=2, self_decoder_window=7)
    view = config.self_decoder_config()
    assert (view.num_attention_heads, view.num_query_groups, view.kv_channels) == (4, 2, 16)
    assert (config.num_attention_heads, config.num_query_groups, config.kv_channels) == (8, 4, 8)
    assert view.params_dtype == config.params_dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "size"),
    [
        ({}, 8192),
        ({"loss-chunk-size": 0}, 0),
        (BASELINE, 0),
        ({"fp16": True, "fp16-lm-cross-entropy": True}, 0),
        ({"cross-entropy-loss-fusion": True}, 0),
    ],
)
def test_the_loss_is_in_chunks_unless_it_is_megatrons(change, size):
    assert arguments.parse(argv(**GOOD | change)).loss_chunk_size == size
