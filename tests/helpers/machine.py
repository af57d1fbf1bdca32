"""A machine as benchmarks/roofline.py measures one."""

import torch

MACHINE = {
    "cpu": "a CPU",
    "cores": 2,
    "threads": 2,
    "instruction_set": "AVX512-BF16",
    "load_average": 0.0,
    "torch": torch.__version__,
    "read_bytes_per_s": 1e9,
    "float32_flops": 1e11,
    "bfloat16_flops": 4e11,
}
