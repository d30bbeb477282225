"""The README.md of an exported folder: what it is made of, and how well the merge went."""

from __future__ import annotations

from pathlib import Path

from tinyllm.certificate import summary

KNOWN = {
    True: "The base is the one that the adapter was trained on.",
    False: "The base is **not** the one that the adapter was trained on; the merge was forced.",
    None: "The adapter carries no fingerprint of its base: names and shapes fit.",
}


def merged_card(certificate: dict, target: Path) -> str:
    """Markdown of a merged Hugging Face folder's card, from its certificate."""
    return f"""{_head(certificate, target, "transformers")}
## Use

```bash
python inference_lora.py --base_model {target}
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{target}")
tokenizer = AutoTokenizer.from_pretrained("{target}")
```
"""


def gguf_card(certificate: dict, target: Path, name: str, with_modelfile: bool) -> str:
    """Markdown of a GGUF folder's card."""
    ollama = f"ollama create {target.name} -f Modelfile\n" if with_modelfile else ""
    return f"""{_head(certificate, target, "gguf")}
The file was read back with transformers.

## Use

```bash
llama-cli -m {name}
{ollama}```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{target}", gguf_file="{name}")
tokenizer = AutoTokenizer.from_pretrained("{target}")
```
"""


def _head(certificate: dict, target: Path, library: str) -> str:
    adapter = certificate["adapter"]
    rows = [
        f"| base | `{certificate['base_model']}` (weights {certificate['base']['weights'][:12]}) |"
    ]
    known = ""
    if adapter is not None:
        rows.append(f"| adapter | `{adapter}` (sha256 {certificate['adapter_sha256'][:12]}) |")
        known = f"\n{KNOWN[certificate['base_is_the_recorded_one']]}\n"
    rows.append(f"| precision | {certificate['precision']} |")
    return f"""---
base_model: {certificate["base_model"]}
library_name: {library}
pipeline_tag: text-generation
---

# {target.name}

| what | value |
|---|---|
{chr(10).join(rows)}
{known}
## Merge certificate

{summary(certificate)}

The full numbers and the limits are in `merge_certificate.json`.
"""
