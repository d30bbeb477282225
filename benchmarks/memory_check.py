"""Is the estimate of ``python -m tinyllm.gpu_memory`` right?  Peak memory of real steps, on the CPU.

    python benchmarks/memory_check.py

Three random llamas, each in a process of its own: build, two steps as one process of several would
make them (peft's layers, all logits at once), and the growth of the resident memory against the
estimate.  A CPU shows what is kept; CUDA's context and its allocator's blocks it does not show.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MIB = 2**20
# (shape, tokens): weights, activations and logits in different proportions
# every tensor is mapped by itself, so that a freed one leaves the resident memory at once
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
CASES = ["deep", "wide vocabulary", "long"]


def cases():
    """``{name: (shape, training)}``."""
    from tinyllm.memory_model import Shape, Training

    small = Shape("small", 384, 1024, 8, 6, 6, 4000, True)
    how = Training(1024, r=16, dtype="float32", gpus=2, mask_bytes=4)
    return {
        "deep": (replace(small, num_hidden_layers=16), how),
        "wide vocabulary": (replace(small, vocab_size=32_000), how),
        "long": (small, replace(how, tokens=3072)),
    }


def resident(name: str) -> int:
    """A line of ``/proc/self/status`` in bytes: VmRSS now, VmHWM at most."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(text.split(f"{name}:")[1].split()[0]) * 1024


def steps(shape, how) -> None:
    """Build and train two steps."""
    import torch
    import torch.nn.functional as F
    from transformers import LlamaConfig, LlamaForCausalLM

    from tinyllm.lora import add_lora
    from tinyllm.settings import LoraSettings

    config = LlamaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size, num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads, tie_word_embeddings=True,
        max_position_embeddings=how.tokens,
    )  # fmt: skip
    lora = LoraSettings(lora_r=how.r, fast_lora=False)
    model = add_lora(LlamaForCausalLM(config), lora).train()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    ids = torch.randint(0, shape.vocab_size, (how.tokens // 256, 256))
    for _ in range(2):
        logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        loss = F.cross_entropy(logits.float(), ids.flatten())
        del logits
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def child(name: str) -> None:
    """Measure one case: print its growth in bytes."""
    shape, how = cases()[name]
    tiny = replace(shape, num_hidden_layers=1, vocab_size=64, hidden_size=48, intermediate_size=64)
    steps(tiny, replace(how, tokens=256))  # libraries and thread pools are there before the count
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    steps(shape, how)
    print(resident("VmHWM") - before)


def main() -> int:
    if len(sys.argv) == 2:
        child(sys.argv[1])
        return 0
    from tinyllm.memory_model import memory

    print("| case | estimated MiB | measured MiB | measured / estimated |\n|---|---|---|---|")
    for name in CASES:
        done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True,
                              check=True, env=os.environ | GIVE_BACK)  # fmt: skip
        measured = int(done.stdout.split()[-1]) / MIB
        estimated = sum(memory(*cases()[name]).values()) / MIB
        print(f"| {name} | {estimated:,.0f} | {measured:,.0f} | {measured / estimated:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
