"""The Modelfile of Ollama: the family's chat format in its template language, where to stop, how to choose."""

from __future__ import annotations

from transformers import GenerationConfig

from tinyllm.chat_format import ASSISTANT, CHAT_TEMPLATE, ROLE_MARKERS, SYSTEM, USER
from tinyllm.decode.choice import DEFAULT_TOP_K
from tinyllm.errors import UserError

# Go's text/template; "-" eats the line break of the template itself.  Line for line what
# FamilyFormat encodes, for conversations that end with a user's turn.
TEMPLATE = (
    "{{- range .Messages }}\n"
    '{{- if eq .Role "assistant" }}<|assistant|>\n'
    "{{ .Content }}%(eos)s\n"
    "{{ else }}<|{{ .Role }}|>\n"
    "{{ .Content }}\n"
    "{{ end }}\n"
    "{{- end }}<|assistant|>\n"
)

# What ``generate`` takes where the options say nothing.
NEUTRAL = {
    "repeat_penalty": 1.0, "temperature": 1.0, "top_k": DEFAULT_TOP_K, "top_p": 1.0, "min_p": 0.0,
}  # fmt: skip


def choice_lines(generation: GenerationConfig) -> list[str]:
    """How the base chooses words.  Unless it is told Ollama samples, and penalizes repeating what was said
    (temperature 0.8, repeat_penalty 1.1: the table of parameters in its documentation of the Modelfile).
    """
    chosen = {"repeat_penalty": generation.repetition_penalty, "temperature": 0}
    if generation.do_sample:
        names = ("temperature", "top_k", "top_p", "min_p")
        chosen |= {name: getattr(generation, name) for name in names}
    if generation.repetition_penalty not in (None, 1.0):
        chosen["repeat_last_n"] = -1  # transformers looks at everything, Ollama at 64 tokens
    values = {name: NEUTRAL[name] if value is None else value for name, value in chosen.items()}
    return [f"PARAMETER {name} {value}" for name, value in values.items()]


def modelfile(
    gguf_name: str, tokenizer, system_prompt: str | None, generation: GenerationConfig
) -> str:
    """Content of a Modelfile beside a GGUF file.

    Args:
        generation: the options of the base, which Ollama keeps as far as it can.

    Raises:
        UserError: the base has a chat template of its own, which only Ollama can translate.
    """
    if tokenizer.chat_template != CHAT_TEMPLATE:
        raise UserError(
            "--export ollama: this base brings its own chat template, which has no translation "
            "here; use --export gguf, and take the TEMPLATE of that model from Ollama's library"
        )
    stops = [tokenizer.eos_token, SYSTEM, USER, ASSISTANT]
    assert set(ROLE_MARKERS.values()) <= set(stops), "a role whose marker does not stop"
    lines = [
        f"FROM ./{gguf_name}",
        f'TEMPLATE """{TEMPLATE % {"eos": tokenizer.eos_token}}"""',
        *(f'PARAMETER stop "{stop}"' for stop in stops),
        *choice_lines(generation),
    ]
    if system_prompt:
        if '"""' in system_prompt:
            raise UserError('--export ollama: the system prompt contains """')
        lines.append(f'SYSTEM """{system_prompt}"""')
    return "\n".join(lines) + "\n"
