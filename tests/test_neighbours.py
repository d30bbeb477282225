"""Tensors that are neighbours in memory are seen as one; others never are."""

import torch
from torch import nn

from tinyllm.neighbours import (
    below_each_other,
    beside_each_other,
    in_known_rows,
    lay_below,
    with_empty,
)


def test_matrices_below_each_other():
    parameters = [nn.Parameter(torch.randn(rows, 4)) for rows in (3, 1, 5)]
    before = [p.detach().clone() for p in parameters]
    assert below_each_other(parameters) is None and below_each_other(parameters[:1]) is not None
    lay_below(parameters)
    joint = below_each_other(parameters)
    assert torch.equal(joint, torch.cat(before)) and not joint.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
    with torch.no_grad():
        parameters[1].fill_(7)
    assert (joint[3] == 7).all() and torch.equal(joint[:3], before[0])
    assert below_each_other(parameters[1:]).shape == (6, 4)
    assert below_each_other(parameters[::-1]) is None and below_each_other(parameters[::2]) is None
    parameters[1].data = parameters[1].data.clone()
    assert below_each_other(parameters) is None


def test_other_types_and_widths_are_no_neighbours():
    memory = torch.zeros(12)
    assert below_each_other([memory[:6].view(2, 3), memory[6:].view(3, 2)]) is None
    assert below_each_other([memory[:6].view(2, 3), memory[6:].view(2, 3).int()]) is None
    assert below_each_other([memory.view(4, 3)[:, :2], memory.view(4, 3)[:, :2]]) is None


def test_what_only_happens_to_follow_in_memory_is_no_neighbour():
    memory = bytearray(4 * 24)
    one, other = (
        torch.frombuffer(memory, dtype=torch.float32, count=12, offset=at) for at in (0, 48)
    )
    assert one.data_ptr() + 48 == other.data_ptr()
    assert below_each_other([one.view(3, 4), other.view(3, 4)]) is None
    parts = [one.view(1, 12), other.view(1, 12)]
    assert beside_each_other([p.as_strided((1, 12), (24, 1)) for p in parts]) is None


def test_parts_beside_each_other():
    whole = torch.randn(5, 20)
    parts = whole.split([8, 4, 8], 1)
    assert torch.equal(beside_each_other(parts), whole)
    heads = [parts[0].unflatten(1, (2, 4)), parts[1].unflatten(1, (1, 4)), parts[2]]
    assert torch.equal(beside_each_other(heads), whole)
    assert beside_each_other(parts[:2]) is None  # rows of the whole are wider
    assert beside_each_other(parts[::-1]) is None
    assert beside_each_other([p.contiguous() for p in parts]) is None
    assert beside_each_other([heads[0].transpose(1, 2), *heads[1:]]) is None
    assert torch.equal(beside_each_other([whole]), whole)


def test_empty_ones_lie_as_the_parts_do():
    columns = torch.zeros(3, 13, dtype=torch.bfloat16).split([8, 5], 1)
    parts = (columns[0].unflatten(1, (2, 4)), columns[1])
    same, found = with_empty(*parts)
    assert all(a is b for a, b in zip(same, parts, strict=True))
    assert beside_each_other(found).shape == (3, 13) and found[0].dtype == torch.bfloat16
    assert [p.shape for p in found] == [p.shape for p in parts]
    apart = in_known_rows(columns[1], columns[1])
    assert all(p.is_contiguous() for p in apart)
    assert all(p.is_contiguous() for both in with_empty(columns[1], columns[1]) for p in both)
    none = with_empty(*torch.zeros(0, 5).split([2, 3], 1))
    assert none[1][1].shape == (0, 3)
