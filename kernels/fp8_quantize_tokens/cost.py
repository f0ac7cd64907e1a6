"""What one call of `fp8_quantize_tokens` moves and computes: as much as one of `quantize_tokens`."""

from vivace.kernels.quantize_tokens.cost import bytes_moved, flops

__all__ = ["bytes_moved", "flops"]
