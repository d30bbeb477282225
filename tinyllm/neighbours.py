"""Tensors that are neighbours in memory, seen as the one tensor that they are parts of.

Where several layers read the same input, one product does for all of them if their weights lie below
each other.  What comes out lies beside each other, and if its gradients do, too, they are not copied.
Whether they do is looked up in the tensors themselves, so that nothing goes stale when one is replaced.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def below_each_other(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """``(a + b, n)`` of matrices ``(a, n)`` and ``(b, n)`` in one storage; None if they are elsewhere."""
    first, rows = tensors[0], 0
    dtype, rest, place, size = first.dtype, first.shape[1:], first.data_ptr(), first.element_size()
    for tensor in tensors:
        if tensor.dtype != dtype or tensor.shape[1:] != rest or tensor.data_ptr() != place:
            return None
        if not tensor.is_contiguous():
            return None
        rows, place = rows + tensor.shape[0], place + tensor.numel() * size
    return _within_storage(first, (rows, *rest), _dense((rows, *rest)))


def beside_each_other(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """``(N, a + b)`` of parts ``(N, a)`` and ``(N, b)``, or more dimensions that make ``a`` and ``b``, in
    one storage; None if they are elsewhere.
    """
    first, shapes = tensors[0], [tensor.shape for tensor in tensors]
    widths = [math.prod(shape[1:]) for shape in shapes]
    dtype, total, place, size = first.dtype, sum(widths), first.data_ptr(), first.element_size()
    for tensor, shape, width in zip(tensors, shapes, widths, strict=True):
        if tensor.dtype != dtype or shape[0] != shapes[0][0] or tensor.data_ptr() != place:
            return None
        if tensor.stride() != (total, *_dense(shape[1:])):
            return None
        place += width * size
    return _within_storage(first, (shapes[0][0], total), (total, 1))


def _within_storage(
    first: torch.Tensor, shape: tuple[int, ...], stride: tuple[int, ...]
) -> torch.Tensor | None:
    """A wider view of the storage that ``first`` is in; None if that ends before.  What has its memory
    there is a part of it, since no two allocations overlap.
    """
    end = first.storage_offset() + math.prod(shape)
    if end * first.element_size() > first.untyped_storage().nbytes():
        return None
    return first.detach().as_strided(shape, stride)


def in_known_rows(*parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The parts as they are where they lie :func:`beside_each_other`, else contiguous."""
    return parts if beside_each_other(parts) is not None else tuple(p.contiguous() for p in parts)


def with_empty(*parts: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor]]:
    """The parts :func:`in_known_rows`, and empty tensors that lie as they do."""
    joint = beside_each_other(parts)
    if joint is None:
        parts = tuple(part.contiguous() for part in parts)
        return parts, [torch.empty_like(part) for part in parts]
    columns = torch.empty_like(joint).split_with_sizes([math.prod(p.shape[1:]) for p in parts], 1)
    return parts, [one.view(part.shape) for one, part in zip(columns, parts, strict=True)]


def lay_below(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Move matrices ``(a, n)`` and ``(b, n)`` below each other into one storage."""
    joint = torch.cat([p.data for p in parameters])
    for parameter, part in zip(parameters, joint.split([len(p) for p in parameters]), strict=True):
        parameter.data = part


def _dense(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor of this shape."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= size
    return tuple(strides)
