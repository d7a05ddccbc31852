"""Kernels: the same bits as torch's lerp, whichever kernel, dtype, stride and split."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from shardema import kernels
from shardema.kernels import foreach
from tests import meters

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WEIGHTS = [0.0, 1e-8, 1e-4, 0.3, 0.5, 0.9, 1.0]


def pairs(seed: int, dtype: torch.dtype, shadow_dtype: torch.dtype) -> list[list[Tensor]]:
    """Shadows and parameters of hard shapes and strides."""
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape in [(3, 5), (0, 4), (), (1031,), (2, 3, 4, 5), (7, 6)]:
        params.append(torch.randn(shape, generator=generator).to(dtype))
    params[4] = params[4].to(memory_format=torch.channels_last)
    params.append(torch.randn(6, 9, generator=generator).to(dtype).t())
    params.append(torch.randn(6, 9, generator=generator).to(dtype)[:, ::2])  # gaps
    shadows = [torch.randn(p.shape, generator=generator).to(shadow_dtype) for p in params]
    for i in (4, 6):
        shadows[i] = torch.empty_like(params[i], dtype=shadow_dtype).copy_(shadows[i])
    return [shadows, params]


@pytest.mark.parametrize("name", sorted(kernels.KERNELS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("limit", [7, 1 << 18])
def test_every_kernel_rounds_as_torch_lerp(
    name: str, dtype: torch.dtype, weight: float, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(foreach.SCRATCH_NUMEL, "cpu", limit)
    shadow_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    shadows, params = pairs(0, dtype, shadow_dtype)
    expected = [torch.lerp(s, p.to(s.dtype), weight) for s, p in zip(shadows, params, strict=True)]
    kernels.find(name)(shadows, params)(weight)
    for got, value in zip(shadows, expected, strict=True):
        assert torch.equal(got, value)


@pytest.mark.parametrize("name", sorted(kernels.KERNELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_zero_is_no_op_and_weight_one_a_copy_over_inf_and_nan(
    name: str, dtype: torch.dtype
) -> None:
    odd = [float("inf"), float("-inf"), float("nan"), 1.0, -0.0]
    shadow = torch.tensor(odd * 5)
    param = torch.tensor([x for x in odd for _ in range(5)]).to(dtype)
    lerp_ = kernels.find(name)([shadow], [param])
    before = shadow.clone()
    lerp_(0.0)
    assert torch.equal(shadow.view(torch.int32), before.view(torch.int32))
    lerp_(1.0)
    assert torch.equal(shadow.view(torch.int32), param.float().view(torch.int32))


@given(st.integers(1, 5000), st.integers(1, 700), st.sampled_from(WEIGHTS), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_split_changes_no_bit(numel: int, part: int, weight: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shadow = torch.randn(numel, generator=generator)
    param = torch.randn(numel, generator=generator)
    apart = shadow.clone()
    foreach.bind([shadow], [param])(weight)
    foreach.bind(list(apart.split(part)), list(param.split(part)))(weight)
    assert torch.equal(shadow, apart)


def test_foreach_allocates_nothing_after_it_is_bound() -> None:
    for dtype in DTYPES:
        shadows, params = pairs(1, dtype, torch.float32)
        lerp_ = foreach.bind(shadows, params)
        assert meters.allocated(lambda f=lerp_: f(0.1)) == 0


def test_the_scratch_is_bounded() -> None:
    limit = foreach.SCRATCH_NUMEL["cpu"]
    shadow, param = torch.zeros(5 * limit), torch.ones(5 * limit, dtype=torch.bfloat16)
    grown = meters.allocated_at_first(lambda: foreach.bind([shadow], [param])(0.5))
    assert grown == 4 * limit
    assert torch.equal(shadow, torch.full_like(shadow, 0.5))


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="kernel: got 'fast', expected 'auto' or one of"):
        kernels.find("fast")
