"""Weights in fewer bytes are the same weights, for every vector width that the kernel knows."""

import ctypes
import shutil

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tinyllm.decode import kernel
from tinyllm.decode.compact import FLOATS, HALVES, PACKED, Compact, pack
from tinyllm.decode.row import RowDecoder


def opened(stored, lanes: int) -> torch.Tensor:
    """What `pack` made as float32 ``(out, in)``, by the description in its module alone."""
    rows = stored.weight.shape[0]
    groups = stored.weight.int().view(rows, -1, 3, 4 * lanes)
    codes = torch.cat([groups[:, :, 2:] & 15, groups[:, :, 2:] >> 4], dim=2)
    rest, table = groups[:, :, :2], stored.table.int()
    exponent = table[0][codes] << 1 | table[1][codes] >> 7
    bits = (rest & 0x80) << 8 | exponent << 7 | rest & 0x7F
    # byte 16 q + 8 a + 2 d + b of a vector is float 4 q + d of the vector of floats 2 a + b
    bits = bits.view(rows, -1, 2, lanes // 4, 2, 4, 2).permute(0, 1, 2, 4, 6, 3, 5)
    values = (bits << 16).reshape(rows, -1).contiguous().view(torch.float32).clone()
    for row, column, value in stored.strays.tolist():
        assert values[row, column] == 0
        values[row, column] = torch.tensor(value, dtype=torch.int32).view(torch.float32)
    return values


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("scale", [1e-6, 0.02, 300.0])
def test_packing_loses_nothing(lanes, scale):
    torch.manual_seed(0)
    half = (torch.randn(37, 256) * scale).bfloat16()
    half[3, 5], half[4], half[5, :2] = 0.0, half[4] * 2.0**-30, torch.tensor([-0.0, 1e-39])
    half[6:9, 0] = torch.tensor([3e38, -(2.0**-126), 2.0**-133])
    half[4, 4:] = half[9, 4:]
    stored = pack(half, lanes)
    assert stored.kind == PACKED and stored.weight.nbytes == half.nbytes * 3 // 4
    assert 0 < len(stored.strays) < 40
    assert torch.equal(opened(stored, lanes).view(torch.int32), half.float().view(torch.int32))


def test_what_does_not_fit_is_not_packed():
    assert pack(torch.randn(4, 120).bfloat16(), 16) is None
    scattered = torch.randn(64, 128) * 2.0 ** torch.randint(-40, 40, (64, 128))
    assert pack(scattered.bfloat16(), 16) is None
    compact = Compact(16, packs=True)
    assert compact.of(scattered.bfloat16().float()).kind == HALVES
    assert compact.of(torch.randn(4, 128)).kind == FLOATS
    assert Compact(16, packs=False).of(torch.ones(4, 128)).kind == HALVES


def compiled_for(flags: str, folder, monkeypatch) -> ctypes.CDLL:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    monkeypatch.setenv("CC", f"{compiler} {flags}".strip())
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    if (library := kernel.load()) is None:
        pytest.skip(f"the compiler does not take {flags}")
    return library


@pytest.mark.parametrize("flags", ["", "-mno-avx512f", "-mno-avx2 -mno-avx512f"])
@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("hidden", [256, 80, 72])
def test_the_kernel_reads_every_form(flags, packs, hidden, tmp_path, monkeypatch):
    library = compiled_for(flags, tmp_path, monkeypatch)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=500, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=4, head_dim=32, initializer_range=0.05, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16().float().eval()
    for linear in (m for m in model.modules() if isinstance(m, nn.Linear)):
        linear.weight.data[:4, 0] = torch.tensor([2.0**-40, -(2.0**-35), 0.0, 2.0**-60])
        linear.weight.data[7, 1] = 3.0
    compact = Compact(library.lanes(), packs and bool(library.packs()))
    reader = RowDecoder(library, model, None, compact, 64)
    ids = [(7 + 31 * at) % 500 for at in range(11)]
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    for start, end in ((0, 9), (9, 10), (10, 11)):
        found = reader.read(ids[start:end], start)[0]
        torch.testing.assert_close(found, expected[end - 1], rtol=1e-4, atol=1e-4)
    kinds = {stored.kind for _, stored in compact.copies.values()}
    if hidden == 256:
        assert kinds == {PACKED if packs and library.packs() else HALVES}
