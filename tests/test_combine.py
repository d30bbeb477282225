"""Weighted sums of adapters: exact, or refused where peft would make something else of them."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from test_generate_engines import make_lora

from tinyllm.combine import combine_adapters
from tinyllm.decode.pick import EngineMaker
from tinyllm.errors import UserError


def add_to(model, name: str, seed: int = 9, **changes):
    """One more adapter with an effect."""
    torch.manual_seed(seed)
    config = {"r": 4, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.5} | changes
    model.add_adapter(name, LoraConfig(**config))
    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            if f"lora_B.{name}" in parameter:
                weight.normal_(std=0.3)
    return model.eval()


NOT_POSSIBLE = {
    "DoRA": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["norm"]},
    "lora_bias": {"lora_bias": True},
    "biases": {"bias": "lora_only"},
    "a base of its own": {"init_lora_weights": "pissa"},
    "another kind": {"alora_invocation_tokens": [3]},
}


@pytest.mark.parametrize("what", NOT_POSSIBLE)
def test_adapters_of_which_peft_would_lose_a_part_are_refused(what):
    model = add_to(make_lora(), "odd", **NOT_POSSIBLE[what])
    for weights in ({"default": 0.5, "odd": 0.5}, {"odd": 0.5, "default": 0.5}):
        with pytest.raises(UserError, match=rf"^odd: .*{what}"):
            combine_adapters(model, weights, "sum")
    assert "sum" not in model.peft_config


def test_ranks_decide_which_combination_fits():
    model = make_lora()  # ranks 3 and 4
    parts = {"default": 0.5, "other": 0.5}
    with pytest.raises(UserError, match=r"same r value.*; cat takes different ranks"):
        combine_adapters(model, parts, "sum", "linear")
    assert "sum" not in model.peft_config
    for kind, rank in (("cat", 7), ("svd", 4)):
        combine_adapters(model, parts, kind, kind)
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        assert layer.lora_A[kind].weight.shape[0] == rank
    u, sizes, v = torch.linalg.svd(layer.get_delta_weight("cat"), full_matrices=False)
    closest = (u[:, :4] * sizes[:4]) @ v[:4]  # Eckart and Young
    torch.testing.assert_close(layer.get_delta_weight("svd"), closest, atol=1e-5, rtol=1e-5)
    add_to(model, "third")
    combine_adapters(model, {"other": 0.5, "third": 0.5}, "linear", "linear")
    assert not any(m.training for m in model.modules())


def test_rslora_patterns_and_dropout_do_not_bend_a_sum():
    """peft would scale the sum once more by sqrt(r), and keep the first adapter's dropout."""
    model = make_lora()
    add_to(model, "rs", use_rslora=True, lora_alpha=6, rank_pattern={"q_proj": 2})
    add_to(model, "odd", 10, init_lora_weights="orthogonal", alpha_pattern={"down_proj": 7})
    own = model.peft_config["rs"]
    parts = {"rs": 0.6, "default": -1.5, "odd": 0.2}
    combine_adapters(model, parts, "sum")
    assert model.peft_config["rs"] is own and own.use_rslora
    checked = 0
    for layer in model.get_base_model().modules():
        if "sum" in getattr(layer, "lora_A", {}):
            expected = sum(w * layer.get_delta_weight(n) for n, w in parts.items() if n in layer.lora_A)  # fmt: skip
            torch.testing.assert_close(
                layer.get_delta_weight("sum"), expected, atol=1e-5, rtol=1e-5
            )
            checked += 1
    assert checked == 14 and isinstance(layer_dropout(model), torch.nn.Identity)


def layer_dropout(model):
    return model.get_base_model().model.layers[0].self_attn.q_proj.lora_dropout["sum"]


def test_layers_that_peft_would_leave_out_are_named():
    model = add_to(make_lora(), "first", target_modules=["q_proj"], layers_to_transform=[0])
    with pytest.raises(UserError, match=r"leaves out 2 layers .*model\.layers\.1\.mlp\.down_proj"):
        combine_adapters(model, {"first": 0.5, "other": 0.5}, "sum")
    assert "sum" not in model.peft_config
    combine_adapters(model, {"other": 0.5, "first": 0.5}, "sum")


def test_a_rank_beyond_the_kernels_buffer_is_computed_by_torch():
    from tinyllm.decode import kernel
    from tinyllm.decode.row import MAX_RANK, fits_kernel

    assert f"#define MAX_RANK {MAX_RANK}" in kernel.SOURCE.read_text(encoding="utf-8")
    model = add_to(make_lora(), "large", r=MAX_RANK // 2 + 1)
    add_to(model, "larger", 11, r=MAX_RANK // 2 + 1)
    combine_adapters(model, {"large": 0.01, "larger": 0.02}, "sum")
    maker = EngineMaker(model, "fast", kernel.load)
    assert fits_kernel(maker.plain, "large") and not fits_kernel(maker.plain, "sum")
    assert maker.engine("sum").why.startswith("by torch calls")


def test_the_sum_is_as_exact_on_a_bfloat16_base_and_the_mode_stays():
    model = make_lora()
    model.get_base_model().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    parts = {"default": 0.7, "other": -0.3}
    model.train()
    combine_adapters(model, parts, "sum")
    assert model.training
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.lora_A["sum"].weight.dtype == torch.float32
    expected = sum(weight * layer.get_delta_weight(name) for name, weight in parts.items())
    torch.testing.assert_close(layer.get_delta_weight("sum"), expected, atol=1e-6, rtol=1e-5)
