"""Tensors that are neighbours in memory, seen as the one tensor that they are parts of.

Where several layers read the same input, one product does for all of them if their weights lie below
each other.  What comes out lies beside each other, and if its gradients do, too, they are not copied.
Whether they do is looked up in the tensors themselves, so that nothing goes stale when one is replaced.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def below_each_other(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """``(a + b, n)`` of matrices ``(a, n)`` and ``(b, n)`` in one storage; None if they are elsewhere."""
    first, rows, end = tensors[0], 0, tensors[0].storage_offset()
    for tensor in tensors:
        if not (_same_kind(tensor, first) and tensor.is_contiguous()):
            return None
        if tensor.shape[1:] != first.shape[1:] or tensor.storage_offset() != end:
            return None
        rows, end = rows + len(tensor), end + tensor.numel()
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def beside_each_other(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """``(N, a + b)`` of parts ``(N, a)`` and ``(N, b)``, or more dimensions that make ``a`` and ``b``, in
    one storage; None if they are elsewhere.
    """
    first, end = tensors[0], tensors[0].storage_offset()
    total = sum(tensor.shape[1:].numel() for tensor in tensors)
    for tensor in tensors:
        width = tensor.shape[1:].numel()
        if not _same_kind(tensor, first) or len(tensor) != len(first):
            return None
        if tensor.stride() != (total, *_dense(tensor.shape[1:])) or tensor.storage_offset() != end:
            return None
        end += width
    return first.detach().as_strided((len(first), total), (total, 1))


def in_known_rows(*parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The parts as they are where they lie :func:`beside_each_other`, else contiguous."""
    return parts if beside_each_other(parts) is not None else tuple(p.contiguous() for p in parts)


def with_empty(*parts: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor]]:
    """The parts :func:`in_known_rows`, and empty tensors that lie as they do."""
    joint = beside_each_other(parts)
    if joint is None:
        parts = tuple(part.contiguous() for part in parts)
        return parts, [torch.empty_like(part) for part in parts]
    columns = torch.empty_like(joint).split_with_sizes([p.shape[1:].numel() for p in parts], 1)
    return parts, [one.view(part.shape) for one, part in zip(columns, parts, strict=True)]


def lay_below(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Move matrices ``(a, n)`` and ``(b, n)`` below each other into one storage."""
    joint = torch.cat([p.data for p in parameters])
    for parameter, part in zip(parameters, joint.split([len(p) for p in parameters]), strict=True):
        parameter.data = part


def _same_kind(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.device == other.device
        and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    )


def _dense(shape: torch.Size) -> tuple[int, ...]:
    """The strides of a contiguous tensor of this shape."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= size
    return tuple(strides)
