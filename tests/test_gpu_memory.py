"""The memory estimate against what PyTorch really keeps, on a small model."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_model

from tinyllm import gpu_memory
from tinyllm.errors import UserError
from tinyllm.lora import add_lora, count_parameters
from tinyllm.memory_model import SHAPES, Shape, Training, activations_per_token, flops_per_token
from tinyllm.memory_model import memory as memory_of
from tinyllm.settings import LoraSettings

SMALL = Shape("small", 64, 160, 3, 4, 2, 480, True)


def make_lora(layers: int, dtype: str, dropout: float, r: int = 8):
    model = make_model(hidden_size=64, intermediate_size=160, num_hidden_layers=layers)
    model.to(getattr(torch, dtype))
    return add_lora(model, LoraSettings(lora_r=r, lora_dropout=dropout, fast_lora=False)).train()


def kept_bytes(lora, ids: torch.Tensor) -> int:
    """Bytes that a forward pass through the decoder keeps for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in lora.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = lora.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activations_are_what_pytorch_keeps(dtype, dropout):
    ids = torch.arange(256).view(2, 128)
    more, fewer = (kept_bytes(make_lora(n, dtype, dropout), ids) for n in (3, 1))
    measured = (more - fewer) / 2 / ids.numel()
    how = Training(ids.numel(), r=8, dtype=dtype, dropout=dropout > 0, mask_bytes=4)
    assert activations_per_token(SMALL, how) == pytest.approx(measured, rel=0.15)


def test_weights_adapter_gradients_and_optimizer_are_counted_exactly():
    lora = make_lora(3, "bfloat16", 0.1)
    trained, _ = count_parameters(lora)
    base = sum(p.numel() for p in lora.parameters() if not p.requires_grad)
    assert (SMALL.parameters, SMALL.lora_parameters(8)) == (base, trained)
    parts = memory_of(SMALL, Training(64, r=8))
    assert parts["weights"] == 2 * base and parts["adapter"] == parts["gradients"] == 4 * trained
    parameters = [p for p in lora.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = [t for one in optimizer.state.values() for name, t in one.items() if name != "step"]
    assert parts["optimizer"] == sum(t.numel() * t.element_size() for t in state)


def test_stages_shard_what_they_say():
    def parts(stage, offload=False):
        return memory_of(SHAPES[2], Training(2048, gpus=8, stage=stage, offload=offload))

    plain, one, two, three = parts(None), parts(1), parts(2), parts(3)
    assert one["gradients"] == plain["gradients"] == 8 * two["gradients"]
    assert two["weights"] == plain["weights"] > 4 * three["weights"]
    assert two["optimizer"] == 1.5 * plain["optimizer"] / 8  # with the float32 copy
    assert parts(2, offload=True)["optimizer"] == 0
    assert parts(3, offload=True)["weights"] == 2 * 500e6
    assert one["activations"] == three["activations"] and plain["logits"] == three["logits"]
    # one process computes the loss in pieces
    assert memory_of(SHAPES[2], Training(2048))["logits"] < plain["logits"]


def test_published_sizes():
    sizes = [round(shape.parameters / 1e9, 2) for shape in SHAPES]
    assert sizes == [0.49, 1.54, 7.62]
    ratio = flops_per_token(SHAPES[2], Training(1)) / (4 * SHAPES[2].parameters)
    assert 0.9 < ratio < 1.1


def test_the_command(tmp_path, capsys):
    config = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
              "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 480,
              "tie_word_embeddings": True}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert gpu_memory.main(["--base", str(tmp_path), "--gpus", "2", "--utilisation", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert "| ZeRO-3 offload |" in printed and "logits" in printed and "assumed" in printed
    assert gpu_memory.shape_of(tmp_path).parameters == SMALL.parameters
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UserError, match="no hidden_size"):
        gpu_memory.main(["--base", str(tmp_path)])
    with pytest.raises(UserError, match="must be above 0"):
        gpu_memory.main(["--utilisation", "2"])
