"""Multi-token prediction (--mtp-num-layers): one more cross-decoder layer that predicts the token after the next one.

With h_i the hidden state that predicts t_(i+1), and E the embedding (DeepSeek-V3, arXiv 2412.19437 section 2.2):

    x_i  = W [RMSNorm(h_i); RMSNorm(E[t_(i+1)])]
    h'_i = CrossDecoderLayer(x_i; K^, V^ of positions 0..i),  the model's final norm and head on h'_i predict t_(i+2)

A second such layer takes h' and E[t_(i+2)], and so on. In a Transformer the layer has keys and values of its own; here
it reads the shared ones, and costs no cache.

The layer is a `YOCOBlock` of its own, a stage behind the last one, so that context parallelism, packed documents, runs
of positions with loss and recompute are the block's. What is concatenated is local to each row: with sequence
parallelism each rank multiplies its own rows by the whole W, and nothing is exchanged for it.
"""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from yoco_megatron.model import specs
from yoco_megatron.model.yoco_block import YOCOBlock
from yoco_megatron.model.yoco_config import YOCOConfig
from yoco_megatron.parallel.pipeline.stages import Stage


class RowLinear(torch.nn.Linear):
    """A linear layer without bias, whole on every tensor-parallel rank, of the rows that the rank holds."""

    def __init__(self, config: YOCOConfig, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, False, torch.cuda.current_device(), config.params_dtype)
        # With sequence parallelism every rank has other rows, so the gradient is summed over ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class MultiTokenPrediction(MegatronModule):
    """One layer of multi-token prediction.

    Args:
        depth: 0 for the one that predicts the token after the next one.
    """

    def __init__(self, config: YOCOConfig, depth: int, block: type[YOCOBlock], groups: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        norm = specs.backend_for(config).layer_norm(rms_norm=True)

        def of_input() -> torch.nn.Module:
            return norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

        self.hidden_norm, self.embedding_norm = of_input(), of_input()
        self.projection = RowLinear(config, 2 * config.hidden_size, config.hidden_size)
        first, sets = config.num_layers + depth, config.shared_kv_sets
        stage = Stage(first, first + 1, pre_process=False, post_process=False, kv_in=range(sets - 1, sets))
        self.block = block(config, stage, groups)

    def forward(self, hidden_states: Tensor, embeddings: Tensor, kv: Tensor, *places: Any) -> Tensor:
        """Hidden states [s, b, h] and embeddings [s, b, h] of the tokens that they predict -> hidden states [s, b, h].

        With sequence parallelism [s/tp, b, h].

        Args:
            kv: the last set of the shared K,V [s, b, G, 2, D].
            places: angles, shard and queries as `YOCOBlock.forward` takes them.
        """
        x = torch.cat((self.hidden_norm(hidden_states), self.embedding_norm(embeddings)), dim=-1)
        x, _ = self.block(self.projection(x), [kv], *places)
        return x
