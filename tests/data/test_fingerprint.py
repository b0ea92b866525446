"""Changed data or another tokenizer are told before training, by name; unchanged or moved data are not."""

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.training.config import TokenizerConfig
from support.datasets import write

from yoco_megatron.data import fingerprint


def dataset(prefix: Path, lengths: list[int], sha256: str | None = None) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in lengths:
        builder.add_document(np.arange(length), [length])
    builder.finalize(f"{prefix}.idx")
    if sha256:
        report = {"tokenizer": {"sha256": sha256}, "files": {"bin": {"sha256": f"tokens of {sha256}"}}}
        Path(f"{prefix}.json").write_text(json.dumps(report))
    return str(prefix)


def arguments(**given: Any) -> Namespace:
    names = (*fingerprint.PATHS, *fingerprint.LISTS, *fingerprint.FLAGS, "tokenizer_model", "load")
    others = {"finetune": False, "skip_train": False, "allow_changed_data": False, "seed": 1234, "rank": 0}
    others |= {"seq_length": 2, "train_samples": None, "train_iters": None, "global_batch_size": 2}
    others |= {"mid_level_dataset_surplus": 0.005}
    return Namespace(**(dict.fromkeys(names) | others | given))


@pytest.fixture
def run(tmp_path: Path) -> Namespace:
    """A blend of two, saved."""
    paths = ["0.3", dataset(tmp_path / "a", [3, 4]), "0.7", dataset(tmp_path / "b", [5, 6])]
    args = arguments(data_path=paths, split="90,10,0", load=str(tmp_path / "checkpoints"))
    fingerprint.save(args, args.load)
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("10")
    return args


def test_the_same_data_pass_also_elsewhere(run: Namespace, tmp_path: Path) -> None:
    fingerprint.check_resumable(run)
    (tmp_path / "moved").mkdir()
    for path in tmp_path.glob("*.*"):
        shutil.move(path, tmp_path / "moved")
    run.data_path = [entry.replace(str(tmp_path), str(tmp_path / "moved")) for entry in run.data_path]
    fingerprint.check_resumable(run)
    fingerprint.check_resumable(arguments(load=str(tmp_path / "another program's")))


@pytest.mark.parametrize(
    ("flag", "value"), [("split", "80,20,0"), ("seed", 1), ("mock_data", True), ("tokenizer_type", "Other")]
)
def test_changed_flags_are_named(run: Namespace, flag: str, value: Any) -> None:
    setattr(run, flag, value)
    with pytest.raises(ValueError, match=rf"--load .*other data: .*{flag} was .*, is {value}"):
        fingerprint.check_resumable(run)
    for way in ("finetune", "skip_train", "allow_changed_data"):
        fingerprint.check_resumable(Namespace(**vars(run) | {way: True}))


def test_changed_weights_order_and_documents_are_named(run: Namespace, tmp_path: Path) -> None:
    paths = run.data_path
    for changed in (["0.4", *paths[1:]], [*paths[2:], *paths[:2]]):
        run.data_path = changed
        with pytest.raises(ValueError, match=r"data_path was \['0.3', 'a', '0.7', 'b'\]"):
            fingerprint.check_resumable(run)
    run.data_path = paths
    dataset(tmp_path / "b", [6, 5])  # as many tokens and documents
    with pytest.raises(ValueError, match=r"other data: b has another .*idx_sha256"):
        fingerprint.check_resumable(run)


def test_tokens_of_another_checksum_are_changed_data(tmp_path: Path) -> None:
    args = arguments(data_path=[dataset(tmp_path / "a", [3], "one")], load=str(tmp_path / "checkpoints"))
    fingerprint.save(args, args.load)
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("10")
    fingerprint.check_resumable(args)
    dataset(tmp_path / "a", [3], "two")
    with pytest.raises(ValueError, match=r"other data: a has another sha256"):
        fingerprint.check_resumable(args)


def test_another_tokenizer_than_the_datas_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    ours = fingerprint.tokenizer_sha256(str(tmp_path))
    args = arguments(tokenizer_model=str(tmp_path), data_path=[dataset(tmp_path / "a", [3], ours)])
    fingerprint.check_tokenizer(args)
    dataset(tmp_path / "a", [3], "0" * 64)
    with pytest.raises(ValueError, match=r"--tokenizer-model .* did not make .*a \(sha256 000000000000"):
        fingerprint.check_tokenizer(args)


def test_words_that_a_model_would_not_have(tmp_path: Path) -> None:
    """NullTokenizer has no content to compare, but a size; a device would fail on the first larger id."""
    path = dataset(tmp_path / "a", [3])
    Path(f"{path}.json").write_text(json.dumps({"tokenizer": {"vocab_size": 300}}))
    mesh = {"make_vocab_size_divisible_by": 128, "tensor_model_parallel_size": 1}
    args = arguments(tokenizer_type="NullTokenizer", vocab_size=299, data_path=[path], **mesh)
    fingerprint.check_tokenizer(args)  # 384 rows
    args.vocab_size = 256
    with pytest.raises(ValueError, match=r"--vocab-size 256 is too small for .*a, whose tokenizer has 300 "):
        fingerprint.check_tokenizer(args)


@pytest.mark.parametrize(("recorded", "refused"), [(None, 299), (400, 400), (299, 299)])
def test_ids_that_the_vocabulary_lacks(tmp_path: Path, recorded: int | None, refused: int) -> None:
    """Those of the data, or the largest that preprocessing recorded, which a sample may miss; at any mesh."""
    path = dataset(tmp_path / "a", [3, 300])
    if recorded is not None:
        Path(f"{path}.json").write_text(json.dumps({"max_id": recorded}))
    flags = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=refused + 1)
    args = arguments(**vars(flags) | {"data_path": [path]})
    fingerprint.check_tokens(args)
    args.vocab_size = refused
    with pytest.raises(ValueError, match=rf"--data-path .*a holds the token id {refused}, .* ends at {refused - 1}"):
        fingerprint.check_tokens(args)
    args.rank = 1
    fingerprint.check_tokens(args)  # rank 0 has ended


def test_a_single_id_in_a_gigabyte_is_found_without_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yoco_megatron.data.token_sample.BLOCK_BYTES", 8)
    path = dataset(tmp_path / "a", [3000])
    tokens = np.zeros(3000, np.uint16)
    tokens[10] = 99  # between the blocks of the sample
    tokens.tofile(f"{path}.bin")
    args = arguments(**vars(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=9)) | {"data_path": [path]})
    with pytest.raises(ValueError, match="holds the token id 99"):
        fingerprint.check_tokens(args)
    monkeypatch.setattr(fingerprint, "READ_WHOLE", 5999)
    fingerprint.check_tokens(args)  # larger data: found when it is read


def test_documents_of_one_token_have_no_loss(tmp_path: Path) -> None:
    flags = vars(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=9)) | {"eod_mask_loss": True}
    args = arguments(**flags | {"data_path": [dataset(tmp_path / "a", [1, 1, 1])]})
    fingerprint.check_tokens(args)
    args.dataloader_inter_document_masking = True
    with pytest.raises(ValueError, match=r"--eod-mask-loss: no document of .*a has two tokens"):
        fingerprint.check_tokens(args)
    args.data_path = [dataset(tmp_path / "b", [1, 2])]
    fingerprint.check_tokens(args)


def test_datasets_of_one_name_are_kept_apart(run: Namespace, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("de", "en")]
    for folder, lengths in zip(folders, ([3, 4], [5, 6])):
        folder.mkdir()
        dataset(folder / "text", lengths)
    run.data_path = ["0.3", str(folders[0] / "text"), "0.7", str(folders[1] / "text")]
    fingerprint.save(run, run.load)
    fingerprint.check_resumable(run)
    dataset(folders[0] / "text", [4, 3])
    with pytest.raises(ValueError, match=r"other data: text has another "):
        fingerprint.check_resumable(run)
    dataset(folders[0] / "text", [3, 4])
    run.data_path = ["0.3", str(folders[1] / "text"), "0.7", str(folders[0] / "text")]
    with pytest.raises(ValueError, match=r"other data: text has another .*; text#2 has another "):
        fingerprint.check_resumable(run)


def test_other_tokens_of_the_same_lengths_are_changed_data(run: Namespace, tmp_path: Path) -> None:
    content = bytearray((tmp_path / "a.bin").read_bytes())
    content[2] ^= 1
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"other data: a has another .*bin_sampled_sha256"):
        fingerprint.check_resumable(run)


def test_data_of_an_older_version_are_compared_by_what_it_saved(run: Namespace, tmp_path: Path) -> None:
    path = Path(run.load) / fingerprint.FILE_NAME
    saved = json.loads(path.read_text())
    saved["a"] = {"bin": saved["a"]["bin"], "idx": saved["a"]["idx"], "idx_head_sha256": "0"}
    path.write_text(json.dumps(saved))
    fingerprint.check_resumable(run)
    saved["a"]["idx"] += 1
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"other data: a has another"):
        fingerprint.check_resumable(run)


def test_before_the_first_checkpoint_data_may_change(run: Namespace) -> None:
    (Path(run.load) / "latest_checkpointed_iteration.txt").unlink()
    run.seed = 1
    fingerprint.check_resumable(run)


def test_a_longer_run_must_not_shuffle_anew(tmp_path: Path) -> None:
    """3 samples an epoch; Megatron shuffles as many epochs as the whole run needs, all together."""
    args = arguments(data_path=[dataset(tmp_path / "a", [4, 3])], load=str(tmp_path), train_iters=1, split="1,0,0")
    fingerprint.save(args, args.load)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    fingerprint.check_resumable(args)
    args.train_iters, args.train_samples = None, 3  # longer, within the epoch
    fingerprint.check_resumable(args)
    args.train_samples = 7
    with pytest.raises(ValueError, match=r"a was shuffled as 1 epochs, is as 3 epochs.* \(--train-iters"):
        fingerprint.check_resumable(args)
    args.seq_length = 1  # other samples anyway
    fingerprint.check_resumable(args)


def test_the_split_that_megatron_fills_in_is_the_same(run: Namespace) -> None:
    run.split = None
    with pytest.raises(ValueError, match=r"split was 90,10,0, is 969, 30, 1"):
        fingerprint.check_resumable(run)
    run.split = "969, 30, 1"
    fingerprint.save(run, run.load)
    run.split = None
    fingerprint.check_resumable(run)


def test_masking_ends_that_the_data_do_not_have_is_refused(tmp_path: Path) -> None:
    args = arguments(data_path=[dataset(tmp_path / "a", [3], "one")], eod_mask_loss=True)
    for eod, refused in ((0, False), (None, True)):
        (tmp_path / "a.json").write_text(json.dumps({"tokenizer": {"eod": eod}}))
        if refused:
            with pytest.raises(ValueError, match=r"--eod-mask-loss has no effect on .*a, .* --append-eod"):
                fingerprint.check_tokenizer(args)
        else:
            fingerprint.check_tokenizer(args)
    args.dataloader_inter_document_masking = True  # boundaries are known without a token
    fingerprint.check_tokenizer(args)


def test_a_tokenizer_of_unknown_content_is_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name on the hub has a hash once it is in the cache of this machine."""
    args = arguments(tokenizer_model="some/bpe", mock_data=True, load=str(tmp_path))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    for saved, now in ((None, "a"), ("a", None), ("a", "a")):
        monkeypatch.setattr(fingerprint, "tokenizer_sha256", lambda _, value=saved: value)
        fingerprint.save(args, args.load, [1])
        monkeypatch.setattr(fingerprint, "tokenizer_sha256", lambda _, value=now: value)
        fingerprint.check_resumable(args)
    monkeypatch.setattr(fingerprint, "tokenizer_sha256", lambda _: "b")
    with pytest.raises(ValueError, match=r"tokenizer_sha256 was a, is b"):
        fingerprint.check_resumable(args)


def test_another_loss_mask_or_packing_is_named(run: Namespace, tmp_path: Path) -> None:
    """A mask that came or went, too: without it every token is learned."""

    def differs(name: str) -> None:
        with pytest.raises(ValueError, match=rf"other data: {name} (was|has another|is not read|was not read)"):
            fingerprint.check_resumable(run)

    write(tmp_path / "a_loss_mask", [[1, 0, 1], [0, 0, 1, 1]], np.uint8)
    differs("a_loss_mask")
    fingerprint.save(run, run.load)
    fingerprint.check_resumable(run)
    write(tmp_path / "a_loss_mask", [[1, 0, 1], [0, 1, 1, 1]], np.uint8)
    differs("a_loss_mask")
    for suffix in ("bin", "idx"):
        (tmp_path / f"a_loss_mask.{suffix}").unlink()
    differs("a_loss_mask")
    fingerprint.save(run, run.load)
    run.sample_packing = "documents"
    differs("sample_packing")
