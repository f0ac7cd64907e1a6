"""What one call of `int8_attention` moves and computes: as `attention` of the same arguments."""

from vivace.kernels.attention.cost import bytes_moved, flops

__all__ = ["bytes_moved", "flops"]
