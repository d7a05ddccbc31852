"""Tensor subclasses, as quantisation and float8 training make them: where their values are.

A subclass that wraps other tensors has no memory of its own. `values_of` finds the plain tensor
with its values, which is averaged. A subclass without one is opaque: it is never averaged.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_PRECISE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# what a subclass keeps beside its values and makes anew from them
_CACHES = {"_precomputed_scale"}


def values_of(tensor: Tensor) -> Tensor | None:
    """The plain tensor that holds the values of ``tensor``, None where there is none.

    A tensor subclass that wraps others (``torch.Tensor._make_wrapper_subclass``) has no memory of
    its own. Where it declares by ``__tensor_flatten__`` that it is one tensor of its own shape and
    dtype, as weights of float8 training are, that one is its value; what is quantised has none.
    """
    kind = type(tensor)
    if kind in _PLAIN:
        return tensor.detach()
    if kind.__torch_dispatch__ is Tensor.__torch_dispatch__:
        return tensor.detach().as_subclass(Tensor)
    if not hasattr(tensor, "__tensor_flatten__"):
        return None
    names, _ = tensor.__tensor_flatten__()
    inner = [getattr(tensor, name) for name in names if name not in _CACHES]
    if len(inner) != 1 or type(inner[0]) not in _PLAIN:
        return None
    same = inner[0].shape == tensor.shape and inner[0].dtype == tensor.dtype
    return inner[0].detach() if same and tensor.dtype in _PRECISE else None


def pointer(tensor: Tensor) -> int:
    """Where the values of ``tensor`` lie; 0 where it has none."""
    if type(tensor) in _PLAIN:
        return tensor.data_ptr()
    values = values_of(tensor)
    return 0 if values is None else values.data_ptr()


def kind_of(tensor: Tensor) -> str:
    """The name of a tensor's type, as `Shard.opaque` has it."""
    return f"{type(tensor).__module__}.{type(tensor).__qualname__}"


def mark_wrapped(tensors: Iterable[Tensor]) -> None:
    """Tells the wrappers among ``tensors`` that the values inside of them were written."""
    for tensor in tensors:
        if type(tensor) not in _PLAIN and values_of(tensor) is not None:
            torch.autograd.graph.increment_version(tensor)
            for name in _CACHES & set(vars(tensor)):
                setattr(tensor, name, None)
