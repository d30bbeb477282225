"""Tiny SentencePiece-like tokenizers and a tiny Gemma 3, made on the spot."""

from __future__ import annotations

from conftest import TEXTS

from tinyllm.known_bases import GEMMA_TURNS

SPACE = "▁"
MARKERS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
SIZE = 512


def vocabulary(markers: list[str] = MARKERS) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids and merges as SentencePiece orders them: markers, bytes, what merges make, characters.

    Every cut of a token into two others is a merge, in the order of what it makes.
    """
    from tokenizers import Tokenizer, models, trainers

    backend = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=SIZE, show_progress=False, special_tokens=[])
    spaced = [text.replace(" ", SPACE) for text in [*TEXTS, "a  b    c", "the cat and the hat"]]
    backend.train_from_iterator(spaced * 3, trainer)
    learned = sorted(backend.get_vocab(), key=backend.get_vocab().get)
    single = [token for token in learned if len(token) == 1] + ["\n"]
    room = SIZE - len(markers) - 256 - len(single)
    runs = [sign * length for sign in ("\n", SPACE) for length in range(2, 9)]
    made = [*runs, *(token for token in learned if len(token) > 1 and token not in runs)][:room]
    tokens = [*markers, *(f"<0x{value:02X}>" for value in range(256)), *made, *single]
    vocab = {token: index for index, token in enumerate(tokens)}
    cuts = [(token[:at], token[at:]) for token in made for at in range(1, len(token))]
    return vocab, [(left, right) for left, right in cuts if left in vocab and right in vocab]


def gemma_tokenizer():
    """A tokenizer of Gemma's class, with its turns."""
    from transformers import GemmaTokenizer

    vocab, merges = vocabulary()
    tokenizer = GemmaTokenizer(vocab=vocab, merges=merges, mask_token=None, add_bos_token=True)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKERS[4:]})
    tokenizer.chat_template = GEMMA_TURNS
    return tokenizer


def spaced_tokenizer(normalizer=None, pre_tokenizer=None, template: str | None = None):
    """A tokenizer of Llama 2's kind whose spaces are written by the given steps."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocab, merges = vocabulary()
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
        unk_token="<unk>", additional_special_tokens=MARKERS[4:], chat_template=template,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def gemma_model(seed: int = 0, **changes):
    """Seven layers, one of them with full attention, whose weights are those that bfloat16 has."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(seed)
    shape = {
        "vocab_size": SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 7,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 8,
        "query_pre_attn_scalar": 256, "max_position_embeddings": 256, "initializer_range": 0.2,
        "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    model = Gemma3ForCausalLM(Gemma3TextConfig(**(shape | changes))).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
        parameter.data = parameter.data.to(torch.bfloat16).float()
    return model
