"""Adapter + base → folders and files that stand alone: Hugging Face, GGUF, Ollama."""
