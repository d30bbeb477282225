"""A decoder whose layers follow each other without modules between, and whose last one goes only where
something is learned, trains what transformers' own forward trains.
"""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from conftest import PROJECTIONS, make_fused_lora, make_model, skip_without_compiler
from torch import nn

from tinyllm import fast_lora, fused_model
from tinyllm.batches import model_inputs, targets
from tinyllm.fused_layers import pack_projections
from tinyllm.fused_model import FusedModel, KnownParts, parts_stay
from tinyllm.head_loss import frozen_head_loss
from tinyllm.one_node import DecoderLayer


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    """Of each layer that was one node the positions to keep, or None."""
    skip_without_compiler()
    found, real = [], DecoderLayer.forward

    def forward(ctx, x, parts, *adapters):
        found.append(parts.keep)
        return real(ctx, x, parts, *adapters)

    monkeypatch.setattr(DecoderLayer, "forward", staticmethod(forward))
    return found


def make(dtype=torch.float32, dropout=0.0, **shape):
    base = make_model(attention_bias=True, **shape).to(dtype)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS, "lora_dropout": dropout}
    return make_fused_lora(base, True, **lora)


def batch(lengths=(19, 1, 40, 5), learned=3):
    """Examples of which the last ids are learned."""
    torch.manual_seed(0)
    ids = torch.randint(5, 480, (sum(lengths),))
    parts = ids.clone().split(list(lengths))
    for part in parts:
        part[: max(1, len(part) - learned)] = -100
    return {"input_ids": ids, "labels": torch.cat(parts), "lengths": torch.tensor(lengths)}


def loss_of(model, given):
    inputs = model_inputs(given, packed_attention=True)
    return frozen_head_loss(model.get_base_model(), inputs, *targets(given))


def step(model, given=None, seed=2):
    """Loss and gradients, with dropout drawn from the seed."""
    given = given or batch()
    torch.manual_seed(seed)
    loss = loss_of(model, given)
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


def by_modules(model):
    """The same model through transformers' forward and each module's own."""
    slow = copy.deepcopy(model)
    for layer in decoder_of(slow).layers:
        layer.mlp.register_forward_hook(lambda *of: None)
    return slow


def decoder_of(model):
    return model.get_base_model().model


def assert_close(found, expected, dtype=torch.float32):
    """Of the whole tensor's size: in bfloat16 a hidden state is rounded a dozen times."""
    most = 1e-5 if dtype == torch.float32 else 0.1
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= most * other.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("strips", [False, True])
def test_loss_and_gradients_are_those_of_the_modules(kept, monkeypatch, dtype, packs, strips):
    if not strips:
        monkeypatch.setattr(fast_lora, "in_strips", lambda weights: False)
    model = make(dtype)
    expected = step(by_modules(model))
    assert not kept
    if packs:
        pack_projections(model)
    assert_close(step(model), expected, dtype)
    first, last = kept
    assert first is None and torch.equal(last, targets(batch())[0])


def test_all_positions_have_the_states_that_some_have(kept):
    model = make(dropout=0.0)
    inputs, some = model_inputs(batch(), packed_attention=True), torch.tensor([60, 3, 18, 19])
    decoder = decoder_of(model)
    everything = decoder(**inputs).last_hidden_state
    assert kept == [None, None]
    found = decoder(**inputs, keep=some).last_hidden_state
    torch.testing.assert_close(found, everything[:, some])
    torch.testing.assert_close(by_modules(model).get_base_model().model(**inputs)[0], everything)


def test_where_nothing_is_learned_the_loss_is_nothing(kept):
    model, given = make(), batch(learned=0)
    given["labels"][:] = -100
    found = step(model, given)
    assert kept == [None, None]
    assert all(not one.any() for one in found if one is not None)


def test_dropout_is_drawn_from_the_generator(kept):
    model = make(dropout=0.3)
    assert_close(step(model), step(model))
    assert not torch.equal(step(model)[0], step(model, seed=3)[0])


def test_examples_do_not_see_each_other(kept):
    """Also with gradients that come only from some positions of some examples."""
    model, alone = make(), []
    given = batch()
    together = step(model, given)
    for ids, labels in zip(
        *(given[n].split([19, 1, 40, 5]) for n in ("input_ids", "labels")), strict=True
    ):
        one = {"input_ids": ids, "labels": labels, "lengths": torch.tensor([len(ids)])}
        if len(targets(one)[0]):
            alone.append(step(model, one))
    assert_close(together, [sum(parts) for parts in zip(*alone, strict=True)])


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_gradient_checkpointing(kept, reentrant):
    expected, model = step(make(dropout=0.3)), make(dropout=0.3)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    kept.clear()
    assert_close(step(model), expected)
    assert [keep is None for keep in kept] == [True, False, False, True]  # and again for gradients


WAYS = ["hook on a layer", "other forward", "evaluated", "asked for more", "configured", "cache",
        "other layer", "no positions"]  # fmt: skip


class Wrapped(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.gradient_checkpointing = layer, False

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


@pytest.mark.parametrize("why", WAYS)
def test_what_is_not_plain_goes_through_transformers(kept, why):
    model, more = make(), {}
    decoder, seen = decoder_of(model), []
    if why == "hook on a layer":
        decoder.layers[1].register_forward_hook(lambda *of: seen.append(1))
    if why == "other forward":
        real = decoder.layers[1].forward
        decoder.layers[1].forward = lambda *of, **more: seen.append(1) or real(*of, **more)
    if why == "evaluated":
        model.eval()
    if why == "asked for more":
        more = {"output_hidden_states": True}
    if why == "configured":
        model.config.output_hidden_states = True
    if why == "cache":
        more = {"use_cache": True}
    if why == "other layer":
        decoder.layers[1] = Wrapped(decoder.layers[1])
    given = batch()
    inputs = model_inputs(given, packed_attention=True) | more
    some = targets(given)[0]
    if why == "no positions":
        given["lengths"] = torch.tensor([65])
        inputs = model_inputs(given, packed_attention=True)
        del inputs["position_ids"]
    found = decoder(**inputs, keep=some)
    assert found.last_hidden_state.shape == (1, len(some), 32)
    assert all(keep is None for keep in kept)
    assert bool(seen) == (why in WAYS[:2])
    if why in ("asked for more", "configured"):
        assert len(found.hidden_states) == 3
    expected = decoder_of(make())(**model_inputs(given, packed_attention=True), keep=some)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize("plain", [True, False])
def test_ids_are_embedded_once(kept, plain):
    model, seen = make(), []
    decoder = decoder_of(model)
    decoder.embed_tokens.register_forward_hook(lambda *of: seen.append(1))
    if not plain:
        decoder.layers[0].mlp.act_fn.register_forward_hook(lambda *of: None)
    step(model)
    assert len(seen) == 1 and len(kept) == (2 if plain else 1)


def test_parts_are_looked_up_once_and_numbers_are_those_of_now(kept, monkeypatch):
    looked, real = [], fused_model.has_hooks
    monkeypatch.setattr(fused_model, "has_hooks", lambda one: looked.append(1) or real(one))
    model = make(torch.bfloat16)
    pack_projections(model)
    with parts_stay(model.get_base_model()):
        before = step(model)
        assert len(looked) == 2
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(0.5)
        after = step(model)
        assert len(looked) == 2
    expected = step(model)
    assert_close(after, expected, torch.bfloat16)
    assert len(looked) == 4 and not torch.equal(before[0], after[0])
    assert decoder_of(model).known is None


def test_longer_examples_and_evaluations_look_anew(kept):
    model = make()
    decoder = decoder_of(model)
    with parts_stay(model.get_base_model()):
        step(model, batch((5, 9)))
        assert decoder.known.longest == 9
        step(model, batch((5, 30)))
        assert decoder.known.longest == 30
        model.eval()
        with torch.no_grad(), model.disable_adapter():
            loss_of(model, batch())
        assert not decoder.known.layers
        for layer in decoder.layers:
            layer.mlp.gate_proj.register_forward_hook(lambda *of: None)
        model.train()
        kept.clear()
        step(model)
        assert not kept and not decoder.known.layers


def test_they_are_forgotten_however_it_ends_and_not_copied():
    model = make()
    with pytest.raises(KeyError), parts_stay(model.get_base_model()):
        step(model)
        assert decoder_of(copy.deepcopy(model)).known is None
        raise KeyError
    assert decoder_of(model).known is None
    assert pickle.loads(pickle.dumps(KnownParts())) is None


def test_other_models_are_left_alone():
    other = SimpleNamespace(base_model=nn.Linear(2, 2))
    with parts_stay(other):
        assert not isinstance(other.base_model, FusedModel)


def test_a_callback_of_somebody_else_may_change_the_model():
    class Mine:
        pass

    class Theirs:
        pass

    Mine.__module__, Theirs.__module__ = "tinyllm.saving", "notebook"
    model = make()
    for callbacks, stays in (([Mine()], True), ([Mine(), Theirs()], False)):
        with parts_stay(model.get_base_model(), callbacks):
            assert (decoder_of(model).known is not None) == stays
