"""Between the rows' dtype and float32, exactly, also where Triton's interpreter does not convert bfloat16 exactly."""

import triton
import triton.language as tl


@triton.jit
def widen(value, INTERPRETED: tl.constexpr):
    """To float32. The interpreter makes a tiny number of a bfloat16 zero."""
    if INTERPRETED and value.dtype == tl.bfloat16:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def round_to(value, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 to the nearest value of `dtype`, ties to even. The interpreter would truncate to bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = tl.where(value == value, nearest, (bits >> 16) | 0x40)  # a NaN stays one
        return nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)
