"""A decoder layer as one node of autograd trains what the layer's own modules train."""

import pytest
import torch
from conftest import PROJECTIONS, make_fused_lora, make_model, skip_without_compiler
from torch import nn

from tinyllm.batches import model_inputs
from tinyllm.one_node import DecoderLayer


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """How often a layer has been one node."""
    skip_without_compiler()
    found, real = [], DecoderLayer.forward
    counted = staticmethod(lambda *of: found.append(1) or real(*of))
    monkeypatch.setattr(DecoderLayer, "forward", counted)
    return found


def make(joins=True, dtype=torch.float32, targets=PROJECTIONS, dropout=0.0, base=None):
    base = base or make_model(attention_bias=True)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": targets, "lora_dropout": dropout}
    return make_fused_lora(base.to(dtype), joins, **lora)


def step(model, seed=2):
    """Loss and gradients of one packed batch, with dropout drawn from the seed."""
    torch.manual_seed(0)
    lengths = torch.tensor([19, 1, 40, 4])
    ids = torch.randint(5, 480, (int(lengths.sum()),))
    batch = {"input_ids": ids, "labels": ids, "lengths": lengths}
    torch.manual_seed(seed)
    logits = model(**model_inputs(batch, packed_attention=True)).logits[0].float()
    loss = nn.functional.cross_entropy(logits, ids)
    model.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_equal(one, other, **close):
    torch.testing.assert_close(one[0], other[0], **close)
    assert one[1].keys() == other[1].keys()
    for name, grad in one[1].items():
        torch.testing.assert_close(grad, other[1][name], msg=lambda m, n=name: f"{n}: {m}", **close)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_those_of_the_modules(calls, dtype, dropout):
    expected = step(make(False, dtype, dropout=dropout))
    assert not calls
    found = step(make(True, dtype, dropout=dropout))
    assert len(calls) == 2
    close = {"atol": 1e-6, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 8e-2}
    assert_equal(found, expected, **close)


def test_steps_are_drawn_and_computed_alike_each_time(calls):
    model = make(dropout=0.3)
    assert_equal(step(model), step(model), rtol=0, atol=0)
    assert not torch.equal(step(model)[0], step(model, seed=3)[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_gradient_checkpointing(calls, reentrant):
    expected, model = step(make(dropout=0.3)), make(dropout=0.3)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls.clear()
    assert_equal(step(model), expected, atol=1e-6, rtol=1e-4)
    assert len(calls) == 4  # again for the backward pass


def test_saved_tensors_go_through_autograds_hooks():
    """What offloads or compresses them sees all of them, and may give back copies that lie otherwise."""
    model, seen = make(), []
    expected = step(model)

    def copy(tensor):
        seen.append(tensor.shape)
        return tensor.clone(memory_format=torch.contiguous_format)

    with torch.autograd.graph.saved_tensors_hooks(copy, lambda t: t):
        assert_equal(step(model), expected, atol=1e-6, rtol=1e-4)
    assert torch.Size([64, 64]) in seen and len(seen) > 2 * 20


def test_nothing_is_kept_after_the_backward_pass(monkeypatch):
    model, kept = make(), []
    real = DecoderLayer.forward

    def forward(ctx, *inputs):
        found = real(ctx, *inputs)
        kept.append(ctx)
        return found

    monkeypatch.setattr(DecoderLayer, "forward", staticmethod(forward))
    step(model)
    assert len(kept) == 2
    for ctx in kept:
        assert not ctx.steps.tensors
        assert not any(one.saved_tensors for one in ctx.steps.by_name.values())


def test_a_second_backward_pass_gives_the_same():
    model, ids = make(dropout=0.3), torch.randint(5, 480, (1, 20))
    inputs = {"input_ids": ids[0], "labels": ids[0], "lengths": torch.tensor([20])}
    loss = model(**model_inputs(inputs, packed_attention=True)).logits.float().pow(2).mean()
    trained = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, trained, retain_graph=True)
    assert all(
        torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, trained), strict=True)
    )


WHYS = ["targets", "hook", "backward hook", "disabled", "merged", "evaluated", "trained norm"]


@pytest.mark.parametrize("why", WHYS)
def test_what_is_not_plain_takes_the_modules_way(calls, why):
    if why == "targets":
        model, slow = make(targets=PROJECTIONS[:4]), make(False, targets=PROJECTIONS[:4])
    else:
        model, slow = make(), make(False)
    layers = model.get_base_model().model.layers
    seen = []
    if why == "hook":
        for layer in layers:
            layer.mlp.gate_proj.register_forward_hook(lambda *of: seen.append(1))
    if why == "backward hook":
        for layer in layers:
            layer.mlp.register_full_backward_hook(lambda *of: seen.append(1))
    if why == "trained norm":
        for one in (model, slow):
            for layer in one.get_base_model().model.layers:
                layer.input_layernorm.weight.requires_grad_()
    if why == "merged":
        model.merge_adapter(), slow.merge_adapter()
    if why == "evaluated":
        model.eval(), slow.eval()
    if why == "disabled":
        with model.disable_adapter(), slow.disable_adapter():
            losses = [m(input_ids=torch.arange(5, 20)[None]).logits for m in (model, slow)]
        torch.testing.assert_close(*losses)
    elif why == "merged":
        losses = [m(input_ids=torch.arange(5, 20)[None]).logits for m in (model, slow)]
        torch.testing.assert_close(*losses)
    else:
        assert_equal(step(model), step(slow), atol=1e-6, rtol=1e-4)
    assert not calls and len(seen) == (2 if "hook" in why else 0)


def test_a_replaced_weight_is_seen(calls):
    """A weight that is another tensor now lies elsewhere: the layers are no longer joined, nor stale."""
    model, slow = make(), make(False)
    for one in (model, slow):
        weight = one.get_base_model().model.layers[0].self_attn.k_proj.base_layer.weight
        weight.data = 2 * weight.data
    assert_equal(step(model), step(slow), atol=1e-6, rtol=1e-4)
    assert len(calls) == 1


def test_joined_weights_merge_and_save_as_their_own(tmp_path, calls):
    from transformers import AutoModelForCausalLM

    model, slow = make(), make(False)
    step(model)
    for one, name in ((model, "joined"), (slow, "separate")):
        one.eval().merge_and_unload().save_pretrained(tmp_path / name)
    one, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / n).state_dict()
        for n in ("joined", "separate")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
