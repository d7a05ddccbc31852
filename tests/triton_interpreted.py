"""Facts of the Triton kernel under Triton's interpreter, which shows indexing, not rounding.

They need ``TRITON_INTERPRET=1`` before triton is imported, so `test_kernels_triton` runs this file
in a process of its own. The interpreter rounds a product before it is added, and cuts a bfloat16
off where a GPU rounds it. On numbers that need no rounding there the two agree, so the bits are
compared; elsewhere one unit in the last place of the larger of the two numbers is allowed.
"""

from __future__ import annotations

import gc
import itertools
import os
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

assert os.environ.get("TRITON_INTERPRET") == "1", "run tests/test_kernels_triton.py instead"

from shardema import ShadowPolicy, ShardedEMA, schedules  # noqa: E402
from shardema.kernels import fused_gpu, reference, rounding  # noqa: E402  (never without the interpreter)
from shardema.shards.boxes import Box  # noqa: E402
from shardema.update import replays, updates  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, on inf and NaN

B, P = fused_gpu.BLOCK, fused_gpu.PART
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PAIRS = list(itertools.product(DTYPES, DTYPES))
SIZES = [0, 1, 7, P - 1, P, P + 1, B - 1, B, B + 1, 2 * B + 9]
EXACT = [0.0, 0.25, 0.5, 0.75, 1.0]  # of multiples of 4 under 128: no rounding in any dtype
EXACT_PRODUCTS = [3 / 1024, 1021 / 1024]  # the sum is rounded, not the product
ROUGH = [1e-8, 0.1, 1 / 3, 0.7, 0.9999]
GUARD = 24  # elements on either side of a tensor


class Guarded:
    """Tensors inside larger buffers; what lies around them must stay as it is.

    ``shift`` moves the starts, in elements, off the 16 bytes on which the buffers start.
    """

    def __init__(self, numels: list[int], dtype: torch.dtype, shift: int, exact: bool) -> None:
        self.buffers, self.tensors = [], []
        for numel in numels:
            buffer = torch.full((numel + 2 * GUARD,), float("nan"), dtype=dtype)
            view = buffer[GUARD + shift : GUARD + shift + numel]
            integers = torch.randint(-31, 32, (numel,)) * 4.0
            view.copy_(integers if exact else torch.randn(numel))
            self.buffers.append(buffer)
            self.tensors.append(view)
        self.shift = shift

    def check(self) -> None:
        for buffer, view in zip(self.buffers, self.tensors, strict=True):
            start = GUARD + self.shift
            assert buffer[:start].isnan().all()
            assert buffer[start + view.numel() :].isnan().all()
            assert not view.isnan().any()


def ulp(dtype: torch.dtype, a: Tensor, b: Tensor) -> Tensor:
    """One unit in the last place of the larger of two numbers, at most."""
    return torch.finfo(dtype).eps * torch.maximum(a.double().abs(), b.double().abs())


def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills with the number of programs of each launch to come."""
    seen: list[int] = []
    kernel = fused_gpu.lerp_kernel

    class Counted:
        def __getitem__(self, grid: tuple[int]) -> Any:
            seen.append(grid[0])
            return kernel[grid]

    monkeypatch.setattr(fused_gpu, "lerp_kernel", Counted())
    return seen


@pytest.mark.parametrize(("param", "shadow"), PAIRS, ids=str)
def test_exact_products_give_the_bits_of_the_reference(
    param: torch.dtype, shadow: torch.dtype
) -> None:
    params = Guarded(SIZES, param, 0, exact=True)
    shadows = Guarded(SIZES, shadow, 0, exact=True)
    lerp_ = fused_gpu.bind(shadows.tensors, params.tensors, [0] * len(SIZES))
    expected = [t.clone() for t in shadows.tensors]
    other = reference.bind(expected, params.tensors, [0] * len(SIZES))
    cut_off = shadow == torch.bfloat16
    for weight in EXACT if cut_off else EXACT + EXACT_PRODUCTS:
        before = [t.clone() for t in shadows.tensors]
        for target, start in zip(expected, before, strict=True):
            target.copy_(start)
        other([weight])
        lerp_([weight])
        for got, value in zip(shadows.tensors, expected, strict=True):
            assert torch.equal(got, value), weight
        for target, start in zip(shadows.tensors, before, strict=True):
            target.copy_(start)  # numbers of more digits would make later products inexact
    shadows.check()
    params.check()


@pytest.mark.parametrize(("param", "shadow"), PAIRS, ids=str)
def test_any_product_is_within_an_ulp_of_the_reference(
    param: torch.dtype, shadow: torch.dtype
) -> None:
    start = torch.randn(B + 5, dtype=torch.float64).to(shadow)
    end = torch.randn(B + 5, dtype=torch.float64).to(param)
    if shadow == torch.bfloat16:
        end = end.to(shadow).to(param)  # else it would be cut off too
    for weight in ROUGH:
        got, expected = start.clone(), start.clone()
        fused_gpu.bind([got], [end], [0])([weight])
        reference.bind([expected], [end], [0])([weight])
        error = (got.double() - expected.double()).abs()
        assert (error <= ulp(shadow, start, end)).all(), weight


def test_a_parameter_is_rounded_to_the_dtype_of_the_shadow_first() -> None:
    shadow, param = torch.zeros(3, dtype=torch.float16), torch.full((3,), 1 + 0.75 * 2**-10)
    expected = shadow.lerp(param.half(), 0.75)
    assert not torch.equal(expected, shadow.float().lerp(param, 0.75).half())
    fused_gpu.bind([shadow], [param], [0])([0.75])
    assert torch.equal(shadow, expected)


@pytest.mark.parametrize("shifts", [(1, 0), (0, 1), (3, 5), (8, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_may_start_at_any_element(dtype: torch.dtype, shifts: tuple[int, int]) -> None:
    params = Guarded(SIZES, dtype, shifts[0], exact=True)
    shadows = Guarded(SIZES, torch.float32, shifts[1], exact=True)
    pairs = zip(shadows.tensors, params.tensors, strict=True)
    expected = [shadow.lerp(param.float(), 0.25) for shadow, param in pairs]
    fused_gpu.bind(shadows.tensors, params.tensors, [0] * len(SIZES))([0.25])
    for got, value in zip(shadows.tensors, expected, strict=True):
        assert torch.equal(got, value)
    shadows.check()


def test_only_whole_blocks_on_16_bytes_are_called_wide() -> None:
    for shift in range(9):
        param = Guarded([3 * B + 1], torch.bfloat16, shift, exact=True).tensors[0]
        shadow = Guarded([3 * B + 1], torch.float32, 2 * shift, exact=True).tensors[0]
        table = fused_gpu.rows([fused_gpu._Job(param, [shadow], [5])])
        aligned = param.data_ptr() % 16 == 0 and shadow.data_ptr() % 16 == 0
        assert table[:, 0].tolist() == [B, B, B, 1]
        assert table[:, 1].tolist() == [aligned, aligned, aligned, 0]
        assert table[:, 2].tolist() == [param.data_ptr() + 2 * B * i for i in range(4)]
        assert table[:, 3].tolist() == [shadow.data_ptr() + 4 * B * i for i in range(4)]
        assert table[:, 4].tolist() == [5] * 4
    assert aligned  # the last one was: both kinds were seen


def test_more_elements_than_32_bits_can_count() -> None:
    def far(start: int, numel: int, itemsize: int) -> Any:
        return SimpleNamespace(numel=lambda: numel, itemsize=itemsize, data_ptr=lambda: start)

    many = 2**32 + 3
    jobs = [
        fused_gpu._Job(far(2**46, many, 2), [far(2**45, many, 4)], [0]),
        fused_gpu._Job(far(2**44, 7, 2), [far(2**43, 7, 4)], [1]),
    ]
    table = fused_gpu.rows(jobs)
    assert table.dtype == torch.int64
    assert len(table) == 2**32 // B + 2
    assert table[-2].tolist() == [3, 0, 2**46 + 2**33, 2**45 + 2**34, 0]
    assert table[-1].tolist() == [7, 0, 2**44, 2**43, 1]
    assert table[:, 0].sum() == many + 7


def test_several_averages_take_one_read_of_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    numels = [B + 3, 5, 2 * B]
    params = Guarded(numels, torch.bfloat16, 0, exact=True)
    dtypes = [torch.float32, torch.float64, torch.bfloat16]
    averages = [Guarded(numels, dtype, 0, exact=True) for dtype in dtypes]
    slots = [2, 0, 1]
    weights = [0.25, 1.0, 0.75]
    shadows = [t for average in averages for t in average.tensors]
    each = [slot for slot in slots for _ in numels]
    expected = [
        t.lerp(p.to(t.dtype), weights[slot])
        for t, p, slot in zip(shadows, params.tensors * 3, each, strict=True)
    ]
    lerp_ = fused_gpu.bind(shadows, params.tensors * 3, each)
    seen = launches(monkeypatch)
    lerp_(weights)
    assert seen == [2 + 1 + 2]
    for got, value in zip(shadows, expected, strict=True):
        assert torch.equal(got, value)
    for average in averages:
        average.check()


def test_more_averages_than_a_program_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 2 * fused_gpu.MAX_AVERAGES + 1
    param = torch.randint(-31, 32, (B + 3,)) * 4.0
    shadows = [torch.zeros(B + 3) for _ in range(count)]
    weights = [i / 16 for i in range(count)]
    lerp_ = fused_gpu.bind(shadows, [param] * count, range(count))
    seen = launches(monkeypatch)
    lerp_(weights)
    assert seen == [4, 2]
    for shadow, weight in zip(shadows, weights, strict=True):
        assert torch.equal(shadow, torch.zeros(B + 3).lerp(param, weight))


def test_one_launch_for_any_number_of_tensors_of_a_pair_of_dtypes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = launches(monkeypatch)
    for count in (1, 50):
        params, shadows = [], []
        for dtype in (torch.float32, torch.bfloat16):
            for i in range(count):
                params.append(torch.ones(i % 5, dtype=dtype))
                shadows.append(torch.zeros(i % 5))
        params.append(torch.ones(3)[1:])  # one that starts on 4 bytes needs no launch of its own
        shadows.append(torch.zeros(2))
        lerp_ = fused_gpu.bind(shadows, params, [0] * len(params))
        seen.clear()
        lerp_([0.5])
        assert len(seen) == (2 if count > 1 else 1)
        assert all((shadow == 0.5).all() for shadow in shadows)


def test_weight_zero_writes_nothing_and_weight_one_copies_inf_and_nan() -> None:
    odd = [float("inf"), float("-inf"), float("nan"), 1.0, -0.0]
    for dtype in (torch.float32, torch.bfloat16):
        shadow = torch.tensor(odd * 5)
        param = torch.tensor([x for x in odd for _ in range(5)]).to(dtype)
        lerp_ = fused_gpu.bind([shadow], [param], [0])
        before = shadow.clone()
        lerp_([0.0])
        lerp_.launch()
        assert torch.equal(shadow.view(torch.int32), before.view(torch.int32))
        lerp_([1.0])
        assert torch.equal(shadow.view(torch.int32), param.float().view(torch.int32))


@pytest.mark.parametrize("weight", [1e-50, 1 - 1e-12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_and_one_are_what_the_weight_is_in_the_arithmetic(
    weight: float, dtype: torch.dtype
) -> None:
    start = torch.tensor([1.0, 2.0, float("inf"), 3.0], dtype=dtype)
    end = torch.tensor([float("inf"), 5.0, 1.0, float("nan")], dtype=dtype)
    got, expected = start.clone(), start.clone()
    fused_gpu.bind([got], [end], [0])([weight])
    reference.bind([expected], [end], [0])([weight])
    assert torch.equal(got.nan_to_num(123), expected.nan_to_num(123))
    copied = torch.equal(got.nan_to_num(123), (start if weight < 0.5 else end).nan_to_num(123))
    assert copied == (dtype == torch.float32)


def test_dense_pairs_of_any_strides_are_flat_stretches() -> None:
    last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for param in (torch.randn(5, 7).t(), last, torch.randn(9, 1).as_strided((9, 1), (1, 77))):
        shadow = torch.zeros_like(param)
        assert fused_gpu.supports(shadow, param)
        fused_gpu.bind([shadow], [param], [0])([1.0])
        assert torch.equal(shadow, param)


class Wrapped(Tensor):
    """What has its own dispatch may hold its numbers anywhere, as a DTensor does."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(func)


def test_pairs_that_lie_otherwise_are_refused() -> None:
    for shadow, param in (
        (torch.zeros(6, 5), torch.randn(6, 9)[:, ::2]),
        (torch.zeros(6, 9)[:, ::2], torch.randn(6, 9)[:, ::2]),
        (torch.zeros(5, 7), torch.randn(7, 5).t()),
        (torch.zeros(6, dtype=torch.int32), torch.ones(6)),
        (torch.zeros(6), torch.ones(6, dtype=torch.float8_e4m3fn)),
        (torch.zeros(6), torch.ones(2, 3)),
        (torch.zeros(6), torch.ones(6, device="meta")),
        (torch.zeros(6), torch.ones(6).as_subclass(Wrapped)),
        (torch.zeros(6), torch.ones(6).to_sparse()),
    ):
        assert not fused_gpu.supports(shadow, param)
        with pytest.raises(ValueError, match="fused: got a shadow of"):
            fused_gpu.bind([shadow], [param], [0])


def test_the_version_of_a_shadow_counts_its_updates() -> None:
    shadow, param = torch.zeros(5), torch.ones(5)
    lerp_ = fused_gpu.bind([shadow], [param], [0])
    before = shadow._version, param._version
    lerp_([0.5])
    assert (shadow._version - before[0], param._version - before[1]) == (1, 0)


def test_memory_that_a_parameter_had_is_kept() -> None:
    shadow, param = torch.zeros(5), torch.nn.Parameter(torch.ones(5))
    lerp_ = fused_gpu.bind([shadow], [param], [0])
    assert lerp_.kernel_names == ("fused",)
    param.data = torch.zeros(5)
    lerp_([1.0])
    assert shadow.tolist() == [1.0] * 5


def test_three_launches_after_a_refresh_each_equal_three_updates() -> None:
    torch.manual_seed(0)
    params = [torch.randn(B + 3), torch.randn(17)]
    eager = [torch.zeros(B + 3), torch.zeros(17)]
    replayed = [t.clone() for t in eager]
    lerp_ = fused_gpu.bind(eager, params, [0, 1])
    graph = fused_gpu.bind(replayed, params, [0, 1])
    for t in (1, 2, 3):
        weights = [1 - t / (9 + t), 1 - min(0.999, t / (1 + t))]
        lerp_(weights)
        graph.refresh(weights)
        graph.launch()
        for a, b in zip(eager, replayed, strict=True):
            assert torch.equal(a, b)
        for p in params:
            p.add_(0.1)
    assert not any(torch.equal(a, torch.zeros_like(a)) for a in eager)


def test_a_capture_takes_the_launch_and_never_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    shadow, param = torch.zeros(5), torch.ones(5)
    lerp_ = fused_gpu.bind([shadow], [param], [0])
    lerp_.refresh([0.25])
    monkeypatch.setattr(fused_gpu._Work, "_capturing", lambda self: True)
    lerp_([0.5])
    assert shadow.tolist() == [0.25] * 5
    with pytest.raises(RuntimeError, match="refresh before each replay, outside of it"):
        lerp_.refresh([0.5])


def test_an_ema_goes_on_by_replays_as_by_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(70, 60)
    rules = {"ramp": schedules.ramp(0.9999), "mixed": schedules.by_pattern({"bias": 0.5}, 0.9)}
    policies = dict.fromkeys(rules, ShadowPolicy())
    rules |= {"narrow": schedules.constant(0.9), "exact": schedules.constant(0.9)}
    policies |= {"narrow": ShadowPolicy(dtype=torch.bfloat16)}
    policies |= {"exact": ShadowPolicy(compensated=True)}
    eager, graph = (ShardedEMA(model, rules, shadow=policies) for _ in range(2))
    for ema in (eager, graph):
        ema.internal.updates.bind_kernel = fused_gpu.bind
        ema.internal.updates.rebind()
    with pytest.raises(RuntimeError, match="no graph has captured"):
        graph.before_replay()
    before = graph.full_state_dict("ramp")
    with monkeypatch.context() as capture:  # the launch of a capture does nothing
        capture.setattr(updates, "_capturing", lambda: True)
        capture.setattr(fused_gpu._Work, "_capturing", lambda self: True)
        capture.setattr(replays.Replays, "count", lambda self: None)
        graph.update()
    now = graph.full_state_dict("ramp")
    assert all(torch.equal(now[fqn], value) for fqn, value in before.items())
    assert graph.num_updates == 0
    for _ in range(3):
        with torch.no_grad():
            for param in model.parameters():
                param.add_(torch.randn_like(param))
        eager.update()
        graph.before_replay()
        graph.internal.updates.updater.launch()  # what the graph has recorded
        assert (graph.t, graph.num_updates) == (eager.t, eager.num_updates)
        for name in rules:
            got, expected = graph.full_state_dict(name), eager.full_state_dict(name)
            assert all(torch.equal(got[fqn], value) for fqn, value in expected.items())
    for _ in range(3):
        graph.internal.updates.updater.launch()
    for read in (graph.before_replay, graph.update, lambda: graph.full_state_dict("ramp")):
        with pytest.raises(RuntimeError, match="got 6 replays, expected at most 3, one after each"):
            read()
    graph.reset()
    graph.before_replay()
    graph.internal.updates.updater.launch()
    graph.full_state_dict("ramp")
    model.weight.data = model.weight.data.clone()
    for call in (graph.before_replay, graph.update):
        with pytest.raises(RuntimeError, match="capture again"):
            call()


class Stream:
    """Of a GPU: counts what is asked of it."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        self.waited: list[object] = []

    def record_event(self) -> object:
        return ("event of", self)

    def wait_event(self, event: object) -> None:
        self.waited.append(event)


def test_each_other_stream_waits_once_for_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """With counting fakes of streams and tensors: that a stream waits is a matter of the GPU."""
    first, *others = streams = [Stream() for _ in range(3)]
    current = [first]
    given: list[object] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    table = SimpleNamespace(is_cuda=True, device=first.device, record_stream=given.append)
    written = fused_gpu._Written([table, torch.zeros(2), table])  # type: ignore[list-item]
    for stream in (*streams, *streams):
        current.append(stream)
        written.wait()
    assert [stream.waited for stream in others] == [[("event of", first)]] * 2
    assert given == [others[0], others[0], others[1], others[1]]
    assert first.waited == []


def test_an_update_waits_for_the_tables_before_it_launches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shadow = torch.zeros(5)
    lerp_ = fused_gpu.bind([shadow], [torch.ones(5)], [0])
    seen: list[float] = []
    monkeypatch.setattr(fused_gpu._Written, "wait", lambda self: seen.append(float(shadow[0])))
    lerp_([0.5])
    lerp_.refresh([0.25])
    assert seen == [0.0, 0.5]


def test_what_cannot_be_captured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "_capturing", lambda: True)
    model = torch.nn.Linear(7, 6)
    for ema, text in (
        (ShardedEMA(model, 0.5, kernel="foreach"), "foreach cannot be captured"),
        (ShardedEMA(model, 0.5, shadow=ShadowPolicy(device="cpu")), "host_offload cannot be"),
        (ShardedEMA(model, 0.5, on_nonfinite="skip"), "on_nonfinite='skip'"),
    ):
        with pytest.raises(RuntimeError, match=text):
            ema.update()
        assert ema.num_updates == 0


def test_the_default_device_plays_no_part() -> None:
    shadow, param = torch.zeros(5), torch.ones(5)
    with torch.device("meta"):
        lerp_ = fused_gpu.bind([shadow], [param], [0])
        lerp_([0.5])
    assert shadow.tolist() == [0.5] * 5


def test_what_was_bound_is_freed_at_once() -> None:
    lerp_ = fused_gpu.bind([torch.zeros(5)], [torch.ones(5)], [0])
    lerp_([0.5])
    work = weakref.ref(lerp_.launch.__self__)  # type: ignore[attr-defined]
    gc.disable()
    try:
        del lerp_
        assert work() is None
    finally:
        gc.enable()


def test_nothing_bound_is_nothing_done(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = launches(monkeypatch)
    fused_gpu.bind([], [], [])([])
    fused_gpu.bind([torch.zeros(0)], [torch.zeros(0)], [0])([0.5])
    assert seen == []


def rounded(
    numel: int, param: torch.dtype, shift: int
) -> tuple[list[Tensor], list[Tensor], list[rounding.Rounding], Guarded]:
    """Two shadows of a parameter: rounded at random, and compensated."""
    given = Guarded([numel, numel], param, shift, exact=False)
    narrow = Guarded([numel], torch.bfloat16, 3 * shift, exact=True)
    wide = Guarded([numel], torch.float32, shift, exact=True)
    lost = torch.randint(-(1 << 15), 1 << 15, (numel,)).to(torch.int16)
    how = [rounding.Stochastic(2**64 - 5, 1, 77, (1,)), rounding.Compensated(lost)]
    return [narrow.tensors[0], wide.tensors[0]], given.tensors, how, narrow


@pytest.mark.parametrize("param", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0, 1])
def test_shadows_with_a_rounding_have_the_bits_of_the_reference(
    param: torch.dtype, shift: int
) -> None:
    for numel in (1, P + 1, B, B + 9):
        # products by these weights are exact: the interpreter rounds them
        for weight in (0.0, 0.25, 0.75, 1.0):
            results = []
            for bind in (fused_gpu.bind, reference.bind):
                torch.manual_seed(numel)
                shadows, params, how, around = rounded(numel, param, shift)
                bind(shadows, params, [0, 0], how)([weight, 5.0])
                around.check()
                results.append([*shadows, how[1].companion])  # type: ignore[union-attr]
            for got, expected in zip(*results, strict=True):
                assert torch.equal(got, expected), (numel, weight)
            assert not torch.equal(results[0][0].float(), torch.zeros(numel))


def test_boxes_have_the_random_numbers_of_their_places() -> None:
    shape = (9, 2 * B)
    full, param = torch.zeros(shape, dtype=torch.bfloat16), torch.randn(shape)
    key = rounding.tensor_key(0, "w")

    def bound(bind: Any, box: Box) -> Tensor:
        shadow, given = box.view(full).clone(), box.view(param).clone()
        how = rounding.Stochastic.of(key, 2, shape, box)
        bind([shadow], [given], [1], [how])([0.0, 0.25, 7.0])
        return shadow

    expected = bound(reference.bind, Box((0, 0), shape))
    for box in (Box((0, 0), (9, 100)), Box((2, 100), (7, B + 3)), Box((0, B + 103), (4, B - 103))):
        assert torch.equal(bound(fused_gpu.bind, box), box.view(expected)), box
    turned = torch.zeros(shape[::-1], dtype=torch.bfloat16).t()  # its places go on in steps
    how = rounding.Stochastic.of(key, 2, shape, Box((0, 0), shape))
    given = torch.empty(shape[::-1]).t().copy_(param)
    fused_gpu.bind([turned], [given], [1], [how])([0.0, 0.25, 7.0])
    assert torch.equal(turned, expected)


def test_infinite_and_nan_values_are_not_rounded() -> None:
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), 1e300, 0.0, -0.0])
    shadows = [torch.zeros(6, dtype=torch.bfloat16), torch.zeros(6)]
    lost = torch.full((6,), 9, dtype=torch.int16)
    how = [rounding.Stochastic(1, 1, 0, (1,)), rounding.Compensated(lost)]
    fused_gpu.bind(shadows, [values, values], [0, 0], how)([1.0, 1.0])
    for shadow in shadows:
        assert torch.equal(shadow.float().nan_to_num(7.0), values.float().nan_to_num(7.0))
    assert lost.tolist() == [0] * 6
