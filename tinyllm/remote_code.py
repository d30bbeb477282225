"""Python code that lies in a base's folder: never run unasked, and never run after it has changed.

``--trust_remote_code True`` lets transformers execute a folder's ``.py`` files.  Their hash is
printed and kept in the run folder; a later start of the run refuses other code before running it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tinyllm.errors import UserError
from tinyllm.run_folder import RUN_FILE


def code_files(folder: str | Path) -> list[Path]:
    """Every Python file of a base's folder, in order."""
    return sorted(Path(folder).rglob("*.py"))


def hash_code(folder: str | Path) -> str:
    """sha256 over the names and contents of the code files; ``""`` where there are none."""
    files = code_files(folder)
    if not files:
        return ""
    digest = hashlib.sha256()
    for path in files:
        name, content = path.relative_to(folder).as_posix(), path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def names_code(folder: str | Path) -> bool:
    """Whether the folder's files ask for code of its own (``auto_map``)."""
    return bool(_auto_map(folder))


def check_code(base, output_dir: Path, say) -> None:
    """Decide about a base's code before any of it can run; says its hash.

    Args:
        base: the :class:`tinyllm.settings.BaseSettings`, its path resolved.

    Raises:
        UserError: the code lies elsewhere, or is not what was pinned.
    """
    folder = Path(base.base_model_path)
    if not base.trust_remote_code:
        if base.remote_code_hash:
            raise UserError("--remote_code_hash needs --trust_remote_code True")
        return
    elsewhere = [name for name in _auto_map(folder) if "--" in name]
    if elsewhere:
        raise UserError(
            f"{folder}: it takes code from another place, {elsewhere[0]}; copy that "
            "code into the folder, read it, and name it without the part before --"
        )
    found = hash_code(folder)
    if not found:
        say(f"--trust_remote_code True: {folder} holds no code")
        return
    names = ", ".join(path.relative_to(folder).as_posix() for path in code_files(folder))
    for pinned, where in ((base.remote_code_hash, "--remote_code_hash"),
                          (pinned_code(output_dir), f"{output_dir / RUN_FILE}")):  # fmt: skip
        if pinned and pinned != found:
            raise UserError(
                f"{folder}: its code has changed: {where} says {pinned[:16]}..., the files now give "
                f"{found[:16]}...; nothing was run. Read {names}, then start anew with another "
                "--output_dir"
            )
    say(f"remote code: {names} will be run, sha256 {found}")


def pinned_code(output_dir: Path) -> str:
    """The hash that the run in a folder was started with; ``""`` where there is none."""
    try:
        content = json.loads((output_dir / RUN_FILE).read_text(encoding="utf-8"))
        return content["identity"]["base"].get("code", "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""  # no run yet, or a folder that open_run will refuse in its own words


def code_identity(base) -> dict[str, str]:
    """What ``run.json`` keeps about a base's code."""
    if not base.trust_remote_code:
        return {}
    return {"code": hash_code(base.base_model_path)}


def _auto_map(folder: str | Path) -> list[str]:
    """Class names that the folder's files ask for, as ``file.Class`` or ``place--file.Class``."""
    names: list = []
    for file in ("config.json", "tokenizer_config.json"):
        try:
            content = json.loads((Path(folder) / file).read_text(encoding="utf-8"))
            entries = content.get("auto_map", {}).values()
        except (OSError, ValueError, AttributeError):
            continue  # whether the file is needed is check_base_folder's to say
        for entry in entries:
            names += entry if isinstance(entry, list) else [entry]
    return [name for name in names if isinstance(name, str)]
