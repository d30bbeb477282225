"""The tokenizer: byte-level BPE, 8,192 entries, learnt mostly from our own everyday text.

Digits stand alone, then GPT-2's byte-level split: the pair that llama.cpp calls "smollm", so the
exported folder also converts to GGUF.
"""

import importlib
import logging
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tinyllm.errors import UserError
from tinyllm.pretrain.corpus import HAN

log = logging.getLogger(__name__)

PAD, EOS = "<|pad|>", "<|endoftext|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
NUM_RESERVED = 11
SPECIAL_TOKENS = [PAD, EOS, *ROLES, *(f"<|reserved_{i}|>" for i in range(NUM_RESERVED))]
OWN_REPEATS = 12  # our own text counts this often
MAX_CHARACTERS = 400_000  # of any other source (about 1 MB in UTF-8), and less of these two
SMALL_SHARES = {"openclaw": 80_000, "chinese-poetry": 60_000}
CHARACTER_COUNT = 60  # extra weight of every common character


def common_characters() -> list[str]:
    """The 3,755 everyday characters of GB 2312 level 1 (rows 16 to 55)."""
    codes = [(row, cell) for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFF)]
    characters = (bytes(code).decode("gb2312", "ignore") for code in codes)
    return [character for character in characters if character]


def training_text(texts: dict[str, list[str]]) -> Iterator[str]:
    """Own text `OWN_REPEATS` times, a sample of every other source, and the common characters."""
    for _ in range(OWN_REPEATS):
        yield from texts.get("own", [])
    for source in sorted(set(texts) - {"own"}):
        documents, left = list(texts[source]), SMALL_SHARES.get(source, MAX_CHARACTERS)
        random.Random(0).shuffle(documents)
        for text in documents:
            if left <= 0:
                break
            yield text[:left]
            left -= len(text)
    for character in common_characters():
        yield from [character] * CHARACTER_COUNT


def learn(texts: dict[str, list[str]], vocab_size: int) -> Tokenizer:
    """Train the BPE; special tokens take the first ids in the order of `SPECIAL_TOKENS`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(texts), trainer)
    return tokenizer


def chat_template() -> str | None:
    """The toolkit's chat template, or None while that module is not installed."""
    try:
        return importlib.import_module("tinyllm.chat_format").CHAT_TEMPLATE
    except ModuleNotFoundError:
        return None


def wrap(tokenizer: Tokenizer, max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers knows it: pad and eos, no bos, no unk."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        extra_special_tokens=ROLES,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )
    if template := chat_template():
        wrapped.chat_template = template
    return wrapped


def single_token_share(tokenizer: PreTrainedTokenizerFast, text: str, at_least: int = 5) -> float:
    """Share of the Han characters that occur `at_least` times and are one token each."""
    frequent = [c for c, n in Counter(HAN.findall(text)).items() if n >= at_least]
    lengths = [len(tokenizer.encode(c, add_special_tokens=False)) for c in frequent]
    return lengths.count(1) / len(lengths) if lengths else 1.0


def build(
    texts: dict[str, list[str]], folder: Path, vocab_size: int, max_length: int
) -> PreTrainedTokenizerFast:
    """Learn and save the tokenizer unless the folder holds one (a model depends on it).

    Raises:
        UserError: the one in the folder has more entries than the model shall have.
    """
    if (folder / "tokenizer.json").exists():
        log.info("vocabulary: up to date")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        if len(tokenizer) > vocab_size:
            raise UserError(
                f"{folder} has {len(tokenizer)} entries, more than the vocab_size of {vocab_size}; give --work "
                "another folder"
            )
        return tokenizer
    tokenizer = wrap(learn(texts, vocab_size), max_length)
    share = single_token_share(tokenizer, "".join(texts.get("own", [])))
    sample = "".join(texts.get("own", []))[:50_000]
    per_token = len(sample) / max(1, len(tokenizer.encode(sample, add_special_tokens=False)))
    log.info("vocabulary: %d entries, %.2f characters a token", len(tokenizer), per_token)
    log.info("vocabulary: %.2f %% of our frequent characters are one token", 100 * share)
    tokenizer.save_pretrained(folder)
    return tokenizer
