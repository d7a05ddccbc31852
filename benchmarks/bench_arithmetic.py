"""How exact an average is: after noisy updates, and how near it comes to a constant target.

::

    python benchmarks/bench_arithmetic.py

Averages of the same weights, with the same decays, side by side, against one in float64: those of
each `ShadowPolicy`, by the library's own kernel, and the forms of an update that others have. A
library stands for the form that has all of its bits in `ALIKE` updates. Everything is relative to
the exact average, element by element. A turn is a third of the elements, with weights of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

import rivals
from harness import (
    Table,
    Target,
    arguments,
    attempt,
    clock,
    finish,
    leave,
    number,
    ratio,
    short,
    world,
)
from models import local
from shardema import ShadowPolicy, ShardedEMA
from shardema.kernels import fused, rounding

DECAYS = (0.999, 0.9999, 0.99999)
PARTS = ["speed", "noise", "constant"]
NOISE = 0.01  # standard deviation of the weights, relative to their mean
TURNS = 3
ALIKE = 300
OURS = {
    "shardema": ShadowPolicy(),
    "shardema_compensated": ShadowPolicy(compensated=True),
    "shardema_bfloat16": ShadowPolicy(dtype=torch.bfloat16),
}
TARGETS = (
    Target("shardema_compensated", "noise .*", "max_error", most=1e-7),
    Target("shardema_compensated", "constant 0.9999? .*", "max_error", most=1e-7),
    Target("shardema_bfloat16", "update .*", "time_to_float32", most=2),
    Target("shardema_compensated", "update .*", "time_to_float32", most=2.5),
)

# ---- the updates of others ----------------------------------------------------------------------

Form = Callable[[Tensor, Tensor, float], object]


def _lerp(average: Tensor, weights: Tensor, decay: float) -> object:
    return average.lerp_(weights.to(average.dtype), 1 - decay)


def _mul_add(average: Tensor, weights: Tensor, decay: float) -> object:
    return average.mul_(decay).add_(weights, alpha=1 - decay)


def _two_products(average: Tensor, weights: Tensor, decay: float) -> object:
    return average.copy_(decay * average + (1 - decay) * weights)


def _difference(average: Tensor, weights: Tensor, decay: float) -> object:
    return average.sub_((1 - decay) * (average - weights))


FORMS: dict[str, Form] = {
    "lerp": _lerp,
    "mul_add": _mul_add,
    "two_products": _two_products,
    "difference": _difference,
}
KEPT = [(name, torch.float32) for name in FORMS] + [("lerp", torch.bfloat16)]


@torch.no_grad()
def form_of(build: rivals.Build, dtype: torch.dtype) -> str:
    """The form that has the bits of a library.

    Raises:
        ValueError: there is none.
    """
    model = nn.Linear(64, 1, bias=False, dtype=dtype)
    average, generator = build(model), torch.Generator().manual_seed(0)
    for _ in range(2):  # some copy at first
        average.update()
    (weights,) = model.parameters()
    (start,) = (local(one).detach().clone().view(1, -1) for one in average.read())
    states = {name: start.clone() for name in FORMS}
    for _ in range(ALIKE):
        weights.add_(torch.randn(weights.shape, generator=generator).to(dtype) * NOISE)
        average.update()
        for name, form in FORMS.items():
            form(states[name], weights, rivals.DECAY)
    (end,) = (local(one).view(1, -1) for one in average.read())
    found = [name for name, state in states.items() if torch.equal(state, end)]
    if not found:
        raise ValueError(f"no form has its bits after {ALIKE} updates")
    return found[0]


# ---- averages side by side ----------------------------------------------------------------------


class Side:
    """Averages of one tensor of weights, one for each decay: [decays, elements].

    Attributes:
        exact: in float64.
    """

    def __init__(self, weights: Tensor, start: Tensor) -> None:
        rows = start.float().expand(len(DECAYS), -1)
        self.weights, self.exact = weights, rows.double().clone()
        self._ours = {
            name: rows.clone().to(policy.dtype_for(weights.dtype)) for name, policy in OURS.items()
        }
        lost = torch.zeros(rows.shape, dtype=torch.int16)
        shadows, slots, how = [], [], []
        for k in range(len(DECAYS)):
            place = rounding.Stochastic(rounding.tensor_key(0, f"{k}"), len(DECAYS), 0, (1,))
            kinds = {"compensated": rounding.Compensated(lost[k]), "bfloat16": place}
            for name, average in [*self._ours.items(), ("exact", self.exact)]:
                shadows.append(average[k])
                slots.append(k)
                how.append(kinds.get(name.removeprefix("shardema_")))
        self._lerp_ = fused.bind(shadows, [weights] * len(slots), slots, how)
        self._forms = {key: [start.to(key[1], copy=True) for _ in DECAYS] for key in KEPT}
        self._last = {
            (key, k): torch.full_like(start, torch.nan) for key in KEPT for k in range(len(DECAYS))
        }

    def update(self, n: int) -> None:
        """Update number ``n`` of all averages."""
        self._lerp_([*(1 - decay for decay in DECAYS), float(n)])
        for key, k in self._last:
            FORMS[key[0]](self._forms[key][k], self.weights, DECAYS[k])

    def drop_fixed(self) -> None:
        """Leaves out the averages that a constant target does not change any more."""
        for key, k in list(self._last):
            if torch.equal(self._last[key, k].to(self._forms[key][k].dtype), self._forms[key][k]):
                del self._last[key, k]
            else:
                self._last[key, k] = self._forms[key][k].clone()

    def read(self, k: int) -> dict[str, Tensor]:
        """The averages of a decay in float64, by provider."""
        found = {name: average[k].double() for name, average in self._ours.items()}
        for (name, dtype), averages in self._forms.items():
            found[f"{name}_{str(dtype).removeprefix('torch.')}"] = averages[k].double()
        return found


def drawn(elements: int, generator: torch.Generator) -> Tensor:
    """Mean weights, between 0.5 and 2 in size, of either sign: [TURNS * elements]."""
    sizes = 0.5 + 1.5 * torch.rand(TURNS * elements, generator=generator)
    signs = torch.randint(0, 2, sizes.shape, generator=generator) * 2 - 1
    return sizes * signs


@torch.no_grad()
def noisy(table: Table, args: argparse.Namespace, dtype: torch.dtype, names: Names) -> None:
    """Weights that vary around a mean; the averages begin with the first of them."""
    generator = torch.Generator().manual_seed(0)
    mean = drawn(args.elements, generator)
    weights, noise = mean.to(dtype, copy=True), torch.empty_like(mean)
    side = Side(weights, weights)
    for n in range(1, args.updates + 1):
        noise.normal_(generator=generator)
        weights.copy_(torch.addcmul(mean, mean, noise, value=NOISE))
        side.update(n)
    for k, decay in enumerate(DECAYS):
        case = f"noise {decay} {names.of(dtype)} {short(args.updates)} updates"
        _add(table, case, side.read(k), side.exact[k], names)


@torch.no_grad()
def constant(table: Table, args: argparse.Namespace, names: Names) -> None:
    """Constant weights; the averages begin with 0."""
    target = drawn(args.elements, torch.Generator().manual_seed(0))
    side = Side(target, torch.zeros_like(target))
    for n in range(1, args.target_updates + 1):
        side.update(n)
        if n % 1000 == 0:
            side.drop_fixed()
    for k, decay in enumerate(DECAYS):
        case = f"constant {decay} {short(args.target_updates)} updates"
        _add(table, case, {"exact": side.exact[k], **side.read(k)}, target.double(), names)


class Names:
    """The libraries that stand for each form."""

    def __init__(self, table: Table, dtype: torch.dtype) -> None:
        self._stands: dict[str, list[str]] = {}
        for name, build in rivals.OTHERS.items():
            found, why = attempt(lambda build=build: form_of(build, dtype))
            if found is None:
                table.lacks(name, f"form of {self.of(dtype)} weights", why)
                continue
            # torchtitan's average has the dtype of the weights
            own = dtype if name == "lerp_torchtitan" else torch.float32
            key = f"{found}_{str(own).removeprefix('torch.')}"
            self._stands.setdefault(key, []).append(name)

    @staticmethod
    def of(dtype: torch.dtype) -> str:
        return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]

    def providers(self, form: str) -> Iterator[str]:
        """The form itself, and what has its bits."""
        yield form
        yield from self._stands.get(form, [])


def _add(
    table: Table, case: str, averages: dict[str, Tensor], expected: Tensor, names: Names
) -> None:
    for form, average in averages.items():
        error = ((average - expected) / expected).view(TURNS, -1)
        bias, largest = error.mean(1).tolist(), error.abs().amax(1).tolist()
        for provider in names.providers(form):
            table.add(provider, case, "bias", "relative", bias)
            table.add(provider, case, "max_error", "relative", largest)


def speed(table: Table, args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Time of an update of one large tensor under each policy, by the default kernel."""
    model = nn.Linear(1024, args.numel // 1024, bias=False, dtype=dtype)
    kept = {name: ShardedEMA(model, 0.999, shadow=policy) for name, policy in OURS.items()}
    times = clock({name: ema.update for name, ema in kept.items()}, args.repeats)
    case = f"update {short(args.numel)} {Names.of(dtype)} weights"
    for name, seconds in times.items():
        table.add(name, case, "time", "ms", [s * 1000 for s in seconds])
        if name != "shardema":
            table.add(name, case, "time_to_float32", "ratio", ratio(seconds, times["shardema"]))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments("arithmetic", __doc__, repeats=9)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--dtypes", nargs="+", choices=rivals.DTYPES, default=[*rivals.DTYPES])
    parser.add_argument("--updates", type=int, default=200_000, help="with noise")
    parser.add_argument("--target-updates", type=int, default=1_000_000, help="towards a constant")
    parser.add_argument("--elements", type=int, default=256, help="of each of the three turns")
    parser.add_argument("--numel", type=number, default=16 << 20, help="of the timed update")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, appends the rows, and returns the exit code."""
    args = parse(argv)
    with world():
        table = Table()
        for dtype in map(rivals.DTYPES.__getitem__, args.dtypes):
            if "speed" in args.parts:
                speed(table, args, dtype)
            names = Names(table, dtype)
            if "noise" in args.parts:
                noisy(table, args, dtype, names)
            if "constant" in args.parts and dtype == torch.float32:
                constant(table, args, names)
        return finish(table, args, TARGETS)


if __name__ == "__main__":
    leave(main())
