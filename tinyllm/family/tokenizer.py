"""The tokenizer of tiny-llm-zh folders (ChatGLM3's) as a fast tokenizer with the same ids.

The folder's own class has two behaviours, and so has this one:

    auto     ``<|user|>`` and the other tokens that ``tokenizer_config.json`` lists are single ids, and
             each stretch of text after one starts with a space piece; for training and chat
    direct   every marker is ordinary text; this is how the pre-training data was made

``</s>`` and ``<unk>`` in a text are ordinary characters in both.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from tinyllm.chat_format import CHAT_TEMPLATE
from tinyllm.errors import UserError
from tinyllm.family.sentencepiece_model import (
    BPE,
    NORMAL,
    USER_DEFINED,
    Piece,
    SentencePieceModel,
    read_model,
)

SPACE = "▁"
# behind the pieces of tokenizer.model, in this order
EXTRA_TOKENS = (
    "[MASK]", "[gMASK]", "[sMASK]", "sop", "eop",
    "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
)  # fmt: skip
SINGLE_TOKENS = ("[gMASK]", "sop", "<|user|>", "<|assistant|>")
UNK, EOS = "<unk>", "</s>"
# in ChatGLM's own chat template, which such folders carry and neither their training nor chat uses
GLM_MARK = "[gMASK]"
# what a folder's tokenizer_config.json may say, and what means nothing here
NOT_OURS = ("auto_map", "do_lower_case", "remove_space", "encode_special_tokens", "vocab_file")


class ChatGLMTokenizer(PreTrainedTokenizerFast):
    """What ``AutoTokenizer`` finds under the name that such folders give their tokenizer's class.

    It only builds: calling it, or ``from_pretrained``, gives a plain ``PreTrainedTokenizerFast``, so
    that whatever is saved later loads anywhere without this package.
    """

    vocab_files_names: ClassVar = {
        "vocab_file": "tokenizer.model",
        "tokenizer_file": "tokenizer.json",
    }

    def __new__(cls, *args, **kwargs):
        return PreTrainedTokenizerFast(*args, **kwargs)

    @classmethod
    def convert_to_native_format(cls, trust_remote_code=False, direct: bool = False, **settings):
        """Arguments for ``PreTrainedTokenizerFast``, from the folder's files.

        Args:
            direct: every marker is ordinary text, see the module's text.
            settings: what ``tokenizer_config.json`` and the caller say, and the files' paths.

        Raises:
            UserError: there is no ``tokenizer.model``, or it is another kind of tokenizer's.
        """
        if settings.get("tokenizer_file"):  # saved by this package, or another fast tokenizer
            return super().convert_to_native_format(trust_remote_code=trust_remote_code, **settings)
        if not settings.get("vocab_file"):
            raise UserError(
                f"{settings.get('name_or_path')}: no tokenizer.model, pre-training writes none; copy "
                "tokenizer.model and tokenizer_config.json of the ChatGLM3 tokenizer there"
            )
        path = Path(settings["vocab_file"])
        model = read_model(path)
        check_kind(model, path)
        listed = {} if direct else settings.pop("added_tokens_decoder", None)
        vocabulary = vocabulary_of(model, listed or {}, path)
        single = [] if direct else [str(t) for t in (listed or {}).values()] or SINGLE_TOKENS
        for name in NOT_OURS:
            settings.pop(name, None)
        template = settings.pop("chat_template", None) or GLM_MARK
        return {
            "padding_side": "left",
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
            **settings,
            "tokenizer_object": build(model.pieces, vocabulary),
            "added_tokens_decoder": {
                vocabulary[token]: AddedToken(token, normalized=False, special=False)
                for token in single
            },
            "split_special_tokens": True,
            "unk_token": UNK,
            "pad_token": UNK,
            "eos_token": EOS,
            "chat_template": CHAT_TEMPLATE if GLM_MARK in template else template,
        }


def check_kind(model: SentencePieceModel, path: Path) -> None:
    """Raise a UserError unless this is a BPE with the settings that :func:`build` builds."""
    expected = {
        "model type BPE": model.trainer.get(3) == BPE,
        "byte fallback": bool(model.trainer.get(35)),
        "no normalisation": not model.normalizer.get(2),
        "a dummy prefix": bool(model.normalizer.get(3, 1)),
        "spaces kept as they are": not model.normalizer.get(4, 1),
        f"{UNK}, <s>, {EOS} first": [p.text for p in model.pieces[:3]] == [UNK, "<s>", EOS],
        "no pieces defined by a user": all(p.kind != USER_DEFINED for p in model.pieces),
    }
    missing = [name for name, there in expected.items() if not there]
    if missing:
        raise UserError(f"{path}: not the tokenizer of this family: expected {', '.join(missing)}")


def vocabulary_of(
    model: SentencePieceModel, listed: dict[int, AddedToken], path: Path
) -> dict[str, int]:
    """Every token's id: the pieces, the family's extra tokens, and those that the folder lists.

    An extra token hides a piece of the same text, as it does in the family's own code.

    Raises:
        UserError: the folder lists a token under an id that is not its own.
    """
    texts = [piece.text for piece in model.pieces] + list(EXTRA_TOKENS)
    vocabulary = {text: i for i, text in enumerate(texts)}
    for number, token in sorted(listed.items()):
        own = vocabulary.setdefault(str(token), max(vocabulary.values()) + 1)
        if own != number:
            raise UserError(
                f"{path.parent}: tokenizer_config.json gives {token} the id {number}, but with this "
                f"tokenizer.model it is {own}; copy both from the same folder"
            )
    return vocabulary


def build(pieces: list[Piece], vocabulary: dict[str, int]) -> Tokenizer:
    """A fast BPE that cuts text as SentencePiece does, with ``[gMASK] sop`` as its prefix."""
    merges = merges_of(pieces)
    backend = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=UNK, fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )  # fmt: skip
    backend.post_processor = processors.TemplateProcessing(
        single="[gMASK] sop $A",
        pair=f"[gMASK] sop $A $B {EOS}",
        special_tokens=[(token, vocabulary[token]) for token in ("[gMASK]", "sop", EOS)],
    )
    return backend


def merges_of(pieces: list[Piece]) -> list[tuple[str, str]]:
    """BPE merges in order: every cut of a piece into two pieces, the best-scored piece first.

    ``["a", "b", "ab" (score -1)]`` gives ``[("a", "b")]``.
    """
    normal = {piece.text for piece in pieces if piece.kind == NORMAL}
    ranked = sorted((-p.score, i) for i, p in enumerate(pieces) if p.kind == NORMAL)
    return [
        (text[:cut], text[cut:])
        for text in (pieces[i].text for _, i in ranked)
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]
