"""The one place that knows how a conversation becomes token ids.

Training, evaluation, chat and every exporter call :func:`chat_format_of`; nothing else in the
package may spell a role marker.  A conversation is ``[{"role", "content"}, ...]``; encoded it is
two equal-length lists, the ids and, for each id, whether the model is to learn it:

    <|system|>\\n{system}\\n<|user|>\\n{user}\\n<|assistant|>\\n{answer}<|endoftext|>
    ................................................ no ......  ^^^^^^ yes ^^^^^^^^

An assistant turn with ``"train": False`` is encoded alike and not learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from tinyllm.errors import UserError
from tinyllm.vocabulary import content_tokens

IGNORE_INDEX = -100
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
ROLE_MARKERS = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
DEFAULT_SYSTEM_PROMPT = "你是由李小贱开发的个人助手。"

# Line for line what FamilyFormat encodes; tests hold the two equal.  A conversation that is
# continued (after an answer's end token) starts its next turn on a new line.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if not loop.first and messages[loop.index0 - 1].role == 'assistant' %}{{ '\\n' }}{% endif -%}"
    "{%- if message.role == 'assistant' -%}"
    "{{ '<|assistant|>\\n' }}{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
    "{%- else -%}"
    "{{ '<|' + message.role + '|>\\n' + message.content + '\\n' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{%- if messages and messages[-1].role == 'assistant' %}{{ '\\n' }}{% endif -%}"
    "{{ '<|assistant|>\\n' }}"
    "{%- endif -%}"
)


@dataclass
class Encoded:
    """One encoded conversation.

    Attributes:
        input_ids: token ids, length ``T``.
        supervised: for each id whether it is a training target, length ``T``.
    """

    input_ids: list[int] = field(default_factory=list)
    supervised: list[bool] = field(default_factory=list)

    def append(self, ids: list[int], supervised: bool) -> None:
        self.input_ids += ids
        self.supervised += [supervised] * len(ids)

    @property
    def labels(self) -> list[int]:
        """Ids where supervised, ``IGNORE_INDEX`` elsewhere, length ``T``.

        Masked by position, never by value: a base whose padding token is also its end token
        still learns to stop.
        """
        return [
            i if s else IGNORE_INDEX for i, s in zip(self.input_ids, self.supervised, strict=True)
        ]


class Piece(NamedTuple):
    """A stretch of a conversation that is encoded in one go.

    Attributes:
        text: what it says.
        supervised: whether the model is to learn it.
        typed: a user wrote it and it spells a special token: encode it as plain characters.
        ids: its ids, where they are known without a tokenizer.
    """

    text: str
    supervised: bool
    typed: bool = False
    ids: list[int] | None = None


class PlainText:
    """Encodes text in which a special token's spelling may only mean that token if we wrote it."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        # Gemma adds runs of newlines to its vocabulary: no one means a marker by them
        mere = {s for s in tokenizer.get_added_vocab() if not s.strip()} | {
            *content_tokens(tokenizer)
        }
        added = set(tokenizer.get_added_vocab()) - mere
        self.special_spellings = sorted(added, key=len, reverse=True)

    def mentions_special(self, text: str) -> bool:
        return any(spelling in text for spelling in self.special_spellings)

    def trusted(self, text: str) -> list[int]:
        """Ids of text that we wrote: markers become their single ids."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def untrusted(self, text: str) -> list[int]:
        """Ids of text that a user wrote: a typed ``<|user|>`` stays nine ordinary characters."""
        if self.unmarked is not None:
            return self.unmarked.encode(text, add_special_tokens=False).ids
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    @cached_property
    def unmarked(self):
        """The tokenizer without its added tokens, where some of them are not special.

        ``split_special_tokens`` takes only special ones apart; None where that is all of them.
        """
        added = self.tokenizer.added_tokens_decoder.values()
        if not self.tokenizer.is_fast or all(token.special for token in added):
            return None
        backend = self.tokenizer.backend_tokenizer
        unmarked = type(backend)(backend.model)
        unmarked.normalizer, unmarked.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
        return unmarked

    @cached_property
    def newline(self) -> list[int] | None:
        """Ids of a newline, where text behind one is encoded otherwise than alone; None elsewhere.

        SentencePiece begins a string with a space piece; the same text further on has none.
        """
        newline = self.trusted("\n")
        return newline if self.trusted("\na") != newline + self.trusted("a") else None

    def after_newline(self, text: str, typed: bool) -> list[int] | None:
        """Ids of text as they are in one string with the newline before it.

        None where encoding it alone gives the same, or where it shares a token with the newline.
        """
        if self.newline is None:
            return None
        ids = self.untrusted(f"\n{text}") if typed else self.trusted(f"\n{text}")
        size = len(self.newline)
        return ids[size:] if ids[:size] == self.newline else None

    def piece(self, piece: Piece) -> list[int]:
        """Ids of one piece."""
        if piece.ids is not None:
            return piece.ids
        return self.untrusted(piece.text) if piece.typed else self.trusted(piece.text)

    def join(self, pieces: Iterator[Piece]) -> Encoded:
        """Encode pieces one by one."""
        encoded = Encoded()
        for piece in pieces:
            encoded.append(self.piece(piece), piece.supervised)
        return encoded


class FamilyFormat:
    """The format of the tiny-llm family, used by every base that brings no template of its own."""

    def __init__(self, tokenizer) -> None:
        self.text = PlainText(tokenizer)
        self.eos_token = tokenizer.eos_token
        self.eos_token_id = tokenizer.eos_token_id
        if self.eos_token_id is None:
            raise UserError("the base's tokenizer has no end token (eos_token); set one first")

    def encode(self, messages: list[dict]) -> Encoded:
        """Encode a whole conversation; each assistant turn and its end token are supervised."""
        return self.text.join(self.pieces(messages))

    def pieces(self, messages: list[dict]) -> Iterator[Piece]:
        """The conversation in the stretches in which it is encoded."""
        for index, message in enumerate(messages):
            lead = "\n" if index and messages[index - 1]["role"] == "assistant" else ""
            marker, content = ROLE_MARKERS[message["role"]], message["content"]
            typed = self.text.mentions_special(content)
            if message["role"] == "assistant":
                learned = message.get("train", True)
                yield Piece(f"{lead}{marker}\n", False)
                yield Piece(content, learned, typed, self.text.after_newline(content, typed))
                yield Piece(self.eos_token, learned, ids=[self.eos_token_id])
            elif typed and marker in self.text.special_spellings:
                yield Piece(f"{lead}{marker}", False)
                yield Piece(f"\n{content}\n", False, typed)
            else:
                yield Piece(f"{lead}{marker}\n{content}\n", False, typed)

    def encode_prompt(self, messages: list[dict]) -> list[int]:
        """Ids after which the model writes the next reply; ``messages`` ends with a user turn."""
        lead = "\n" if messages and messages[-1]["role"] == "assistant" else ""
        return self.encode(messages).input_ids + self.text.trusted(f"{lead}{ASSISTANT}\n")

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """The same conversation as text, for previews and the model card."""
        return render_family(messages, self.eos_token, add_generation_prompt)


def render_family(messages: list[dict], eos_token: str, add_generation_prompt: bool = False) -> str:
    """A conversation as text in the family's format; see the drawing at the top."""
    parts = []
    for index, message in enumerate(messages):
        lead = "\n" if index and messages[index - 1]["role"] == "assistant" else ""
        end = eos_token if message["role"] == "assistant" else "\n"
        parts.append(f"{lead}{ROLE_MARKERS[message['role']]}\n{message['content']}{end}")
    if add_generation_prompt:
        lead = "\n" if messages and messages[-1]["role"] == "assistant" else ""
        parts.append(f"{lead}{ASSISTANT}\n")
    return "".join(parts)


class TemplateFormat:
    """The format of a base that brings its own chat template (Qwen, Llama, Gemma, SmolLM2, ...)."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.text = PlainText(tokenizer)

    def encode(self, messages: list[dict]) -> Encoded:
        """Encode turn by turn: what the template adds for an assistant turn is supervised.

        Raises:
            UserError: the template rewrites earlier turns, so that a reply's place is unknown.
        """
        return self.text.join(self.pieces(messages))

    def pieces(self, messages: list[dict]) -> Iterator[Piece]:
        """The conversation in the stretches in which it is encoded; raises as :meth:`encode`."""
        done = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.render(messages[:index], add_generation_prompt=True)
            through = self.render(messages[: index + 1])
            if not prompt.startswith(done) or not through.startswith(prompt):
                raise UserError(
                    "the base's chat template rewrites earlier turns of a conversation; "
                    "train on single-turn rows or give the base another chat_template"
                )
            reply, tail = self._split_reply(through[len(prompt) :])
            yield Piece(prompt[len(done) :], False)
            yield Piece(reply, message.get("train", True))
            done = through[: len(through) - len(tail)]

    def encode_prompt(self, messages: list[dict]) -> list[int]:
        """Ids after which the model writes the next reply."""
        return self.text.trusted(self.render(messages, add_generation_prompt=True))

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """The conversation as the base's own template writes it."""
        self._refuse_markers(messages)
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # jinja errors come in many classes, all mean the same
            raise UserError(f"the base's chat template refuses a conversation: {error}") from error

    def _split_reply(self, text: str) -> tuple[str, str]:
        """Cut after the end-of-turn marker: a newline that follows it is not the model's to write."""
        stripped = text.rstrip()
        if any(stripped.endswith(spelling) for spelling in self.text.special_spellings):
            return stripped, text[len(stripped) :]
        return text, ""

    def _refuse_markers(self, messages: list[dict]) -> None:
        for message in messages:
            if self.text.mentions_special(message["content"]):
                raise UserError(
                    f"a {message['role']} turn contains a special token's spelling: "
                    f"{message['content'][:60]!r}; take it out of the row"
                )


def has_own_template(tokenizer) -> bool:
    """Whether the base brings a chat template that is not ours."""
    return bool(tokenizer.chat_template) and tokenizer.chat_template != CHAT_TEMPLATE


def chat_format_of(tokenizer) -> FamilyFormat | TemplateFormat:
    """The format to talk to this base in; gives a base without a template ours.

    Raises:
        UserError: the tokenizer has no end token.
    """
    if has_own_template(tokenizer):
        return TemplateFormat(tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    return FamilyFormat(tokenizer)


def with_system_prompt(messages: list[dict], system_prompt: str) -> list[dict]:
    """Put the default system prompt first, unless the conversation has one or it is empty."""
    if not system_prompt or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]
