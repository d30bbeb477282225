"""Chat with a base and a LoRA adapter.

    python inference_lora.py --base_model path/to/base --lora_model path/to/adapter --merge_weights
    python inference_lora.py --lora_model RUN --prompt "你好"
    python inference_lora.py --lora_model RUN --input questions.jsonl --output answers.jsonl

Type a question; /help lists the commands; quit, exit or the end of the input leaves, Ctrl-C stops a
reply.  Every flag: python inference_lora.py --help
"""

from __future__ import annotations

import sys

from tinyllm.errors import run_program


def main(argv: list[str] | None = None) -> int:
    """Load base and adapters, then do what the flags ask."""
    from tinyllm.chat import start
    from tinyllm.chat.options import parse_args

    # 1. what is asked for
    args = parse_args(argv)
    if args.web:
        start.check_web()
    # 2. libraries that say nothing, a terminal that breaks on nothing
    from tinyllm.chat.terminal import ctrl_c_leaves, prepare
    from tinyllm.imports import without_collections
    from tinyllm.quiet import quiet_libraries

    prepare()
    with ctrl_c_leaves(), without_collections():
        quiet_libraries()
        # 3. base, adapters, and what writes the replies
        speaker = start.build(args)
    # 4. one answer, a file of answers, a web page, or a conversation
    if args.prompt is not None:
        start.run_prompt(args, speaker)
    elif args.input:
        start.run_file(args, speaker)
    elif args.web:
        start.run_web(args, speaker)
    else:
        start.run_chat(args, speaker)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
