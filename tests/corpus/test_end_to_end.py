"""From text to samples to the model: documents do not leak, and a resumed run reads on where it stopped."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
from support.cli import TINY, train
from support.models import SELF_DECODERS, VOCAB, build, tiny_config

from yoco_megatron.corpus import encoders
from yoco_megatron.corpus.preprocess import preprocess
from yoco_megatron.corpus.tokenizer_training import MIN_VOCAB_SIZE, train_tokenizer
from yoco_megatron.data.provider import build_datasets
from yoco_megatron.startup import arguments
from yoco_megatron.training.batch import document_ids

MASK = ["--dataloader-inter-document-masking", "--eod-mask-loss"]
BASE = [flag for flag in TINY if flag != "--mock-data"]
# Several epochs of the small corpora below.
LENGTH = 48


def texts() -> list[str]:
    """Functions and classes of this package's own source, each a document; ASCII, so that all ids are below VOCAB."""
    source = "\n".join(path.read_text() for path in sorted(Path(encoders.__file__).parent.glob("*.py")))
    parts = [part.strip()[:70] for part in source.split("\n\n\n")]
    return [part for part in parts if part.isascii() and part][:60]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of bytes, without a merge: a byte is a token, so that a changed text has as many."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "corpus.jsonl").write_text(json.dumps({"text": "any"}))
    assert train_tokenizer([folder / "corpus.jsonl"], MIN_VOCAB_SIZE, folder / "bytes") == MIN_VOCAB_SIZE
    return folder / "bytes"


def flags_of(tokenizer_folder: Path) -> list[str]:
    kept = [flag for flag in BASE if flag not in ("--vocab-size", "255", "NullTokenizer", "--tokenizer-type")]
    return [*kept, "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer_folder)]


def data(folder: Path, tokenizer_folder: Path, documents: list[str]) -> str:
    """`documents` through the whole of preprocessing; the prefix."""
    folder.mkdir()
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    tokenizer = build_tokenizer(arguments.parse_anywhere([*flags_of(tokenizer_folder), "--mock-data"]))
    preprocess([folder / "corpus.jsonl"], str(folder / "d"), tokenizer, keys=["text"], append_eod=True, workers=2)
    return str(folder / "d_text_document")


def parse(tokenizer_folder: Path, *flags: str) -> Namespace:
    """The flags, with what Megatron fills in when training starts."""
    args = arguments.parse_anywhere([*flags_of(tokenizer_folder), "--seq-length", str(LENGTH), *flags])
    args.eval_global_batch_size, args.consumed_train_samples = args.global_batch_size, 0
    return args


def training_part(tokenizer_folder: Path, *flags: str) -> tuple[Namespace, Any]:
    args = parse(tokenizer_folder, *flags)
    return args, build_datasets(args, build_tokenizer(args), [160, 0, 0])[0]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize("kind", SELF_DECODERS)
def test_another_text_of_document_a_changes_nothing_of_b(
    kind: str, masked: bool, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Logits and gradients of B in a sample of A B, bit for bit, as A's text is changed in the corpus."""
    before = texts()
    mask = MASK if masked else MASK[1:]
    prefix = data(tmp_path / "before", tokenizer_folder, before)
    _, samples = training_part(tokenizer_folder, "--data-path", prefix, "--split", "1,0,0", *mask)
    # A sample with the end of A and at least 12 tokens of B, and which documents they are.
    place, boundary = next(
        (place, int(ends[0]) + 1)
        for place in range(len(samples))
        if len(ends := (samples[place]["tokens"] == 0).nonzero().flatten()) == 1 and 12 <= ends[0] <= LENGTH - 13
    )
    number = samples.sample_index[samples.shuffle_index[place]][0]
    a = int(samples.document_index[number])
    after = [*before]
    after[a] = "".join(chr((ord(char) - 32 + 1) % 95 + 32) if char != "\n" else char for char in before[a])
    prefix = data(tmp_path / "after", tokenizer_folder, after)
    _, others = training_part(tokenizer_folder, "--data-path", prefix, "--split", "1,0,0", *mask)
    model = build(tiny_config(self_decoder=kind, params_dtype=torch.float64))

    def logits_and_gradients_of_b(sample: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        assert sample["tokens"].max() < VOCAB
        ids = document_ids(sample["cu_seqlens"][None], LENGTH) if masked else None
        tokens, labels = sample["tokens"][None], sample["labels"]
        logits = model(tokens, document_ids=ids)[0]
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none") * sample["loss_mask"]
        model.zero_grad()
        losses[boundary:].sum().backward()
        return logits[boundary:].detach(), [param.grad.clone() for param in model.parameters()]

    one, other = samples[place], others[place]
    assert torch.equal(one["tokens"][boundary:], other["tokens"][boundary:])
    assert not torch.equal(one["tokens"][:boundary], other["tokens"][:boundary])
    assert one["loss_mask"][boundary - 1] == 0  # A's end does not have to guess how B begins
    (logits, gradients), (other_logits, other_gradients) = map(logits_and_gradients_of_b, (one, other))
    assert torch.equal(logits, other_logits) == masked
    assert all(map(torch.equal, gradients, other_gradients)) == masked
    if masked:
        assert one["position_ids"][boundary:].tolist() == list(range(LENGTH - boundary))


@pytest.mark.usefixtures("one_process")
def test_order_is_the_same_for_every_data_parallel_size(tokenizer_folder: Path, tmp_path: Path) -> None:
    """A blend, several epochs of each source, resumed in the middle of an epoch: the tokens of each global batch."""
    documents = texts()
    prefixes = [data(tmp_path / name, tokenizer_folder, part) for name, part in
                (("x", documents[:35]), ("y", documents[35:]))]  # fmt: skip
    blend = ["--data-path", "0.6", prefixes[0], "0.4", prefixes[1], "--split", "1,0,0"]
    args, samples = training_part(tokenizer_folder, *blend)
    batch_size, micro, steps = args.global_batch_size, args.micro_batch_size, 160 // args.global_batch_size
    epochs = [len(part.document_index) / len(part.indices) for part in samples.datasets]
    assert min(epochs) >= 2 and batch_size % (micro * 4) == 0

    def batches(data_parallel: int, first_step: int) -> list[np.ndarray]:
        """Tokens of every global batch, of all ranks in their order, from `first_step` on."""
        consumed = first_step * batch_size
        ranks = [
            iter(MegatronPretrainingSampler(160, consumed, micro, rank, data_parallel)) for rank in range(data_parallel)
        ]
        found = []
        for _ in range(first_step, steps):
            rows = [next(rank) for _ in range(batch_size // (micro * data_parallel)) for rank in ranks]
            found.append(np.stack([samples[index]["tokens"].numpy() for row in rows for index in row]))
        return found

    whole = batches(1, 0)
    assert len({batch.tobytes() for batch in whole}) == steps  # the order can be told
    for first_step in (0, 3, steps // 2 + 1):
        for data_parallel in (1, 2, 4):
            for step, batch in enumerate(batches(data_parallel, first_step), first_step):
                assert np.array_equal(batch, whole[step]), (data_parallel, first_step, step)


@pytest.mark.usefixtures("one_process")
def test_a_finished_run_of_a_blend_starts_again(tokenizer_folder: Path, tmp_path: Path) -> None:
    """A blend has just as many samples as the run needs, and Megatron's sampler asserts that one is left."""
    prefixes = [data(tmp_path / name, tokenizer_folder, texts()) for name in "ab"]
    blend = ["--data-path", "0.5", prefixes[0], "0.5", prefixes[1], "--split", "1,0,0"]
    args = parse(tokenizer_folder, *blend)
    tokenizer = build_tokenizer(args)
    for args.consumed_train_samples, length in ((152, 160), (160, 320)):
        samples = build_datasets(args, tokenizer, [160, 0, 0])[0]
        assert samples is not None and len(samples) == length
        MegatronPretrainingSampler(length, args.consumed_train_samples, 8, 0, 1)


def test_resumed_with_another_data_parallel_size(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Through pretrain_yoco.py, without --split: the losses of the undisturbed run; other data are refused."""
    prefix = data(tmp_path / "data", tokenizer_folder, texts() * 10)
    flags = ["--data-path", prefix, "--train-iters", "16", "--eval-iters", "0", *MASK]
    base = flags_of(tokenizer_folder)
    split = base.index("--split")
    base = base[:split] + base[split + 2 :]
    save = ["--save", str(tmp_path / "run"), "--save-interval", "8"]
    whole = train(1, *flags, *save, base=base)
    resume = [*flags, "--load", str(tmp_path / "run"), "--ckpt-step", "8"]
    resumed = train(2, *resume, base=base)
    assert list(resumed.grad_norms) == list(range(9, 17))
    for step in resumed.losses:
        assert resumed.loss(step) == pytest.approx(whole.loss(step), rel=2e-5), f"step {step}"
    with pytest.raises(AssertionError, match=r"was trained on other data: seed was 1234, is 4"):
        train(1, *resume, "--seed", "4", base=base)
    with pytest.raises(AssertionError, match=r"d_text_document was shuffled as \d+ epochs"):
        train(1, *resume, "--train-iters", "1000", base=base)
