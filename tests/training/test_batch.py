"""What a rank gets of a micro-batch."""

from types import SimpleNamespace

import pytest
import torch

from yoco_megatron.training import batch


def test_a_sample_of_a_blend_is_cut_to_the_tokens_of_a_context_parallel_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """BlendedDataset adds the number of the source, which has no sequence to cut."""
    flags = SimpleNamespace(
        dataloader_inter_document_masking=False,
        context_parallel_size=2,
        pipeline_model_parallel_size=1,
        seq_length=8,
        cross_decoder_positions="all",
        mtp_num_layers=None,
    )
    ranks = SimpleNamespace(
        is_pipeline_first_stage=lambda **_: True,
        is_pipeline_last_stage=lambda **_: True,
        get_tensor_model_parallel_rank=lambda: 0,
        get_tensor_model_parallel_src_rank=lambda: 0,
        get_tensor_model_parallel_group=lambda: None,
        get_context_parallel_group=lambda: None,
    )
    monkeypatch.setattr(batch, "get_args", lambda: flags)
    monkeypatch.setattr(batch, "mpu", ranks)
    monkeypatch.setattr(batch, "get_batch_on_this_tp_rank", lambda found, **_: found)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 1)
    rows = dict.fromkeys(("tokens", "labels", "loss_mask", "position_ids"), torch.arange(8)[None])
    sample = {"dataset_id": torch.tensor([0]), **rows}
    found = batch.get_batch(sample, None, 1)
    assert found["tokens"].tolist() == [[2, 3, 4, 5]]
