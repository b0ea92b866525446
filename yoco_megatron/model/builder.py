"""Megatron's ModelConfig / ModelBuilder pair for YOCO, and for the Transformer baseline at equal flags."""

from argparse import Namespace
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.training.argument_utils import core_transformer_config_from_args, gpt_config_from_args
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from megatron.training.vocab_utils import calculate_padded_vocab_size
from torch import Tensor

from yoco_megatron import runtime
from yoco_megatron.model.init import initialize
from yoco_megatron.model.layers.core_attention import TorchAttention
from yoco_megatron.model.layers.norm import RMSNorm, StandaloneRMSNorm
from yoco_megatron.model.layers.output_layer import ChunkedLossOutputLayer
from yoco_megatron.model.yoco_config import YOCOConfig
from yoco_megatron.model.yoco_model import YOCOModel
from yoco_megatron.parallel.pipeline.stages import StagePlan


@dataclass(kw_only=True)
class YOCOModelConfig(GPTModelConfig):
    """Megatron's GPT fields (vocabulary, tying, RoPE base, length) around a YOCOConfig."""

    builder: ClassVar[str] = "yoco_megatron.model.builder.YOCOModelBuilder"
    initialization: str = "yoco"
    initialization_seed: int = 1234


@dataclass(kw_only=True)
class TransformerModelConfig(YOCOModelConfig):
    """The Llama-style baseline: Megatron's own GPTModel."""

    builder: ClassVar[str] = "yoco_megatron.model.builder.TransformerModelBuilder"
    loss_chunk_size: int = 0
    has_z_loss: bool = False
    fuse_weight_gradients: bool = False


class YOCOModelBuilder(GPTModelBuilder):
    """Builds a YOCOModel; wrapping for distributed training is GPTModelBuilder's."""

    model_class: type[YOCOModel] = YOCOModel

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> YOCOModel:
        """One process's part of the model (of its chunk `vp_stage`), with its initial weights."""
        config = self._model_config
        plan = StagePlan.from_config(config.transformer)
        stage = plan.stage((vp_stage or 0) * pg_collection.pp.size() + pg_collection.pp.rank())
        vocab_size = config.vocab_size
        if config.should_pad_vocab:
            vocab_size = calculate_padded_vocab_size(
                vocab_size, config.make_vocab_size_divisible_by, config.tensor_model_parallel_size
            )
        try:
            model = self.model_class(
                config=config.transformer,
                vocab_size=vocab_size,
                max_sequence_length=config.seq_length,
                rotary_base=config.rotary_base,
                stage=stage,
                share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
                fp16_lm_cross_entropy=config.fp16_lm_cross_entropy,
                parallel_output=config.parallel_output,
                pg_collection=pg_collection,
                vp_stage=vp_stage,
            )
        except ValueError as error:  # to which Megatron adds the modules that it was building
            raise ValueError(str(error).partition(" when instantiating ")[0]) from error
        return _initialized(model, config, pg_collection)


class ChunkedLossGPTModel(GPTModel):
    """Megatron's GPTModel, whose output layer is a `ChunkedLossOutputLayer`."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Losses, fp32 [b, s], or, without labels, logits [b, s, V/tp]."""
        return super().forward(*args, output_processor=self._head, **kwargs)

    @staticmethod
    def _head(
        *, hidden_states: Tensor, output_layer, output_weight: Tensor | None, labels: Tensor | None, **_: Any
    ) -> Tensor:
        """What GPTModel calls instead of its own output layer and loss. Labels of the last positions alone ask for no
        more than their losses."""
        if labels is None:
            logits, _ = output_layer(hidden_states, weight=output_weight)
            return logits.transpose(0, 1).contiguous()
        return output_layer(hidden_states[-labels.shape[1] :], weight=output_weight, labels=labels)


class TransformerModelBuilder(GPTModelBuilder):
    """Builds Megatron's GPTModel with our initialisation; optionally the chunked loss; plain-torch norm and attention
    without Transformer Engine."""

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ):
        """One process's part of the model, with its initial weights."""
        model = super().build_model(pg_collection, pre_process, post_process, vp_stage)
        config = self._model_config
        if config.fuse_weight_gradients:
            # As in a YOCO: all but Megatron's own output layer, which cannot be built with it where Apex is missing.
            for module in model.modules():
                if hasattr(module, "fuse_wgrad_accumulation"):
                    module.fuse_wgrad_accumulation = True
        if config.loss_chunk_size and model.post_process:
            if config.transformer.fp8_output_proj:
                raise ValueError(
                    f"--loss-chunk-size {config.loss_chunk_size} computes the output layer without FP8: "
                    "remove --fp8-output-proj, or set --loss-chunk-size 0"
                )
            ChunkedLossOutputLayer.convert(
                model.output_layer, config.loss_chunk_size, config.fuse_weight_gradients, config.has_z_loss
            )
            model.__class__ = ChunkedLossGPTModel  # GPTModelBuilder has no door for the class
        return _initialized(model, config, pg_collection)


def _initialized(model, config: YOCOModelConfig, pg_collection: ProcessGroupCollection):
    initialize(model, config.transformer, config.initialization_seed, config.initialization, pg_collection)
    return model


def local_gpt_spec(config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """GPT layers in plain torch that also know sequence parallelism (Megatron's local norm refuses it)."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.transformer.qk_layernorm)
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = TorchAttention
    if config.transformer.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = StandaloneRMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config.transformer, vp_stage), layer_norm=StandaloneRMSNorm
    )


def model_config_from_args(args: Namespace) -> YOCOModelConfig:
    """The ModelConfig that the flags describe, for `--architecture` yoco or transformer.

    Raises:
        ValueError: sizes that do not fit, naming the flag.
    """
    if args.architecture == "yoco":
        transformer = core_transformer_config_from_args(args, YOCOConfig)
        config = gpt_config_from_args(args, config=transformer, model_config_cls=YOCOModelConfig)
    else:
        transformer = core_transformer_config_from_args(args)
        transformer.perform_initialization = False
        fused = transformer.gradient_accumulation_fusion
        transformer.gradient_accumulation_fusion &= runtime.has_fused_weight_gradient()
        config = gpt_config_from_args(args, config=transformer, model_config_cls=TransformerModelConfig)
        config.loss_chunk_size, config.fuse_weight_gradients = args.loss_chunk_size, fused
        config.has_z_loss = args.z_loss_coeff > 0
        if args.transformer_impl == "local":
            config.transformer_layer_spec = local_gpt_spec
    config.initialization, config.initialization_seed = args.init_law, args.seed
    return config
