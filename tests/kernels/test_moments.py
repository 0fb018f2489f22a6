"""Adam's moments in bf16 and in 8 bits: what rounding promises, in the reference; and the kernel's bits against it.

Shapes: n numbers.
"""

import math
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_scalebio.kernels import moments
from megatron_scalebio.kernels.adamw import adamw_update, adamw_update_reference
from megatron_scalebio.kernels.moments import BLOCK, FIRST, SECOND, Moment, load_reference, store_reference
from tests.distributed import run_distributed
from tests.guarded_memory import guarded

KINDS = ["bf16", "fp8"]
BETAS = (0.9, 0.999)
E4M3 = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double()  # from 0 to 448, in order
SETTINGS = dict(lr=1.0, betas=BETAS, eps=1e-20, weight_decay=0.0, gradient_scale=torch.ones(()))


def new_moments(numel: int, kind: str | None) -> tuple[Moment, Moment]:
    first, second = (Moment.zeros(numel, kind, torch.float32, torch.device("cpu")) for _ in range(2))
    return first, second


def to_the_nearest():
    """Draws that are all one half."""
    return mock.patch.object(
        moments, "_random_bits_reference", lambda numel, *_: torch.full((numel,), -0x7FFF8000, dtype=torch.int32)
    )


def update(master: Tensor, gradient: Tensor, pair: tuple[Moment, Moment], step: int, **changed) -> None:
    adamw_update(master, master, gradient, *pair, **{**dict(num_decayed=0, step=step), **SETTINGS, **changed})


@pytest.mark.parametrize("kind, num_bytes", [(None, 4 * 300), ("bf16", 2 * 300), ("fp8", 300 + 4 * 3)])
def test_a_new_moment_is_zero_and_is_all_in_the_tensors_that_a_checkpoint_holds(kind, num_bytes):
    moment, copy = new_moments(300, kind)
    assert moment.nbytes == num_bytes and not load_reference(moment, FIRST).any()
    numbers = torch.randn(300, generator=torch.Generator().manual_seed(0)).abs()
    store_reference(moment, numbers, FIRST, 1, 0)
    if kind is None:
        moment.values.copy_(numbers)
    for name, tensor in moment.tensors().items():
        copy.tensors()[name].copy_(tensor)
    assert torch.equal(load_reference(copy, FIRST), load_reference(moment, FIRST))
    assert load_reference(copy, FIRST).any()


def block_of_numbers() -> Tensor:
    """[128] fp32, of both signs: the largest in the middle of a binade, the others down to 1e-7 of it."""
    generator = torch.Generator().manual_seed(1)
    numbers = 1e-5 * 10.0 ** (-7 * torch.rand(BLOCK, generator=generator))
    numbers[77] = 1.37e-5
    return numbers * torch.randint(0, 2, (BLOCK,), generator=generator).sub(0.5).sign()


def stored_draws(numbers: Tensor, kind: str, which: int, over: str) -> Tensor:
    """What 4096 draws make of a block of numbers, in fp64: [4096, 128]."""
    if over == "indices":
        moment = new_moments(4096 * BLOCK, kind)[0]
        store_reference(moment, numbers.repeat(4096), which, 1, 5 * BLOCK)
        return load_reference(moment, which).view(4096, BLOCK).double()
    moment, rows = new_moments(BLOCK, kind)[0], []
    for step in range(1, 4097):
        store_reference(moment, numbers, which, step, 0)
        rows.append(load_reference(moment, which).clone())
    return torch.stack(rows).double()


def neighbours(numbers: Tensor, kind: str, which: int) -> tuple[Tensor, Tensor]:
    """[n], [n]: what the kind can hold nearest below and above each magnitude, for numbers of one block."""
    exact = numbers.abs().double()
    if kind == "bf16":
        gap = torch.exp2(exact.log2().floor() - 7)
        return (exact / gap).floor() * gap, ((exact / gap).floor() + 1) * gap
    root = exact.sqrt() if which == SECOND else exact
    scale = 2.0 ** math.ceil(math.log2(root.max().item() / 448))
    grid = (E4M3 * scale) ** (2 if which == SECOND else 1)
    place = torch.searchsorted(grid, exact, right=True)
    return grid[place - 1], grid[place.clamp(max=len(grid) - 1)]


@pytest.mark.parametrize("over", ["indices", "steps"])
@pytest.mark.parametrize("which", [FIRST, SECOND], ids=["first", "second"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_number_becomes_one_of_its_neighbours_and_is_right_on_average(kind, which, over):
    numbers = block_of_numbers() if which == FIRST else block_of_numbers().square()
    found = stored_draws(numbers, kind, which, over)
    below, above = neighbours(numbers, kind, which)
    exact, magnitudes = numbers.abs().double(), found.abs()
    tiny = (below == 0) & torch.tensor(kind == "fp8" and which == SECOND)
    assert tiny.any() == (kind == "fp8" and which == SECOND)
    assert (magnitudes[:, tiny] == above[tiny]).all(), "a second moment is never rounded to zero"
    close = dict(rtol=1e-6, atol=0.0)  # of a square of the root in fp32
    assert (torch.isclose(magnitudes, below, **close) | torch.isclose(magnitudes, above, **close)).all()
    assert ((found == 0) | (found.sign() == numbers.sign())).all()

    up = (exact - below) / (above - below)
    standard_error = (above - below) * (up * (1 - up) / len(found)).sqrt()
    error = (magnitudes.mean(0) - exact).abs()
    assert (error <= 5 * standard_error + 1e-6 * exact)[~tiny].all()
    assert (magnitudes.std(0) > 0)[(up > 0.01) & (up < 0.99) & ~tiny].all()


ABOVE = 1.75 + 2**-23  # 448 is 1.75 * 2^8
SCALES = [(0.0, 2**-126), (1.0, 2**-8), (1.75, 2**-8), (448.0, 1), (449.0, 2)]  # squares of these are exact
SIGNED_SCALES = [(ABOVE, 2**-7), (-1.99, 2**-7), (1.75 * 2**60, 2**52), (ABOVE * 2**-60, 2**-67), (2**-120, 2**-126)]


@pytest.mark.parametrize(
    "which, largest, scale", [(w, *c) for w in (FIRST, SECOND) for c in SCALES] + [(FIRST, *c) for c in SIGNED_SCALES]
)
def test_a_scale_is_the_smallest_normal_power_of_two_by_which_its_block_fits(which, largest, scale):
    numbers = torch.zeros(BLOCK + 1)
    numbers[5] = largest if which == FIRST else largest**2
    moment = new_moments(BLOCK + 1, "fp8")[0]
    store_reference(moment, numbers, which, 1, 0)
    assert moment.scale.tolist() == [scale, 2**-126]
    assert not moment.values.float().isnan().any()


@pytest.mark.parametrize("kind, least, most", [("bf16", 0.035, 0.07), ("fp8", 0.2, 0.4)])
def test_the_second_moment_follows_the_exact_one_where_rounding_to_the_nearest_sticks(kind, least, most):
    """From 1 down to 1/4 over 1500 updates. The mean over n numbers is compared by its standard error; the spread of
    single numbers by what the module's docstring derives."""
    numel, start = 4 * BLOCK, 1.0
    exact = torch.full((numel,), start, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    drawn, nearest = new_moments(numel, kind), new_moments(numel, kind)
    for pair in (drawn, nearest):
        store_reference(pair[1], exact.float(), SECOND, 1, 0)
    for step in range(2, 1502):
        gradient = 0.5 * torch.randn(numel, generator=generator)
        exact.mul_(BETAS[1]).addcmul_(gradient.double(), gradient.double(), value=1 - BETAS[1])
        update(torch.zeros(numel), gradient, drawn, step)
        with to_the_nearest():
            update(torch.zeros(numel), gradient, nearest, step)

    def deviation(pair: tuple[Moment, Moment]) -> Tensor:
        return load_reference(pair[1], SECOND).double() - exact

    assert deviation(drawn).mean().abs() < 4 * deviation(drawn).std() / math.sqrt(numel)
    assert least < deviation(drawn).std() / exact.mean() < most
    assert exact.mean() < 0.45 and load_reference(nearest[1], SECOND).mean() > 0.9


def small_beside_large(numel: int, generator: torch.Generator) -> Tensor:
    """[n]: standard deviations of gradients, over twelve orders of magnitude within a block."""
    return 10.0 ** (-12 * torch.rand(numel, generator=generator))


@pytest.mark.parametrize("kind", KINDS)
def test_no_update_is_much_larger_than_exact_adams_largest(kind):
    """Exact Adam moves a parameter by at most `largest` learning rates (Cauchy and Schwarz). Parameters far smaller
    than their block's largest, spikes, and stretches without a gradient, which leave the second moment alone."""
    numel, generator = 64 * BLOCK, torch.Generator().manual_seed(3)
    beta1, beta2 = BETAS
    largest = (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))
    pair, deviation = new_moments(numel, kind), small_beside_large(numel, generator)
    furthest, moved = 0.0, torch.zeros(numel, dtype=torch.bool)
    for step in range(1, 401):
        gradient = deviation * torch.randn(numel, generator=generator)
        gradient[torch.rand(numel, generator=generator) < 1e-4] *= 1e4
        gradient[torch.rand(numel, generator=generator) < 0.3] = 0.0
        if step % 100 > 60:
            gradient.zero_()
        master = torch.zeros(numel)
        update(master, gradient, pair, step)
        furthest, moved = max(furthest, master.abs().max().item()), moved | (master != 0)
    assert moved.all() and 1.0 < furthest < 2 * largest


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_is_exact_adamw_from_the_moments_as_they_are_stored(kind):
    numel, generator = 300, torch.Generator().manual_seed(4)
    master, pair = torch.randn(numel, generator=generator), new_moments(numel, kind)
    for step in range(1, 6):
        gradient = torch.randn(numel, generator=generator)
        exact, average, square = master.double(), *(load_reference(m, i).double() for i, m in enumerate(pair))
        update(master, gradient, pair, step, lr=0.1, weight_decay=0.1, num_decayed=100)
        average = BETAS[0] * average + (1 - BETAS[0]) * gradient.double()
        square = BETAS[1] * square + (1 - BETAS[1]) * gradient.double() ** 2
        exact[:100] *= 1 - 0.1 * 0.1
        exact -= 0.1 / (1 - BETAS[0] ** step) * average / (square / (1 - BETAS[1] ** step)).sqrt()
        torch.testing.assert_close(master.double(), exact, rtol=1e-5, atol=1e-5)


def bits(pair: tuple[Moment, Moment]) -> list[Tensor]:
    return [tensor.view(torch.uint8) for moment in pair for tensor in moment.tensors().values()]


def trained(kind: str, cuts: list[int], first_step: int = 1) -> tuple[Tensor, list[list[Tensor]]]:
    """1008 parameters after five updates, as shards between `cuts`: masters, and the bits of the moments by tensor."""
    generator = torch.Generator().manual_seed(5)
    gradients = torch.randn(5, 1008, generator=generator) * small_beside_large(1008, generator)
    masters, stored = [], []
    for start, stop in zip(cuts, [*cuts[1:], 1008], strict=True):
        pair, master = new_moments(stop - start, kind), torch.zeros(stop - start)
        for step, gradient in enumerate(gradients[:, start:stop], first_step):
            update(master, gradient, pair, step, first_index=start)
        masters.append(master)
        stored.append(bits(pair))
    return torch.cat(masters), [torch.cat(shards) for shards in zip(*stored, strict=True)]


@pytest.mark.parametrize("kind, cuts", [("bf16", [0, 16, 400]), ("fp8", [0, 384, 896])])
def test_shards_have_the_bits_of_the_whole(kind, cuts):
    whole, again, shards = trained(kind, [0]), trained(kind, [0]), trained(kind, cuts)
    for other in (again, shards):
        assert torch.equal(other[0], whole[0])
        assert all(torch.equal(a, b) for a, b in zip(other[1], whole[1], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_an_updates_number_and_the_index_decide_the_draws(kind):
    numbers = torch.full((1024,), 1.03)  # in one moment and the other, in one update and the next
    stored = []
    for which, step, first_index in ((FIRST, 1, 0), (SECOND, 1, 0), (FIRST, 2, 0), (FIRST, 1, 1024)):
        moment = new_moments(1024, kind)[0]
        with mock.patch.object(moments, "SECOND", -1):  # stored alike, drawn apart
            store_reference(moment, numbers, which, step, first_index)
        stored.append((load_reference(moment, FIRST) > 1.03).float())
    correlation = torch.corrcoef(torch.stack(stored)).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / math.sqrt(1024)


def test_draws_are_the_hash_as_published():
    """lowbias32 in Python's integers, for indices on both sides of where int32 wraps."""

    def mixed(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        return x ^ (x >> 16)

    for step, which in ((1, FIRST), (1, SECOND), (7, FIRST), (2**31, SECOND)):
        key = moments.rounding_key(step, which)
        assert key % 2**32 == mixed((2 * step + which) % 2**32) and -(2**31) <= key < 2**31
        for first_index in (0, 2**31 - 2, 2**32 - 2):
            found = moments._random_bits_reference(4, first_index, key, torch.device("cpu")).tolist()
            indices = range(first_index, first_index + 4)
            assert [bits % 2**32 for bits in found] == [mixed((index ^ key) % 2**32) for index in indices]


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_has_the_bits_of_the_reference(kind):
    run_distributed(1, check_kernel, kind, interpret=True)


def check_kernel(kind: str) -> None:
    """Gradients and betas of few bits: the moments are exact in fp32 whatever the order of operations, and only
    rounding is compared."""
    generator = torch.Generator().manual_seed(6)
    betas = dict(betas=(0.75, 0.5), eps=1e-6)
    for numel, first_index in ((1, 0), (50, 128), (1500, 2**31 - 700), (2064, 2**32 - 1024)):
        found, expected = new_moments(numel, kind), new_moments(numel, kind)
        found = tuple(
            Moment(guarded(moment.values), None if moment.scale is None else guarded(moment.scale)) for moment in found
        )
        master = guarded(torch.randn(numel, generator=generator))
        expected_master = master.clone()
        for step in range(1, 5):
            powers = torch.randint(-14, 1, (numel,), generator=generator).sub(10 * (step % 2))
            gradient = torch.randint(-7, 8, (numel,), generator=generator) * torch.exp2(powers)
            if step == 4 and numel > 1000:
                gradient[17], gradient[400] = torch.nan, torch.inf
            call = {**SETTINGS, **betas, **dict(num_decayed=0, step=step, first_index=first_index)}
            adamw_update(master, master, gradient, *found, **call)
            adamw_update_reference(expected_master, expected_master, gradient, *expected, **call)
            torch.testing.assert_close(master, expected_master, rtol=1e-6, atol=1e-6, equal_nan=True)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a.values.float(), b.values.float(), rtol=0, atol=0, equal_nan=True)
                assert a.scale is None or torch.equal(a.scale, b.scale)
