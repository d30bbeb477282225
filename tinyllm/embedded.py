"""Put the embedded base where the guide expects it, unless something is there already.

python -m tinyllm.embedded outputs/ckpt/ptm_tiny_llm_16m_epoch1/last_ptm_model
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from tinyllm.errors import UserError, run_program
from tinyllm.whole_folder import whole_folder

EMBEDDED = Path(__file__).resolve().parent.parent / "models" / "ptm_tiny_llm_16m_epoch1"


def materialise(target: Path, source: Path = EMBEDDED) -> bool:
    """Copy the embedded base to ``target``; a folder that is there is never touched.

    Returns:
        Whether anything was copied.

    Raises:
        UserError: the repository lacks the base, or ``target`` cannot be written.
    """
    if target.exists():
        return False
    if not (source / "config.json").is_file():
        raise UserError(f"{source}: the embedded base is missing; clone the repository again")
    with whole_folder(target) as scratch:
        shutil.copytree(source, scratch, dirs_exist_ok=True)
    return True


def main() -> int:
    if len(sys.argv) != 2:
        raise UserError("usage: python -m tinyllm.embedded TARGET_FOLDER")
    if materialise(Path(sys.argv[1])):
        print(f"the embedded base is now in {sys.argv[1]}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
