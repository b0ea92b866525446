"""Loss where documents meet: no document's last token has to guess how another one begins."""

import torch
from megatron.core.datasets.gpt_dataset import GPTDataset


class BorderedDataset(GPTDataset):
    """GPTDataset with inter_document_masking and eod_mask_loss, whose borders are those of the documents.

    Megatron finds them by the token that ends a document, and in data made without it finds none.
    """

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(idx)
        length, ends = self.config.sequence_length, sample["cu_seqlens"]
        sample["loss_mask"][ends[(ends > 0) & (ends < length)].long() - 1] = 0.0
        # The label of the last token is the first token of the next sample in the stream of documents.
        if idx is not None and self.sample_index[self.shuffle_index[idx] + 1][1] == 0:
            sample["loss_mask"][-1] = 0.0
        return sample
