"""Compiled attention gives what each packed example gives alone, in float64."""

import pytest
import torch
from conftest import make_model
from transformers import AutoModelForCausalLM, MistralConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tinyllm.attention import use_packed_attention
from tinyllm.batches import model_inputs
from tinyllm.fused_layers import use_fused_layers
from tinyllm.native import attention
from tinyllm.native.attention import PackedAttention

LENGTHS = [3, 40, 1, 17, 100, 16, 33]
CLOSE = {torch.float32: 3e-6, torch.bfloat16: 1e-2}  # of the whole tensor's size


def starts_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def make(heads, kv_heads, size, dtype, lengths):
    """Queries, keys, values, the angles' cosines and sines, and a gradient."""
    torch.manual_seed(0)
    q, k, v, grad = (
        torch.randn(sum(lengths), h, size).to(dtype) for h in (heads, kv_heads, kv_heads, heads)
    )
    positions = torch.cat([torch.arange(length) for length in lengths])
    angles = positions[:, None] * 100.0 ** -(torch.arange(size // 2) * 2 / size)
    angles = torch.cat([angles, angles], -1)
    return q, k, v, (1.1 * angles.cos()).to(dtype), (1.1 * angles.sin()).to(dtype), grad


def one_by_one(q, k, v, cos, sin, lengths, scale):
    """The same in float64 and in plain words."""
    if cos is not None:
        q, k = apply_rotary_pos_emb(q[None], k[None], cos[None], sin[None], unsqueeze_dim=2)
        q, k = q[0], k[0]
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    outputs = []
    for one_q, one_k, one_v in zip(*(t.split(lengths) for t in (q, k, v)), strict=True):
        scores = torch.einsum("ihd,jhd->hij", one_q, one_k) * scale
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hij,jhd->ihd", weights, one_v))
    return torch.cat(outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(6, 3, 64), (2, 2, 20), (4, 1, 8), (3, 1, 128), (1, 1, 2)]
)
@pytest.mark.parametrize("rotates", [True, False])
def test_outputs_and_gradients(processor, dtype, heads, kv_heads, size, rotates):
    q, k, v, cos, sin, grad = make(heads, kv_heads, size, dtype, LENGTHS)
    cos, sin = (cos, sin) if rotates else (None, None)
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    angles = [t if t is None else t.double() for t in (cos, sin)]
    found = PackedAttention.apply(*inputs, cos, sin, starts_of(LENGTHS), 0.3)
    expected = one_by_one(*exact, *angles, LENGTHS, 0.3)
    found.backward(grad)
    expected.backward(grad.double())
    pairs = [(found, expected), *((a.grad, b.grad) for a, b in zip(inputs, exact, strict=True))]
    for one, other in pairs:
        assert (one - other).norm() < CLOSE[dtype] * other.norm()


@pytest.mark.parametrize("offset", [0, 8])
def test_gradients_stay_exact_where_values_have_much_in_common(processor, offset):
    """The sum that is taken off each row of gradients is not made of rounded outputs."""
    q, k, v, _, _, grad = make(2, 2, 32, torch.bfloat16, [60])
    v = (v + offset * torch.randn(32)).bfloat16()
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    PackedAttention.apply(*inputs, None, None, starts_of([60]), 0.2).backward(grad)
    one_by_one(*exact, None, None, [60], 0.2).backward(grad.double())
    for a, b in zip(inputs, exact, strict=True):
        assert (a.grad - b.grad).norm() < 3e-3 * b.grad.norm()


def test_heads_that_lie_otherwise_in_memory(processor):
    q, k, v, cos, sin, _ = make(4, 2, 16, torch.float32, [5, 9])
    starts = starts_of([5, 9])
    expected = PackedAttention.apply(q, k, v, cos, sin, starts, 1.0)
    across = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v)]
    assert torch.equal(PackedAttention.apply(*across, cos, sin, starts, 1.0), expected)


def test_large_scores_do_not_overflow_and_broken_numbers_stay_broken(processor):
    q, k, v, *_ = make(2, 2, 16, torch.float32, [8])
    out = PackedAttention.apply(1e4 * q, k, v, None, None, starts_of([8]), 1.0)
    torch.testing.assert_close(
        out.double(), one_by_one(1e4 * q.double(), k.double(), v.double(), None, None, [8], 1.0)
    )
    infinite, nan = float("inf"), float("nan")
    for broken, value in ((q, nan), (k, nan), (v, nan), (q, infinite), (v, infinite)):
        kept = broken[3, 0, 5].clone()
        broken[3, 0, 5] = value
        out = PackedAttention.apply(q, k, v, None, None, starts_of([8]), 1.0)
        assert not out[3, 0].isfinite().all()
        broken[3, 0, 5] = kept


def test_sliding_windows_dropout_and_caches_take_transformers_way(monkeypatch):
    if attention.library() is None:
        pytest.skip("no C compiler")
    calls = []
    real = PackedAttention.forward
    counted = staticmethod(lambda *of: calls.append(1) or real(*of))
    monkeypatch.setattr(PackedAttention, "forward", counted)
    config = MistralConfig(
        vocab_size=480, hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=8,
    )  # fmt: skip
    windowed = AutoModelForCausalLM.from_config(config)
    dropping = make_model(attention_dropout=0.5).train()
    plain = make_model()
    for model in (windowed, dropping, plain):
        assert use_packed_attention(model) and use_fused_layers(model)
    for lengths, expected in (([4, 9], 0), ([4, 8], 1)):
        windowed(**batch_of(lengths))
        assert len(calls) == expected
    calls.clear()
    dropping(**batch_of([5]))
    plain.generate(torch.randint(5, 480, (1, 4)), max_new_tokens=3, do_sample=False)
    assert not calls
    plain(**batch_of([5]))
    assert len(calls) == 2
    monkeypatch.setattr(attention, "LONG", 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    plain(**batch_of([9, 2]))  # 2 examples, 2 heads: four tasks for five threads
    assert len(calls) == 2


@pytest.mark.parametrize("why", ["autocast", "float16"])
def test_what_it_does_not_take_is_not_projected_twice(why):
    if attention.library() is None:
        pytest.skip("no C compiler")
    model = make_model()
    assert use_packed_attention(model) and use_fused_layers(model)
    model, calls = (model.half() if why == "float16" else model), []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *of: calls.append(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        model(**batch_of([5]))
    assert len(calls) == 1


def batch_of(lengths):
    ids = torch.randint(5, 480, (sum(lengths),))
    batch = {"input_ids": ids, "labels": ids, "lengths": torch.tensor(lengths)}
    return model_inputs(batch, packed_attention=True)
