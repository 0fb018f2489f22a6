"""Adam's moments as they are stored between updates: as the masters are, in bf16, or in 8 bits with block scales.

With beta2 = .999 an update moves the second moment by about 1e-3 of it: less than half a step of bf16 (2^-9), and far
less than one of e4m3 (2^-4). Rounded to the nearest it would stay where it is for ever. So moments are rounded
stochastically: up with the chance that makes the stored number right on average. The chance is drawn by a hash of (the
number's index in the whole flat block, the update's number, which moment) and nothing else: a resumed run repeats it,
lower and upper in equal states get equal results, and neither launch shape nor data-parallel shards change it.

e4m3 holds a number as value times its block's scale; a block is 128 consecutive numbers.
- The second moment is held as its square root, of which e4m3 spans 2^-9 to 448, 10^10 in its square. It is the square
  that is right on average: with a root right on average it settles 5% too high.
- Scales are powers of two, under which the grid stays where it is: down to 2^-6 of its block's scale a number is
  rounded alike whatever its neighbours are. A scale that follows the block's largest number exactly, as torchao's and
  bitsandbytes' do, moves the grid at every update, and has numbers drawn anew that have hardly changed.
- A second moment that is not zero is never stored as zero: too small for its block it is held as 2^-9 of the scale,
  too large rather than too small, so that its parameter's update is damped. As zero it would leave eps alone under a
  first moment that lives.
- A number that is not finite is stored as NaN, and spoils neither its block's scale nor its neighbours.

The stored second moment is a random walk about the exact one, pulled back by 1 - beta2 at each update. With neighbours
a share q of it apart an update rounds with a variance of about (1 - beta2) q, and the walk's relative standard
deviation is about sqrt(q / 2), whatever beta2: 5% in bf16 (q = 2^-8 to 2^-7), 30% in e4m3 (.14 to .27, the square of
steps of 1/16 to 1/8), half of that in the denominator. Adam's own, of an average over 1000 squares, is 3%.

Shapes: n numbers.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128
FIRST, SECOND = 0, 1
_SMALLEST = 2.0**-9  # of e4m3 above zero
_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)


@dataclass(frozen=True)
class Moment:
    """One of Adam's moments of n parameters, or of the consecutive n that are one data-parallel shard.

    Blocks of scales are counted from the shard's start. Numbers that must stay equal on several ranks, such as
    parameters replicated over tensor parallelism, must not share one with numbers that differ there: those below 2^-6
    of the scale would drift apart.
    """

    values: Tensor  # [n] in the masters' dtype, bf16 or e4m3
    scale: Tensor | None = None  # [ceil(n / 128)] fp32 powers of two, of e4m3

    @classmethod
    def zeros(cls, numel: int, kind: str | None, master_dtype: torch.dtype, device: torch.device) -> "Moment":
        """`kind`: None (as the masters), "bf16" or "fp8", which go with masters in fp32."""
        dtype = {None: master_dtype, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}[kind]
        values = torch.zeros(numel, dtype=dtype, device=device)
        return cls(values, torch.zeros(triton.cdiv(numel, BLOCK), device=device) if kind == "fp8" else None)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold, by name; views to save from and to load into. e4m3 comes as bytes."""
        if self.scale is None:
            return {"values": self.values}
        return {"values": self.values.view(torch.uint8), "scale": self.scale}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())


def rounding_key(step: int, which: int) -> int:
    """What tells the draws of all updates and of their two moments (FIRST, SECOND) apart: a signed int32."""
    key = (2 * step + which) & _MASK32
    for shift, multiplier in zip((16, 15), _MULTIPLIERS, strict=True):
        key = ((key ^ (key >> shift)) * multiplier) & _MASK32
    key ^= key >> 16
    return key - (1 << 32) if key >> 31 else key


def load_reference(moment: Moment, which: int) -> Tensor:
    """[n] fp32; of a moment in the masters' dtype the stored tensor itself."""
    if moment.scale is None:
        return moment.values.float() if moment.values.dtype == torch.bfloat16 else moment.values
    numbers = moment.values.float() * moment.scale.repeat_interleave(BLOCK)[: len(moment.values)]
    return numbers * numbers if which == SECOND else numbers


def store_reference(moment: Moment, numbers: Tensor, which: int, step: int, first_index: int) -> None:
    """Round `numbers`, [n] in the masters' dtype, into `moment`, whose first number has `first_index` in its block."""
    if moment.values is numbers:
        return
    random = _random_bits_reference(len(numbers), first_index, rounding_key(step, which), numbers.device)
    if moment.scale is None:
        bits = (numbers.view(torch.int32) + (random & 0xFFFF)) & -0x10000
        moment.values.copy_(torch.where(numbers.isnan(), torch.nan, bits.view(torch.float32)))
    else:
        _store_fp8_reference(moment.values, moment.scale, numbers, which, random)


def _random_bits_reference(numel: int, first_index: int, key: int, device: torch.device) -> Tensor:
    """[numel] int32: `_random_bits`. Products wrap; `>>` fills with the sign, which a mask takes away."""
    bits = torch.arange(first_index, first_index + numel, device=device).to(torch.int32) ^ key
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * _MULTIPLIERS[0]
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * (_MULTIPLIERS[1] - (1 << 32))
    return bits ^ ((bits >> 16) & 0xFFFF)


def _store_fp8_reference(values: Tensor, scale: Tensor, numbers: Tensor, which: int, random: Tensor) -> None:
    magnitude = numbers.sqrt() if which == SECOND else numbers.abs()
    finite = magnitude.isfinite()
    magnitude = magnitude.where(finite, 0.0)
    largest = F.pad(magnitude, (0, -len(numbers) % BLOCK)).view(-1, BLOCK).amax(1)
    scale.copy_(_power_of_two(largest.view(torch.int32)).view(torch.float32))
    scaled = magnitude / scale.repeat_interleave(BLOCK)[: len(numbers)]
    step = (scaled.view(torch.int32) & 0x7F800000).view(torch.float32).clamp(min=2.0**-6) * 2.0**-3
    units = scaled / step
    below = units.floor()
    uniform = ((random >> 8) & 0xFFFFFF).float() * 2.0**-24
    if which == SECOND:  # uniform < (units^2 - below^2) / ((below + 1)^2 - below^2)
        up = uniform * (2 * below + 1) < (units - below) * (units + below)
    else:
        up = uniform < units - below
    rounded = (below + up) * step
    if which == SECOND:
        rounded = torch.where(magnitude > 0, rounded.clamp(min=_SMALLEST), 0.0)
    rounded = torch.where(numbers < 0, -rounded, rounded)
    values.copy_(rounded.where(finite, torch.nan))


def _power_of_two(largest: Tensor) -> Tensor:
    """int32 bits of scales, of the bits of blocks' largest numbers: the smallest normal power of two by which they are
    at most 448 = 1.75 * 2^8. A mantissa above 1.75 carries into the exponent."""
    return (((largest + 0x1FFFFF) & 0x7F800000) - (8 << 23)).clamp(min=1 << 23)


@triton.jit
def load_moment(
    values,  # pointer: [n] fp32, bf16 or e4m3
    scale,  # pointer: [ceil(n / BLOCK)] fp32, or None
    index,  # [ROWS, BLOCK] into values
    inside,  # [ROWS, BLOCK] mask
    row,  # [ROWS, 1] into scale
    row_inside,  # [ROWS, 1] mask
    IS_SECOND: tl.constexpr,
) -> tl.tensor:
    """[ROWS, BLOCK] fp32."""
    numbers = tl.load(values + index, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        numbers *= tl.load(scale + row, mask=row_inside, other=0.0)
        if IS_SECOND:
            numbers *= numbers
    return numbers


@triton.jit
def store_moment(
    values,  # pointer: [n] fp32, bf16 or e4m3
    scale,  # pointer: [ceil(n / BLOCK)] fp32, or None
    numbers,  # [ROWS, BLOCK] fp32
    index,  # [ROWS, BLOCK] into values
    inside,  # [ROWS, BLOCK] mask
    row,  # [ROWS, 1] into scale
    row_inside,  # [ROWS, 1] mask
    first_index,
    key,
    IS_SECOND: tl.constexpr,
) -> None:
    if scale is not None:
        random = _random_bits(index + first_index, key)
        numbers, block_scale = _to_fp8(tl.where(inside, numbers, 0.0), random, IS_SECOND)
        tl.store(scale + row, block_scale, mask=row_inside)
    elif values.dtype.element_ty == tl.bfloat16:
        random = _random_bits(index + first_index, key)
        bits = (numbers.to(tl.uint32, bitcast=True) + (random & 0xFFFF)) & 0xFFFF0000
        numbers = tl.where(numbers == numbers, bits.to(tl.float32, bitcast=True), float("nan"))
    tl.store(values + index, numbers.to(values.dtype.element_ty), mask=inside)


@triton.jit
def _random_bits(index, key) -> tl.tensor:
    """Of (index xor key), in uint32: "lowbias32", https://nullprogram.com/blog/2018/07/31/."""
    bits = index.to(tl.uint32) ^ key.to(tl.uint32, bitcast=True)
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def _to_fp8(numbers, random, IS_SECOND: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Numbers of e4m3, still as fp32, [ROWS, BLOCK], and their scales, [ROWS, 1]. To divide by a power of two is to
    multiply by its inverse, whose exponent is the negative one."""
    magnitude = tl.sqrt_rn(numbers) if IS_SECOND else tl.abs(numbers)
    finite = magnitude < float("inf")
    magnitude = tl.where(finite, magnitude, 0.0)
    largest = tl.max(magnitude, axis=1, keep_dims=True).to(tl.int32, bitcast=True)
    scale_bits = tl.maximum(((largest + 0x1FFFFF) & 0x7F800000) - (8 << 23), 1 << 23)
    scaled = magnitude * ((254 << 23) - scale_bits).to(tl.float32, bitcast=True)
    power_bits = tl.maximum(scaled.to(tl.int32, bitcast=True) & 0x7F800000, (127 - 6) << 23)
    units = scaled * ((254 << 23) - power_bits).to(tl.float32, bitcast=True) * 8
    below = tl.floor(units)
    uniform = (random >> 8).to(tl.float32) * 5.9604644775390625e-08
    if IS_SECOND:
        up = uniform * (2 * below + 1) < (units - below) * (units + below)
    else:
        up = uniform < units - below
    rounded = tl.where(up, below + 1, below) * (power_bits - (3 << 23)).to(tl.float32, bitcast=True)
    if IS_SECOND:
        rounded = tl.where(magnitude > 0, tl.maximum(rounded, 0.001953125), 0.0)
    rounded = tl.where(numbers < 0, -rounded, rounded)
    return tl.where(finite, rounded, float("nan")), scale_bits.to(tl.float32, bitcast=True)
