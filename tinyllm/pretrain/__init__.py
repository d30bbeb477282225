"""Pretraining of the embedded base model, from pinned public text to an exported folder.

The stages, each one module, in the order they run (`python -m tinyllm.pretrain --help`):

    sources -> extract -> corpus -> vocabulary -> packing -> train -> export
"""
