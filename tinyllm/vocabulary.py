"""Tokens that a base's vocabulary lacks: added before training, and again when loading."""

from __future__ import annotations

from tinyllm.errors import UserError

# Kept in tokenizer_config.json: added tokens that rows may spell and mean.
CONTENT_TOKENS = "content_tokens"


def add_tokens(model, tokenizer, names: list[str]) -> list[int]:
    """Add tokens that rows may spell, and make room for them; returns their ids.

    They are single ids everywhere, and stay visible in replies.

    Raises:
        UserError: a token is in the vocabulary already.
    """
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    already = [name for name in names if name in known]
    if already:
        raise UserError(
            f"--new_special_tokens {already[0]}: already in the vocabulary, id {known[already[0]]}; "
            "to train its embedding, use --trainable_token_indices"
        )
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in names])
    tokenizer.init_kwargs[CONTENT_TOKENS] = [*content_tokens(tokenizer), *names]
    fit_vocabulary(model, tokenizer)
    return tokenizer.convert_tokens_to_ids(names)


def content_tokens(tokenizer) -> list[str]:
    """Tokens that were added so that rows can spell them."""
    return list(tokenizer.init_kwargs.get(CONTENT_TOKENS, []))


def fit_vocabulary(model, tokenizer) -> None:
    """Give a base as many embedding rows as the tokenizer has ids; it is never made smaller."""
    if len(tokenizer) > embedding_rows(model):
        model.resize_token_embeddings(len(tokenizer))


def embedding_rows(model) -> int:
    """How many ids the base has embeddings for."""
    return model.get_input_embeddings().weight.shape[0]


def is_tied(model) -> bool:
    """Whether the output head is the input embedding."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight
