"""vLLM plugin: registers YocoForCausalLM, the architecture of exported yoco-megatron models."""


def register() -> None:
    """Called by vLLM in each of its processes, more than once."""
    from vllm import ModelRegistry

    if "YocoForCausalLM" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model("YocoForCausalLM", "yoco_vllm.model:YocoForCausalLM")
