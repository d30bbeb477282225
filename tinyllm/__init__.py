"""LoRA fine-tuning of small language models; see README.md for the flow of data.

Importing this package makes tiny-llm-zh folders known to transformers' Auto classes, and costs
nothing: neither torch nor transformers is imported (see :mod:`tinyllm.family`).
"""

from tinyllm.family import announce

announce()
