"""What GPUs can multiply at most, by the vendor's data sheets."""

import re

# TFLOP/s of bf16 matrix products without sparsity, by a word of the name that the driver gives; the first that fits.
TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "GH200": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "GB200": 2500.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
}


def peak_flops(device: str) -> float | None:
    """FLOP/s of bf16 matrix products of a GPU, from its name (as torch.cuda.get_device_name); None if not known."""
    for name, tflops in TFLOPS.items():
        if re.search(rf"\b{name}\b", device):
            return tflops * 1e12
    return None
