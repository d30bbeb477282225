"""tiny-llm-zh models and their tokenizer, native in transformers: nothing in a folder is executed.

    import tinyllm
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("path/to/last_ptm_model")

Importing :mod:`tinyllm` calls :func:`announce`, and must stay quick: torch and transformers take
seconds to import.  So only *names* are registered, in the tables from which transformers itself
imports a model's classes when they are first used.  A table that does not exist yet gets them from
an import hook, as soon as its module is there.  (A hook that imported our classes at that moment
would fail: transformers is half imported then, and they need all of it.)
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder

AUTO = "transformers.models.auto"
# The tokenizer's table is asked by class name.  Under a model's own key, transformers would prefer
# the folder's tokenizer code to ours when remote code is allowed; that code fails on transformers 5.
MODEL_KEY, TOKENIZER_KEY = "tinyllm", "tinyllm_tokenizer"
TABLES = {
    f"{AUTO}.configuration_auto": {"CONFIG_MAPPING_NAMES": (MODEL_KEY, "TinyllmConfig")},
    f"{AUTO}.modeling_auto": {
        "MODEL_MAPPING_NAMES": (MODEL_KEY, "TinyllmModel"),
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": (MODEL_KEY, "TinyllmForCausalLM"),
    },
    f"{AUTO}.tokenization_auto": {"TOKENIZER_MAPPING_NAMES": (TOKENIZER_KEY, "ChatGLMTokenizer")},
}
CLASSES = {
    "TinyllmConfig": "tinyllm.family.config",
    "TinyllmModel": "tinyllm.family.model",
    "TinyllmForCausalLM": "tinyllm.family.model",
    "ChatGLMTokenizer": "tinyllm.family.tokenizer",
}


def __getattr__(name: str):
    """Import a class of the family when it is asked for."""
    if name not in CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(CLASSES[name]), name)


def announce() -> None:
    """Make the family known to transformers, imported or not; calling it twice is harmless."""
    if FamilyNames in sys.meta_path:
        return
    for key in (MODEL_KEY, TOKENIZER_KEY):  # where transformers looks for the classes of a key
        sys.modules[f"transformers.models.{key}"] = sys.modules[__name__]
    sys.meta_path.insert(0, FamilyNames)
    for name in TABLES:
        if name in sys.modules:
            enter_names(sys.modules[name])
    if f"{AUTO}.modeling_auto" in sys.modules:  # which has read the table of configurations already
        import_module("tinyllm.family.model").register()


def enter_names(module) -> None:
    """Enter our names in the tables of one of transformers' Auto modules."""
    for table, (key, class_name) in TABLES[module.__name__].items():
        getattr(module, table)[key] = class_name


class FamilyNames:
    """A finder for ``sys.meta_path``: the Auto modules are found as ever, and get our names."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        """Every other module is left to the finders behind this one."""
        spec = PathFinder.find_spec(name, path, target) if name in TABLES else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_enter(module) -> None:
                execute(module)
                enter_names(module)

            spec.loader.exec_module = execute_and_enter
        return spec
