"""Tensor subclasses, such as those of quantization and float8 training, and their values.

A subclass that wraps other tensors has no storage of its own. `values_of` finds the plain tensor
with its values, which is averaged. A subclass without one is opaque: it is never averaged. So are
sparse, MKL-DNN and quantized tensors, such as the adjacency matrix of a graph in a buffer.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_PRECISE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# attributes that a subclass caches and can recompute from its values
_CACHES = {"_precomputed_scale"}


def values_of(tensor: Tensor) -> Tensor | None:
    """The plain tensor that holds the values of ``tensor``, None if there is none.

    A subclass that wraps others (``torch.Tensor._make_wrapper_subclass``) has no storage of its
    own. If its ``__tensor_flatten__`` declares a single tensor of the same shape and dtype, as for
    weights of float8 training, that tensor holds its values; quantized tensors have none.
    """
    kind = type(tensor)
    if tensor.layout != torch.strided or tensor.is_quantized:
        return None
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
    """Address of the values of ``tensor``; 0 if it has none."""
    if type(tensor) in _PLAIN:
        return tensor.data_ptr()
    values = values_of(tensor)
    return 0 if values is None else values.data_ptr()


def kind_of(tensor: Tensor) -> str:
    """The qualified name of a tensor's type, and its layout if not strided; `Shard.opaque`."""
    name = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
    if tensor.is_quantized:
        return f"{name} of dtype {tensor.dtype}"
    return name if tensor.layout == torch.strided else f"{name} of layout {tensor.layout}"


def mark_wrapped(tensors: Iterable[Tensor]) -> None:
    """Bumps the versions of wrapper subclasses whose values were written; clears their caches."""
    for tensor in tensors:
        if type(tensor) not in _PLAIN and values_of(tensor) is not None:
            torch.autograd.graph.increment_version(tensor)
            for name in _CACHES & set(vars(tensor)):
                setattr(tensor, name, None)
