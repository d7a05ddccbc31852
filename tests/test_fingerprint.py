"""Fingerprints: the same on every layout, of the definition's value, and another after a change."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from shardema.kernels import fingerprint as module
from shardema.kernels.fingerprint import fingerprint, total
from shardema.shards.boxes import Box, flat_boxes, split_box, whole

BLOCK = 4096
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.complex64]


def _mixed(x: int) -> int:
    """splitmix64's output function, on Python's integers; odd."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return (x ^ (x >> 31)) | 1


def _by_definition(fqn: str, values: Tensor) -> int:
    """Each element alone, with integers that never overflow."""
    step = 0x9E3779B97F4A7C15
    seed = xxhash.xxh3_64_intdigest(fqn.encode())
    size = values.element_size()
    raw = bytes(values.contiguous().reshape(-1).view(torch.uint8).tolist())
    found = 0
    for index in range(values.numel()):
        bits = int.from_bytes(raw[index * size : (index + 1) * size], "little", signed=True)
        block, offset = divmod(index, BLOCK)
        table = _mixed((offset + 1) * step % 2**64)
        found += bits * table * _mixed((seed + (block + 1) * step) % 2**64)
    return found % 2**64


def _of(fqn: str, values: Tensor, boxes: Any = None) -> int:
    shape = tuple(values.shape)
    parts = [(box, box.view(values)) for box in boxes or whole(shape)]
    return total([fingerprint(fqn, shape, parts)])


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiled code, which must be there, and as on a device or without a compiler."""
    if request.param == "compiled":
        assert module._library() is not None
    else:
        monkeypatch.setattr(module, "_library", lambda: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_it_is_the_sum_of_the_definition(dtype: torch.dtype) -> None:
    values = (torch.randn(2, 33_001, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    assert _of("layer.weight", values) == _by_definition("layer.weight", values)


@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from([(7,), (5, 6), (3, 4, 5), (2, 70_001), (300, 300), (), (0, 4)]),
    st.sampled_from(DTYPES),
    st.integers(2_000, 90_000),
    st.booleans(),
)
def test_boxes_add_up_to_the_full_tensor(
    shape: tuple[int, ...], dtype: torch.dtype, most: int, columns: bool
) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    if columns and len(shape) == 2 and shape[1] > 1:
        cut = shape[1] // 2
        boxes = [Box((0, 0), (shape[0], cut)), Box((0, cut), (shape[0], shape[1] - cut))]
    else:
        boxes = [part for box in whole(shape) for part in split_box(box, most)]
    sums = [fingerprint("w", shape, [(box, box.view(values))]) for box in boxes]
    assert total(sums) == _of("w", values)


def test_flat_ranges_and_memory_orders_give_the_same() -> None:
    values = torch.randn(4, 3, 50, 60, generator=torch.Generator().manual_seed(2))
    n = values.numel()
    cuts = [0, 17, 5_000, n - 1, n]
    flat = values.reshape(-1)
    sums = []
    for start, stop in itertools.pairwise(cuts):
        begin = start
        for box in flat_boxes(tuple(values.shape), start, stop - start):
            part = flat[begin : begin + box.numel].view(box.sizes)
            sums.append(fingerprint("w", tuple(values.shape), [(box, part)]))
            begin += box.numel
    assert total(sums) == _of("w", values)
    assert _of("w", values.contiguous(memory_format=torch.channels_last)) == _of("w", values)


def test_a_flipped_bit_an_exchange_and_another_name_change_it() -> None:
    values = torch.randn(2, 70_000, generator=torch.Generator().manual_seed(3))
    known = _of("w", values)
    bits = values.view(torch.int32)
    for place, bit in ((0, 0), (65_536, 31), (139_999, 17)):
        bits.view(-1)[place] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31))
        assert _of("w", values) != known, (place, bit)
        bits.view(-1)[place] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31))
    exchanged = values.clone()
    exchanged[0, 0], exchanged[1, 69_999] = values[1, 69_999].clone(), values[0, 0].clone()
    assert _of("w", exchanged) != known
    assert _of("v", values) != known
    assert _of("w", values.view(70_000, 2)) == known  # as are the bytes in row-major order
    assert _of("w", values) == known


def test_nothing_has_none() -> None:
    assert total([fingerprint("w", (0, 3), [])]) == 0
    assert total([]) == 0
