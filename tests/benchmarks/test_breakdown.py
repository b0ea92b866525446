"""The breakdown of a step on profiles written by hand: groups by name and launch, every moment once."""

import breakdown
import pytest

NAMES = {
    "GEMM": [
        "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x64_64x4_nn_align8>(...)",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(...)",
        "sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize128x128x128",
    ],
    "attention": [
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1",
        "void cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16>(...)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_128x128x128_4x1x1",
        "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90>>(...)",
    ],
    "retention": ["forward", "backward", "decay_sums", "segment_states", "chain_segments", "decay_gradient"],
    "elementwise and norms": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>(...)",
        "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::add>>(...)",
        "void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel<...>(...)",
        "triton_poi_fused_cat_mul_silu_0",
        "rotate_pairs",
        "norm_gate_backward",
        "void transformer_engine::fused_rope_forward_kernel<__nv_bfloat16>(...)",
        "Memcpy DtoD (Device -> Device)",
    ],
    "FP8 casts": [
        "void transformer_engine::cast_transpose_fused_kernel<...>(...)",
        "void transformer_engine::unary_kernel<8, float, identity, __nv_bfloat16, __nv_fp8_e4m3>(...)",
        "void transformer_engine::amax_kernel<8, true, __nv_bfloat16>(...)",
    ],
    "optimizer": ["void multi_tensor_apply_kernel<TensorListMetadata<4>, AdamFunctorMaster<...>>(...)"],
    "communication": ["ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"],
}


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, names in NAMES.items() for name in names])
def test_group_by_name(group: str, name: str) -> None:
    assert breakdown.group_of(name) == group


def test_the_kernel_names_of_our_retention_are_known() -> None:
    """A kernel that is renamed, or added, must not end among the elementwise ones."""
    from yoco_megatron.ops.gated_retention import kernels

    launched = {name for name, value in vars(kernels).items() if hasattr(value, "fn") and not name.startswith("_")}
    assert {"forward", "backward"} <= launched
    training = launched - {"step"}  # of generation alone
    assert {name for name in training if breakdown.group_of(name) != "retention"} == set()


def event(cat: str, name: str, ts: float, dur: float, correlation: int = 0, tid: int = 1) -> dict:
    return dict(ph="X", cat=cat, name=name, ts=ts, dur=dur, tid=tid, args={"correlation": correlation})


PROFILE = [
    event("user_annotation", "ProfilerStep#6", 0, 100),
    event("cpu_op", "autograd::engine::evaluate_function: _LinearCrossEntropyBackward", 10, 5, tid=2),
    event("cuda_runtime", "cudaLaunchKernel", 1, 1, correlation=1),
    event("cuda_runtime", "cudaLaunchKernel", 12, 1, correlation=2, tid=2),
    event("cuda_driver", "cuLaunchKernelEx", 12, 1, correlation=3),  # at that time, but of another thread
    event("kernel", "nvjet_a", 10, 30, correlation=1),
    event("kernel", "nvjet_b", 40, 20, correlation=2),
    event("kernel", "forward", 55, 10, correlation=3),  # 5 of them beside nvjet_b
    event("kernel", "ncclDevKernel_AllGather", 50, 30),  # 15 of them beside others
    {"ph": "M", "name": "process_name"},
]


def test_every_moment_counts_once() -> None:
    kernels, step = breakdown.read_kernels(PROFILE)
    assert step == 100
    times = breakdown.divide(kernels, step)
    assert times == {"GEMM": 30, "head and loss": 20, "retention": 5, "communication": 15, "idle": 30}


def test_gaps_lie_where_no_kernel_runs() -> None:
    kernels = [(0, 10, "", "a"), (2, 4, "", "b"), (15, 20, "", "c"), (19, 30, "", "d"), (31, 32, "", "e")]
    assert breakdown.gaps(kernels) == [(5, "a", "c"), (1, "d", "e")]


def test_a_profile_without_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match="no step with GPU kernels"):
        breakdown.read_kernels(PROFILE[:3])
