"""Reads a SentencePiece ``tokenizer.model`` without the sentencepiece package.

The file is a protobuf message.  Of its fields (numbers from sentencepiece_model.proto) only these
matter here:

    1  piece            1 text, 2 score (float), 3 type (1 normal, 4 defined by a user, ...)
    2  trainer_spec     3 model type (2 is BPE), 35 byte fallback
    3  normalizer_spec  2 charsmap, 3 dummy prefix, 4 remove extra spaces, 5 escape spaces
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tinyllm.errors import UserError

NORMAL, USER_DEFINED = 1, 4
BPE = 2
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its place in the list."""

    text: str
    score: float = 0.0
    kind: int = NORMAL


@dataclass
class SentencePieceModel:
    """What a ``tokenizer.model`` says; ``trainer`` and ``normalizer`` are fields by number."""

    pieces: list[Piece] = field(default_factory=list)
    trainer: dict[int, int | bytes] = field(default_factory=dict)
    normalizer: dict[int, int | bytes] = field(default_factory=dict)


def read_model(path: Path) -> SentencePieceModel:
    """Read a SentencePiece model.

    Raises:
        UserError: the file cannot be read, or is no SentencePiece model.
    """
    model = SentencePieceModel()
    try:
        for number, value in fields(path.read_bytes()):
            if number == 1:
                model.pieces.append(_piece(dict(fields(value))))
            elif number in (2, 3):
                (model.trainer if number == 2 else model.normalizer).update(fields(value))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, IndexError, KeyError, struct.error) as error:
        raise UserError(f"{path}: damaged, or no SentencePiece model; copy it again") from error
    if not model.pieces:
        raise UserError(f"{path}: a SentencePiece model without pieces; copy it again")
    return model


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of one protobuf message, in order: ``(number, integer or raw bytes)``."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, at = _varint(message, at)
        elif wire in (FIXED32, FIXED64, BYTES):
            size = {FIXED32: 4, FIXED64: 8}.get(wire)
            if size is None:
                size, at = _varint(message, at)
            value, at = message[at : at + size], at + size
            if at > len(message):
                raise ValueError("cut short")
        else:
            raise ValueError(f"wire type {wire}")
        yield number, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Decode a variable-length integer: ``(value, position behind it)``."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at


def _piece(parts: dict) -> Piece:
    score = struct.unpack("<f", parts[2])[0] if 2 in parts else 0.0
    return Piece(parts[1].decode("utf-8"), score, parts.get(3, NORMAL))
