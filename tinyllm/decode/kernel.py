"""``row.c`` and its structures, as ctypes sees them."""

from __future__ import annotations

import ctypes
from pathlib import Path

from tinyllm.native import code

SOURCE = Path(__file__).with_name("row.c")
HEADERS = (SOURCE.with_name("row_math.h"), Path(code.__file__).with_name("vectors.h"))


class Matrix(ctypes.Structure):
    """``Matrix`` of ``row_math.h``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "table")),
        *((name, ctypes.c_int32) for name in ("in_", "out", "kind")),
    ]


class Linear(ctypes.Structure):
    """``Linear`` of ``row.c``."""

    _fields_ = [
        ("w", Matrix),
        *((name, ctypes.c_void_p) for name in ("strays", "bias", "a", "b")),
        *((name, ctypes.c_int32) for name in ("num_strays", "rank")),
        ("scale", ctypes.c_float),
    ]


class Layer(ctypes.Structure):
    """``Layer`` of ``row.c``."""

    _fields_ = [
        ("attention_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        *((name, Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    ]


class Model(ctypes.Structure):
    """``Model`` of ``row.c``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("embedding", "norm", "cos", "sin", "layers", "scratch")),
        ("head", Linear),
        *((name, ctypes.c_int32) for name in
          ("num_layers", "hidden", "inner", "heads", "kv_heads", "dim", "context", "threads")),
        ("eps", ctypes.c_float),
    ]  # fmt: skip


def load() -> ctypes.CDLL | None:
    """The library, ready to call; None where it cannot be had."""
    library = code.load(SOURCE, *HEADERS)
    if library is None:
        return None
    library.lanes.restype = library.packs.restype = ctypes.c_int32
    library.scratch_size.argtypes = [ctypes.POINTER(Model)]
    library.scratch_size.restype = ctypes.c_int64
    library.forward.argtypes = [
        ctypes.POINTER(Model), ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p,
    ]  # fmt: skip
    library.forward.restype = None
    return library
