"""The part `llama` of chat_speed.py: the same merged model in llama.cpp, through its Python package."""

from __future__ import annotations

import os
import tempfile
from itertools import islice
from pathlib import Path

from tinyllm.errors import UserError

TYPES = ("f32", "f16")  # of the matrices; our own engine reads bfloat16 weights, as in the base
CONTEXT = 512


def llama_package(who: str = "--parts llama"):
    """The module llama_cpp.

    Args:
        who: what needs it, for the message.

    Raises:
        UserError: it is not installed.
    """
    try:
        import llama_cpp
    except ImportError as error:
        raise UserError(
            f"{who} needs llama.cpp's Python package and gguf: pip install llama-cpp-python "
            "-r requirement-gguf.txt (compiled on the spot, some minutes)"
        ) from error
    return llama_cpp


class Llama:
    """llama.cpp with one GGUF file; writes greedily, without penalty.

    Args:
        end: ids that end a reply.
        options: of ``llama_cpp.Llama``, before the usual ones here.
    """

    def __init__(self, path: Path, end: set[int], **options) -> None:
        threads = os.cpu_count()
        usual = {"n_ctx": CONTEXT, "n_threads": threads, "n_threads_batch": threads}
        self.end = end
        self.model = llama_package().Llama(str(path), verbose=False, **(usual | options))

    def write(self, prompt: list[int], num_tokens: int, until_end: bool = True) -> list[int]:
        """Ids after a prompt, read anew each time."""
        self.model.reset()
        ids: list[int] = []
        stream = self.model.generate(prompt, temp=0.0, repeat_penalty=1.0)
        for token in islice(stream, num_tokens):
            ids.append(token)
            if until_end and token in self.end:
                break
        return ids


def measure_llama(pair, in_turns, repeats: int, num_tokens: int) -> None:
    """Tokens per second of our engine and of llama.cpp in turns, and how many replies are the same."""
    from tinyllm.export.gguf import write_gguf

    llama_package()
    plain = {"repetition_penalty": 1.0}
    endless, whole = pair.config(num_tokens, **plain), pair.config(200, **plain)
    ends = whole.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    endless.eos_token_id = None
    prompt, asked = pair.prompts[0], pair.prompts[:: max(1, len(pair.prompts) // 40)]
    print(f"llama.cpp {llama_package().__version__}, greedy, no penalty, {num_tokens} tokens each")
    for gguf_type in TYPES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(pair.model, pair.tokenizer, path, gguf_type)
            llama = Llama(path, ends)
            taken = in_turns(
                repeats,
                fast=lambda: pair.engine.write(prompt, endless),
                llama=lambda one=llama: one.write(prompt, num_tokens, until_end=False),
            )
            same = sum(pair.engine.write(p, whole) == llama.write(p, 200) for p in asked)
        print(
            f"  {gguf_type}: ours {num_tokens / taken['fast']:6.0f} tokens/s   llama.cpp "
            f"{num_tokens / taken['llama']:6.0f}   ratio {taken['llama'] / taken['fast']:5.2f}   "
            f"same ids in {same} of {len(asked)} replies",
            flush=True,
        )
