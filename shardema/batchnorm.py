"""BatchNorm statistics for an average: the model's running statistics belong to its raw weights.

::

    each rank's batches -forward with the average-> inputs of every BatchNorm layer
    inputs -> count, mean, squared deviations  (this rank's)  -pooled over the ranks-> Statistics
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from shardema.backends.tree import unwrap, walk, wrapped_child
from shardema.devices import double
from shardema.ema import ShardedEMA
from shardema.errors import ArgumentError, ArgumentTypeError, abbreviate, logger
from shardema.ranks.agree import Ranks
from shardema.scopes import to_the_end, uninterrupted, writable

log = logger(__name__)


@dataclass(frozen=True)
class Statistics:
    """Mean and variance of each BatchNorm layer of an averaged model; returned by `update_bn`.

    Args:
        layers: ``(layer, mean [channels], variance [channels])``, in float64.
    """

    layers: Sequence[tuple[_BatchNorm, Tensor, Tensor]]

    @contextlib.contextmanager
    def swap(self) -> Iterator[None]:
        """Context manager: the model has these statistics inside the block. Local.

        When the block ends, the model's own statistics are restored bitwise, also if a forward in
        train mode changed them. ``with ema.swap(), statistics.swap():`` to evaluate the average,
        ``with statistics.swap():`` around `ShardedEMA.export`, ``full_state_dict`` or ``save``.
        """
        with _restored_buffers([layer for layer, _, _ in self.layers]):
            with writable():
                for layer, mean, variance in self.layers:
                    assert layer.running_mean is not None
                    assert layer.running_var is not None
                    layer.running_mean.copy_(mean)
                    layer.running_var.copy_(variance)
            yield


@dataclass
class _Moments:
    """Count, mean and squared deviations of a layer's inputs, per channel, in float64."""

    count: float = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64, device="cpu"))
    squares: Tensor = field(
        default_factory=lambda: torch.zeros((), dtype=torch.float64, device="cpu")
    )

    def add(self, inputs: Tensor) -> None:
        """Adds a batch [n, channels, ...]: Chan, Golub and LeVeque 1983, equations 2.1."""
        count = inputs.numel() / inputs.shape[1] if inputs.shape[1] else 0
        if not count:
            return
        wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        others = [dim for dim in range(wide.ndim) if dim != 1]
        variance, mean = map(double, torch.var_mean(wide, others, correction=0))
        self.mean, self.squares = self.mean.to(mean.device), self.squares.to(mean.device)
        apart = mean - self.mean
        total = self.count + count
        self.squares = (
            self.squares + variance * count + apart.square() * (self.count * count / total)
        )
        self.mean = self.mean + apart * (count / total)
        self.count = total


def update_bn(
    loader: Iterable[Any], model: nn.Module, ema: ShardedEMA, name: str | None = None
) -> Statistics:
    """Measures the BatchNorm statistics of an average, over the data of all ranks. Collective.

    The running statistics of a model belong to its raw weights. This runs forwards with the
    average, in train mode and without gradients, and computes for each layer the mean and the
    unbiased variance of all its inputs on all ranks, as if they were one sample::

        n = sum n_i,  mean = sum n_i mean_i / n
        variance = (sum n_i variance_i + sum n_i (mean_i - mean)^2) / (n - 1)

    (the law of total variance over batches i, ``variance_i`` without correction, sums in
    float64). torch.optim.swa_utils.update_bn averages the batches' variances instead, which omits
    the variance of their means, and covers one rank only.

    The model is unchanged afterwards, statistics included; apply the result where the average is
    used::

        statistics = update_bn(loader, model, ema)
        with ema.swap(), statistics.swap():
            evaluate(model)
        with statistics.swap():
            ema.export("run/export")

    Args:
        loader: this rank's part of the data: tensors, tuples or lists whose first element is the
            input, or mappings that are passed as keywords. Copied to the device of the first
            layer. A sharded model (FSDP, ZeRO-3) needs the same number of batches on each rank.
        model: the model that the EMA was built for.
        ema: the EMA.
        name: which average; None if there is only one.

    Returns:
        The statistics of every layer that has running statistics and received data. Empty for a
        model without such layers; the loader is not read then.

    Raises:
        ValueError: another model than the EMA's; layers that differ between ranks; no data on any
            rank; no average of this name; or the EMA averages the running statistics.
        TypeError: a batch of another type.
        RuntimeError: inside ``swap()``.
        RankError: a rank did not make the call within the timeout.

    Modules that are not BatchNorm run in train mode too (dropout draws random numbers); their
    buffers and all modes are restored.

    Example:
        >>> import torch
        >>> model = torch.nn.BatchNorm1d(1)
        >>> ema = ShardedEMA(model, 0.9)
        >>> batches = [torch.tensor([[1.0], [2.0]]), torch.tensor([[5.0], [8.0]])]
        >>> statistics = update_bn(batches, model, ema)
        >>> with statistics.swap():
        ...     print(model.running_mean.item(), model.running_var.item())
        4.0 10.0
        >>> print(model.running_mean.item(), model.running_var.item())
        0.0 1.0
    """
    calls, averages = ema.internal.calls, ema.internal.averages
    ranks, weights = averages.ranks, averages.weights
    layers: dict[str, _BatchNorm] = {}
    same: dict[str, Any] = {}

    def look() -> list[tuple[str, int]]:
        calls.check_allowed("update_bn")
        same.update(name=averages.named(name).name, **averages.clocks())
        if not any(unwrap(model) is unwrap(known) for known in weights.models):
            raise ArgumentError("update_bn: got a model that the EMA was not built for")
        layers.update(_layers(model))
        averaged = [fqn for fqn in layers if f"{fqn}.running_mean".lstrip(".") in weights.averaged]
        if averaged:
            raise ArgumentError(
                f"update_bn: {abbreviate(averaged)}: the running statistics are averaged, so "
                "what is measured would not be used; build the EMA with "
                'buffers={"*running_*": "copy", "*": "average"}, or without buffers='
            )
        return [(fqn, layer.num_features) for fqn, layer in layers.items()]

    ranks.agree("update_bn", look, _check_same, same=same)
    if not layers:
        log.info("update_bn: no BatchNorm layer keeps running statistics: nothing to measure")
        return Statistics(())
    moments = {fqn: _Moments() for fqn in layers}
    with _restored_buffers(list(model.modules())), _restored_modes(model), ema.swap(name):
        ranks.agree("update_bn (forwards)", lambda: _measure(loader, model, layers, moments))
    pooled = _pool(layers, moments, ranks)
    if not pooled:
        raise ArgumentError(
            "update_bn: the loader yielded no data on any rank; expected one batch or more"
        )
    return Statistics(tuple((layers[fqn], *values) for fqn, values in pooled.items()))


def _layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers with running statistics, by name, each once."""
    found: dict[int, tuple[str, _BatchNorm]] = {}
    for prefix, module in walk(model):
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            found.setdefault(id(module), (prefix.removesuffix("."), module))
    return dict(found.values())


def _check_same(found: list[Any]) -> None:
    if any(layers != found[0] for layers in found):
        raise ArgumentError(
            "update_bn: the ranks hold different BatchNorm layers (pipeline stages, or different "
            "models), whose inputs cannot be pooled"
        )


@contextlib.contextmanager
def _restored_buffers(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Restores the modules' own buffers when the block ends, bitwise."""
    with writable():
        buffers = [
            (module, name, tensor, tensor.clone())
            for module in modules
            for name, tensor in module._buffers.items()
            if tensor is not None
        ]

    def restore() -> None:
        for module, name, tensor, value in buffers:
            tensor.copy_(value)
            module._buffers[name] = tensor

    interrupt = None
    try:
        yield
    finally:
        with uninterrupted(), writable():
            interrupt = to_the_end(restore)
    if interrupt is not None:
        raise interrupt


@contextlib.contextmanager
def _restored_modes(model: nn.Module) -> Iterator[None]:
    """Restores the training mode of each module when the block ends."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _measure(
    loader: Iterable[Any],
    model: nn.Module,
    layers: Mapping[str, _BatchNorm],
    moments: Mapping[str, _Moments],
) -> None:
    """Runs this rank's batches and adds each layer's inputs to its moments."""
    model.train()
    # DDP would broadcast buffers in each forward, and so wait for ranks that have fewer batches;
    # FSDP's wrapper gathers the weights and must stay
    while (inner := wrapped_child(model)) not in (None, "_fsdp_wrapped_module"):
        assert inner is not None
        model = model.get_submodule(inner)
    device = _device(layers)

    def hook(key: str) -> Any:
        return lambda layer, inputs: moments[key].add(inputs[0])

    hooks = [layer.register_forward_pre_hook(hook(fqn)) for fqn, layer in layers.items()]
    try:
        with writable(), _eager():
            for batch in loader:
                _forward(model, batch, device)
    finally:
        for handle in hooks:
            handle.remove()


def _eager() -> contextlib.AbstractContextManager[Any]:
    """Disables compiled code, which does not call hooks registered after its compilation."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes seconds
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _device(layers: Mapping[str, _BatchNorm]) -> torch.device:
    """The device of the first layer."""
    mean = next(iter(layers.values())).running_mean
    assert mean is not None
    return mean.device


def _forward(model: nn.Module, batch: Any, device: torch.device) -> None:
    if isinstance(batch, Mapping):
        model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
        return
    inputs = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(inputs, Tensor):
        raise ArgumentTypeError(
            f"update_bn: got a batch of type {type(batch).__name__}, expected a tensor, a tuple or "
            "list that begins with one, or a mapping"
        )
    model(inputs.to(device))


def _pool(
    layers: Mapping[str, _BatchNorm], moments: Mapping[str, _Moments], ranks: Ranks
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and unbiased variance over all ranks of each layer that has data. Collective."""
    sizes = [layer.num_features for layer in layers.values()]
    own = [moments[fqn] for fqn in layers]
    device = _device(layers)
    if ranks.size > 1:
        device = ranks.transport(device.type)
    counts = torch.tensor([m.count for m in own], dtype=torch.float64, device=device)
    means = torch.cat([m.mean.to(device).expand(n) for m, n in zip(own, sizes, strict=True)])
    squares = torch.cat([m.squares.to(device).expand(n) for m, n in zip(own, sizes, strict=True)])

    repeats = torch.tensor(sizes, device=device)
    here = counts.repeat_interleave(repeats)
    totals = _sum(counts, ranks)
    everywhere = totals.repeat_interleave(repeats)
    mean = _sum(here * means, ranks) / everywhere
    # a rank without data contributes zero, also if the mean is infinite
    spread = torch.where(here > 0, squares + here * (means - mean).square(), 0)
    variance = _sum(spread, ranks) / (everywhere - 1)
    pairs = zip(torch.split(mean, sizes), torch.split(variance, sizes), strict=True)
    reached = totals.tolist()
    return {fqn: p for fqn, p, n in zip(layers, pairs, reached, strict=True) if n > 0}


def _sum(values: Tensor, ranks: Ranks) -> Tensor:
    total = values.clone()

    def move() -> None:
        dist.all_reduce(total, group=ranks.group())

    if ranks.size > 1:
        ranks.transfer("update_bn", move, total.device)
    return total
