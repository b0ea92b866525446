"""Masks the loss of each document's last token, whose label would be the first token of the next document."""

import torch
from megatron.core.datasets.gpt_dataset import GPTDataset


class BoundaryMaskedGPTDataset(GPTDataset):
    """GPTDataset with inter_document_masking and eod_mask_loss that masks by document boundaries.

    Megatron masks by the end-of-document token, and finds none in data made without one.
    """

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        """Megatron's sample with `loss_mask`, float [sequence], set to 0 at each document's last token."""
        sample = super().__getitem__(idx)
        length, ends = self.config.sequence_length, sample["cu_seqlens"]
        sample["loss_mask"][ends[(ends > 0) & (ends < length)].long() - 1] = 0.0
        # The label of the last token is the first token of the next sample in the stream of documents.
        if idx is not None and self.sample_index[self.shuffle_index[idx] + 1][1] == 0:
            sample["loss_mask"][-1] = 0.0
        return sample
