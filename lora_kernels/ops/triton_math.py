"""Arithmetic shared by all Triton kernels: products of mixed dtypes and the one rounding of a result."""

import triton
import triton.language as tl


@triton.jit
def dot(left, right, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + left · right, accumulated in float32; operands of two dtypes meet in float32."""
    if UPCAST or left.dtype != right.dtype:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    if PRECISION == "ieee":
        # One chain of thousands of additions would lose digits that float32 has to keep: a block is summed on its own.
        # By fma, as the compiler folds a plain addition into the product's accumulator.
        return tl.fma(tl.dot(left, right, input_precision=PRECISION), 1.0, acc)
    return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def narrow(value, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """float32 rounded to nearest even. Triton's interpreter truncates to bfloat16: there the bits are made here."""
    if UPCAST and tl.bfloat16 == DTYPE:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value == value, rounded, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(DTYPE)
