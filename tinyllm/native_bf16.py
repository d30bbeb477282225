"""Whether this CPU multiplies bfloat16 in hardware."""

import functools

import torch

# AVX-512 BF16 and AMX on x86-64; FEAT_BF16 (NEON or SVE) on arm64.
FEATURES = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


@functools.cache
def cpu_multiplies_bf16() -> bool:
    """True where bfloat16 products are faster than float32 ones; elsewhere they are emulated,
    and slower.
    """
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(feature, False) for feature in FEATURES)
