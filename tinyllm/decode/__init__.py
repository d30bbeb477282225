"""Prompt ids → reply ids, by the fastest way that is proven to give the same tokens."""
