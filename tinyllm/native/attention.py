"""``attention.c`` for tensors: attention within packed examples, for training on a CPU.

PyTorch's kernel wants examples side by side, in float32 (its backward pass in bfloat16 is slower), and
the rotary embedding done before it: a dozen copies and small operations a layer, more than the attention of short
examples itself.  The library is compiled at its first use; without a compiler :func:`library` gives None.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch.autograd.function import once_differentiable

from tinyllm.native import code
from tinyllm.neighbours import in_known_rows, with_empty

SOURCE = Path(__file__).with_name("attention.c")
HEADERS = code.headers_of(SOURCE, "tiles", "numbers", "vectors")
MOST_OF_A_HEAD = 256
LONG = 1024  # tokens of an example, from which on idle threads cost more than is gained


class Attention(ctypes.Structure):
    """``Attention`` of ``attention.c``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in
          ("q", "k", "v", "cos", "sin", "out", "most", "share", "grad", "dq", "dk", "dv", "starts")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in
          ("examples", "heads", "kv_heads", "size", "half", "q_row", "kv_row")),
    ]  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled code; None where it cannot be had."""
    call = [ctypes.POINTER(Attention)]
    return code.functions_of(
        SOURCE, HEADERS, {"attention_forward": call, "attention_backward": call}
    )


def takes_heads(size: int, angles: tuple[torch.Tensor, torch.Tensor]) -> bool:
    """Whether the code knows heads of this size, rotated by these cosines and sines: none in part."""
    return size <= MOST_OF_A_HEAD and size % 2 == 0 and all(t.shape[-1] == size for t in angles)


class PackedAttention(torch.autograd.Function):
    """Causal attention in which no packed example sees another (Vaswani et al. 2017, arXiv:1706.03762,
    section 3.2), of queries and keys that it rotates itself where angles are given.
    """

    @staticmethod
    def forward(ctx, q, k, v, cos, sin, starts, scale):
        """Attend.

        Args:
            q: ``(N, num_heads, head_dim)``.
            k: ``(N, num_key_value_heads, head_dim)``, as ``v``.  Where the three lie beside each other in
                memory, so do their gradients.
            cos: ``(N, head_dim)``, as ``sin``; both None for no rotation.
            starts: ``(num_examples + 1,)`` int32 on the CPU, where each example starts, and ``N``.

        Returns:
            ``(N, num_heads, head_dim)``.
        """
        q, k, v = in_known_rows(q, k, v)
        angles = () if cos is None else (cos.float().contiguous(), sin.float().contiguous())
        out = torch.empty(q.shape, dtype=q.dtype)
        found = torch.empty(2, q.shape[1], len(q), dtype=torch.float32)
        tensors = (q, k, v, found, starts, *angles)
        library().attention_forward(_call(tensors, scale, out=out))
        ctx.save_for_backward(*tensors)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        tensors = ctx.saved_tensors  # a checkpointed layer allows to ask once
        parts, grads = with_empty(*tensors[:3])
        tensors, grad = (*parts, *tensors[3:]), grad.contiguous()
        named = dict(zip(("dq", "dk", "dv"), grads, strict=True), grad=grad)
        library().attention_backward(_call(tensors, ctx.scale, **named))
        return *grads, None, None, None, None


def _call(tensors: tuple[torch.Tensor, ...], scale: float, **more: torch.Tensor) -> Attention:
    q, k, v, found, starts, *angles = tensors
    assert starts.dtype == torch.int32 and starts.is_contiguous() and found.is_contiguous()
    named = {"q": q, "k": k, "v": v, "most": found[0], "share": found[1], "starts": starts, **more}
    named |= dict(zip(("cos", "sin"), angles, strict=False))
    return Attention(
        scale=scale, examples=len(starts) - 1, heads=q.shape[1], kv_heads=k.shape[1],
        size=q.shape[2], half=int(q.dtype == torch.bfloat16), q_row=q.stride(0), kv_row=k.stride(0),
        **{name: tensor.data_ptr() for name, tensor in named.items()},
    )  # fmt: skip
