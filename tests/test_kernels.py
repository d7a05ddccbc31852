"""Kernels: the same bits as torch's lerp, whichever kernel, dtype, stride and split."""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from shardema import kernels
from shardema.kernels import foreach, fused, fused_cpu, variants
from shardema.kernels.variants import VARIANTS, Variant
from tests import meters

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WEIGHTS = [0.0, 1e-50, 1e-8, 1e-4, 0.3, 0.49999997, 0.5, 0.50000006, 0.9, 1 - 2**-24, 1.0]
INF, NAN = float("inf"), float("nan")
ODD = [INF, -INF, NAN, 0.0, -0.0, 1.0, 1e-40, -3e-8]  # 1e-40 is subnormal in float32 and bfloat16
needs_compiled = pytest.mark.usefixtures("compiled")


@pytest.fixture(autouse=True, scope="module")
def one_compile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
        yield


@pytest.fixture
def compiled() -> fused_cpu.Library:
    """What is compiled; where there is a compiler, that must succeed."""
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        pytest.skip("no C++ compiler")
    code = fused_cpu.library()
    assert code is not None
    return code


def bits(tensor: Tensor) -> Tensor:
    """The bits of each element; every NaN is one and the same."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    return torch.where(tensor.isnan(), NAN, tensor).view(whole)


def expected(shadow: Tensor, param: Tensor, weight: float) -> Tensor:
    """torch.lerp, by a weight of the type that it computes in."""
    if shadow.dtype != torch.float64:
        weight = float(torch.tensor(weight, dtype=torch.float32))
    end = param.to(shadow.dtype)
    if weight in (0, 1):
        return (end if weight else shadow).clone()
    return torch.lerp(shadow, end, weight)


def odd(numel: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Numbers of all sizes, and one in eight of `ODD`: [numel]."""
    size = torch.randint(-30, 12, (numel,), generator=generator)
    values = torch.randn(numel, generator=generator) * 2.0**size
    chosen = torch.tensor(ODD)[torch.randint(0, len(ODD), (numel,), generator=generator)]
    rare = torch.rand(numel, generator=generator) < 1 / 8
    return torch.where(rare, chosen, values).to(dtype)


def pairs(seed: int, dtype: torch.dtype, shadow_dtype: torch.dtype) -> list[list[Tensor]]:
    """Shadows and parameters of hard shapes and strides."""
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape in [(3, 5), (0, 4), (), (1031,), (2, 3, 4, 5), (7, 6)]:
        params.append(torch.randn(shape, generator=generator).to(dtype))
    params[4] = params[4].to(memory_format=torch.channels_last)
    params.append(torch.randn(6, 9, generator=generator).to(dtype).t())
    params.append(torch.randn(6, 9, generator=generator).to(dtype)[:, ::2])  # gaps
    params.append(odd(9001, dtype, generator))
    shadows = [torch.randn(p.shape, generator=generator).to(shadow_dtype) for p in params]
    for i in (4, 6):
        shadows[i] = torch.empty_like(params[i], dtype=shadow_dtype).copy_(shadows[i])
    shadows[-1] = odd(9001, shadow_dtype, generator)
    return [shadows, params]


@pytest.mark.parametrize("name", sorted(kernels.KERNELS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shadow_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limit", [7, 1 << 18])
def test_every_kernel_rounds_as_torch_lerp(
    name: str,
    dtype: torch.dtype,
    shadow_dtype: torch.dtype,
    limit: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(foreach.SCRATCH_NUMEL, "cpu", limit)
    for weight in WEIGHTS:
        shadows, params = pairs(0, dtype, shadow_dtype)
        values = [expected(s, p, weight) for s, p in zip(shadows, params, strict=True)]
        kernels.find(name)(shadows, params, [0] * len(params))([weight])
        for got, value in zip(shadows, values, strict=True):
            assert torch.equal(bits(got), bits(value)), weight


@pytest.mark.parametrize("name", sorted(kernels.KERNELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("one", [1.0, 1 - 1e-12])
def test_weight_zero_is_no_op_and_weight_one_a_copy_over_inf_and_nan(
    name: str, dtype: torch.dtype, one: float
) -> None:
    values = [INF, -INF, NAN, 1.0, -0.0]
    shadow = torch.tensor(values * 5)
    param = torch.tensor([x for x in values for _ in range(5)]).to(dtype)
    lerp_ = kernels.find(name)([shadow], [param], [0])
    before = shadow.clone()
    lerp_([0.0])
    assert torch.equal(shadow.view(torch.int32), before.view(torch.int32))
    lerp_([1e-60 if one < 1 else 0.0])  # 0 in float32
    assert torch.equal(shadow.view(torch.int32), before.view(torch.int32))
    lerp_([one])  # both are 1 in float32
    assert torch.equal(shadow.view(torch.int32), param.float().view(torch.int32))


def test_torch_itself_is_not_alike_at_any_split_for_a_weight_that_rounds_to_one() -> None:
    """Why kernels round the weight first; when torch mends this, they need not."""
    shadow, param = torch.ones(64), torch.full((64,), -0.0)
    whole = torch.lerp(shadow, param, 1 - 1e-12)
    alone = [torch.lerp(s, p, 1 - 1e-12) for s, p in zip(shadow, param, strict=True)]
    parts = torch.stack(alone)
    assert torch.equal(whole, parts)
    assert not torch.equal(bits(whole), bits(parts))


@given(
    st.integers(1, 9000),
    st.integers(1, 5000),
    st.sampled_from(WEIGHTS) | st.floats(0, 1),
    st.sampled_from(DTYPES),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.tuples(st.integers(0, 15), st.integers(0, 15)),
    st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_no_kernel_and_no_split_changes_a_bit(
    numel: int,
    part: int,
    weight: float,
    dtype: torch.dtype,
    shadow_dtype: torch.dtype,
    offsets: tuple[int, int],
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    start = odd(numel + offsets[0], shadow_dtype, generator)
    param = odd(numel + offsets[1], dtype, generator)[offsets[1] :]
    results = []
    for name, split in itertools.product(sorted(kernels.KERNELS), (part, numel)):
        shadow = start.clone()[offsets[0] :]
        shadows, params = shadow.split(split), param.split(split)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(foreach.SCRATCH_NUMEL, "cpu", part)  # another split of the scratch
            kernels.find(name)(shadows, params, [0] * len(params))([weight])
        results.append(bits(shadow))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("name", ["foreach", "fused"])
def test_nothing_is_allocated_once_a_kernel_is_bound(name: str) -> None:
    for dtype in DTYPES:
        shadows, params = pairs(1, dtype, torch.float32)
        lerp_ = kernels.find(name)(shadows, params, [0] * len(params))
        assert meters.allocated(lambda f=lerp_: f([0.1])) == 0


@pytest.mark.parametrize("name", sorted(kernels.KERNELS))
def test_each_pair_moves_by_the_weight_of_its_slot(name: str) -> None:
    shadows, params = [], []
    for seed, dtype in ((2, torch.float32), (3, torch.float64), (2, torch.float32)):
        more, params = pairs(2, torch.float32, dtype)
        shadows += [s + seed for s in more]
    slots = [slot for slot in (0, 1, 2) for _ in params]
    weights = [0.25, 1.0, 0.75]
    values = [
        expected(s, p, weights[slot]) for s, p, slot in zip(shadows, params * 3, slots, strict=True)
    ]
    kernels.find(name)(shadows, params * 3, slots)(weights)
    for got, value in zip(shadows, values, strict=True):
        assert torch.equal(bits(got), bits(value))


@pytest.mark.parametrize("name", sorted(kernels.KERNELS))
def test_many_small_tensors_all_move(name: str) -> None:
    params = [torch.full((n % 70,), float(n)) for n in range(2000)]
    shadows = [torch.zeros(n % 70) for n in range(2000)]
    kernels.find(name)(shadows, params, [n % 2 for n in range(2000)])([0.5, 0.25])
    for n, shadow in enumerate(shadows):
        assert torch.equal(shadow, torch.full_like(shadow, n * (0.25 if n % 2 else 0.5)))


def test_the_scratch_is_bounded() -> None:
    limit = foreach.SCRATCH_NUMEL["cpu"]
    shadow, param = torch.zeros(5 * limit), torch.ones(5 * limit, dtype=torch.bfloat16)
    grown = meters.allocated_at_first(lambda: foreach.bind([shadow], [param], [0])([0.5]))
    assert grown == 4 * limit
    assert torch.equal(shadow, torch.full_like(shadow, 0.5))


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="kernel: got 'fast', expected 'auto' or one of"):
        kernels.find("fast")


# ---- which kernel runs ---------------------------------------------------------------------------


def kernel_names(name: str, shadows: Sequence[Tensor], params: Sequence[Tensor]) -> tuple[str, ...]:
    return kernels.find(name)(shadows, params, [0] * len(params)).kernel_names


@needs_compiled
def test_what_is_bound_says_which_kernels_run() -> None:
    dense = torch.zeros(4, 4)
    assert kernel_names("reference", [dense], [dense]) == ("reference",)
    assert kernel_names("foreach", [dense], [dense]) == ("foreach",)
    assert kernel_names("fused", [dense], [dense.bfloat16()]) == ("fused",)
    assert kernel_names("fused", [dense, dense], [dense, dense.t()]) == ("fused", "foreach")
    assert kernel_names("fused", [dense.half()], [dense]) == ("foreach",)
    for name in ("reference", "foreach", "fused", "auto"):
        assert kernel_names(name, [], []) == ()


@needs_compiled
def test_auto_compiles_nothing_for_few_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = torch.zeros(fused.AUTO_NUMEL - 1), torch.zeros(fused.AUTO_NUMEL)
    assert kernel_names("auto", [many], [many]) == ("fused",)
    assert kernel_names("auto", [many, few], [many.half(), few.t()]) == ("fused",)
    monkeypatch.delattr(fused_cpu, "library")
    assert kernel_names("auto", [few], [few]) == ("foreach",)


# ---- the compiled one ----------------------------------------------------------------------------


def test_a_parameter_of_several_averages_is_read_once(compiled: fused_cpu.Library) -> None:
    params = [torch.zeros(3000), torch.zeros(7)]
    shadows = [torch.zeros(3000), torch.zeros(7), torch.zeros(3000, dtype=torch.float64)]
    bound = fused_cpu.table(compiled, shadows, [*params, params[0]], [0, 0, 1])
    assert bound.count == 2
    assert list(bound.rows)[::4] == [0, 3000, 3007]  # where each row starts
    assert list(bound.rows)[3::4] == [0, 2, 3]  # its first shadow


def in_turn(asked: list[int], given_threads: int) -> tuple[fused_cpu.Threads, list[object]]:
    """Threads that work one after the other; ``asked`` gets how many were wanted."""
    here = [0]
    work_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    def fork(work: int, job: int, threads: int, _: int) -> None:
        asked.append(threads)
        for number in range(given_threads):
            here[0] = number
            work_type(work)(job)

    calls = [
        ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, ctypes.c_uint, ctypes.c_uint)(fork),
        ctypes.CFUNCTYPE(ctypes.c_int)(lambda: here[0]),
        ctypes.CFUNCTYPE(ctypes.c_int)(lambda: given_threads),
    ]
    return fused_cpu.Threads(*(ctypes.cast(c, ctypes.c_void_p).value for c in calls)), calls


@pytest.mark.parametrize("given_threads", [1, 2, 3, 7, 64])
def test_the_threads_share_the_elements_however_many_there_are(
    given_threads: int, compiled: fused_cpu.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    asked: list[int] = []
    threads, held = in_turn(asked, given_threads)
    for sizes in ([200_000], [1, 65_536, 3, 70_001], [1000] * 150, [40_000]):
        params = [torch.randn(n) for n in sizes]
        shadows = [torch.randn(n) for n in sizes]
        values = [torch.lerp(s, p, 0.3) for s, p in zip(shadows, params, strict=True)]
        slots = [0] * len(sizes)
        fused_cpu.table(replace(compiled, threads=threads), shadows, params, slots)([0.3])
        for got, value in zip(shadows, values, strict=True):  # twice or never would be seen
            assert torch.equal(got, value)
    assert asked == [5, 4, 4]  # the last case is too small to share
    del held


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_variant_gives_the_same_bits(variant: Variant, compiled: fused_cpu.Library) -> None:
    sizes, dtypes = [1, 63, 64, 4097, 70_001], [torch.float32, torch.bfloat16, torch.float16]
    params = [torch.randn(n).to(dtype) for n in sizes for dtype in dtypes]
    results = []
    for chosen in (variants.DEFAULT, variant):
        shadows = [torch.ones(param.numel()) for param in (*params, *params)]
        slots = [0] * len(params) + [1] * len(params)
        fused_cpu.table(compiled, shadows, [*params, *params], slots, (), chosen)([0.3, 0.7])
        results.append(torch.cat(shadows))
    assert torch.equal(bits(results[0]), bits(results[1]))
    whole = torch.cat([param.float() for param in params])
    for part, weight in zip(results[0].chunk(2), (0.3, 0.7), strict=True):
        assert torch.equal(part, torch.lerp(torch.ones_like(whole), whole, weight))


def test_the_threads_are_those_of_torch(compiled: fused_cpu.Library) -> None:
    if torch.backends.openmp.is_available():
        assert compiled.threads.fork
    shadow, param = torch.randn(300_000), torch.randn(300_000)
    value = torch.lerp(shadow, param, 0.3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        fused.bind([shadow], [param], [0])([0.3])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(shadow, value)


@pytest.mark.parametrize("name", sorted(kernels.KERNELS))
def test_two_threads_may_bind_and_move_at_once(name: str) -> None:
    start, param = torch.randn(50_000), torch.randn(50_000).bfloat16()
    weights = [0.01 * n for n in range(1, 40)]
    value = start
    for weight in weights:
        value = torch.lerp(value, param.float(), weight)
    shadows = [start.clone() for _ in range(4)]
    ready = threading.Barrier(len(shadows))

    def work(shadow: Tensor) -> None:
        ready.wait()
        lerp_ = kernels.find(name)([shadow], [param], [0])
        for weight in weights:
            lerp_([weight])

    threads = [threading.Thread(target=work, args=(shadow,)) for shadow in shadows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for shadow in shadows:
        assert torch.equal(shadow, value)


@pytest.mark.parametrize("name", sorted(kernels.KERNELS))
def test_autograd_sees_that_a_shadow_changed(name: str) -> None:
    shadow = torch.zeros(5)
    lerp_ = kernels.find(name)([shadow], [torch.ones(5)], [0])
    before = shadow._version
    lerp_([0.5])
    assert shadow._version > before


@needs_compiled
def test_the_memory_that_a_kernel_was_bound_to_stays() -> None:
    shadow, param = torch.zeros(1000), torch.nn.Parameter(torch.ones(1000))
    lerp_ = fused.bind([shadow], [param], [0])
    with torch.no_grad():
        param.data = torch.full((1000,), 7.0)
    gc.collect()
    others = [torch.full((1000,), 9.0) for _ in range(50)]  # would take the memory, were it free
    lerp_([0.5])
    assert torch.equal(shadow, torch.full((1000,), 0.5)), others[0][0]


@needs_compiled
@pytest.mark.parametrize(
    "kind", ["subclass", "meta", "half shadow", "shape", "gaps", "unlike strides"]
)
def test_a_pair_that_is_no_plain_dense_memory_is_left_to_foreach(kind: str) -> None:
    class Own(Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            raise AssertionError

    plain = torch.zeros(4, 4)
    shadow, param = {
        "subclass": (plain, torch.zeros(4, 4).as_subclass(Own)),
        "meta": (plain.to("meta"), plain.to("meta")),
        "half shadow": (plain.half(), plain),
        "shape": (plain, plain[0]),
        "gaps": (plain[:, ::2], plain[:, ::2]),
        "unlike strides": (plain, plain.t()),
    }[kind]
    assert fused_cpu.supports(plain, plain)
    assert fused_cpu.supports(plain.t(), plain.t())
    assert not fused_cpu.supports(shadow, param)
