"""The Modelfile of Ollama: the family's chat format in its template language, and where to stop."""

from __future__ import annotations

from tinyllm.chat_format import ASSISTANT, CHAT_TEMPLATE, ROLE_MARKERS, SYSTEM, USER
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


def modelfile(gguf_name: str, tokenizer, system_prompt: str | None) -> str:
    """Content of a Modelfile beside a GGUF file.

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
    ]
    if system_prompt:
        if '"""' in system_prompt:
            raise UserError('--export ollama: the system prompt contains """')
        lines.append(f'SYSTEM """{system_prompt}"""')
    return "\n".join(lines) + "\n"
