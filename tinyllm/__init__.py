"""LoRA fine-tuning of small language models; see README.md for the flow of data."""
