"""Encoded data kept between runs, so that a second start does not read a million rows again.

One folder an entry, named by a hash of everything that the entry depends on: the bytes of the data
files, the tokenizer, the chat format, the settings and this package's own code.  An entry appears
whole (written beside, then renamed) and is checked against its own hash each time it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from tinyllm.errors import UserError
from tinyllm.examples import Examples
from tinyllm.file_hash import hash_file
from tinyllm.printable import one_line
from tinyllm.records import Source

# Smaller data is encoded in a few seconds, and is not worth a file.
CACHE_FROM_BYTES = 4 * 2**20
CONTENT_FILE = "content.json"
ABANDONED_SECONDS = 6 * 3600
SCRATCH_NAME = re.compile(r"\.[0-9a-f]{32}\.\d+\.\d+")
LIBRARIES = ("transformers", "tokenizers", "numpy")


class EncodingCache:
    """One entry: there, or to be written.

    Args:
        folder: where all entries are.
        key: what :func:`cache_key` gives.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.entry = folder, folder / key[:32]

    def load(self) -> tuple[dict[str, Examples | None], dict] | None:
        """``({name: examples}, content)``, or None when there is no such entry or it is damaged."""
        try:
            content = self._read_content()
            parts = {
                name: Examples.open(self.entry, name) if digest else None
                for name, digest in content["digests"].items()
            }
            digests = {name: part.digest if part else "" for name, part in parts.items()}
            if digests == content["digests"]:
                return parts, content
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        # never served: a damaged entry is written anew
        shutil.rmtree(self.entry, ignore_errors=True)
        return None

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """Give a folder to write into; it becomes the entry if the block ends well.

        Raises:
            UserError: it cannot be written.
        """
        scratch = self.folder / f".{self.entry.name}.{os.getpid()}.{time.time_ns()}"
        try:
            self._remove_abandoned()
            scratch.mkdir(parents=True)
            yield scratch
            # of two that write the same entry the second finds it there, and leaves it
            with contextlib.suppress(FileExistsError):
                _rename(scratch, self.entry)
        except OSError as error:
            raise UserError(
                f"--data_cache {one_line(self.folder)}: cannot be written: {error.strerror or error}; "
                "give another folder, or none"
            ) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def finish(self, scratch: Path, parts: dict[str, Examples | None], content: dict) -> None:
        """Write what goes with the examples: their hashes and the given JSON."""
        digests = {name: part.digest if part is not None else "" for name, part in parts.items()}
        text = json.dumps({"digests": digests, **content}, ensure_ascii=False).encode()
        (scratch / CONTENT_FILE).write_bytes(_sha256(text).encode() + b"\n" + text)

    def _read_content(self) -> dict:
        """The JSON behind its hash; raises a ValueError when the two do not belong together."""
        digest, _, text = (self.entry / CONTENT_FILE).read_bytes().partition(b"\n")
        if digest.decode("ascii") != _sha256(text):
            raise ValueError(f"{self.entry} is damaged")
        return json.loads(text)

    def _remove_abandoned(self) -> None:
        """Remove what a killed process of long ago left half written."""
        for path in self.folder.glob(".*"):
            if (
                SCRATCH_NAME.fullmatch(path.name)
                and time.time() - path.stat().st_mtime > ABANDONED_SECONDS
            ):
                shutil.rmtree(path, ignore_errors=True)


def _rename(scratch: Path, entry: Path) -> None:
    if entry.exists():
        raise FileExistsError(entry)
    scratch.rename(entry)


def cache_key(chat_format, sources: list[Source], settings: dict) -> str:
    """Hash of everything that decides what the encoded data is.

    Args:
        sources: all data files, training and held-out.
        settings: the settings that matter, as plain values.

    Raises:
        UserError: a file cannot be read.
    """
    files = [[str(source.path), source.weight, hash_source(source.path)] for source in sources]
    depends = [
        files,
        settings,
        _format_hash(chat_format),
        _code_hash(),
        [version(n) for n in LIBRARIES],
    ]
    return _sha256(json.dumps(depends, sort_keys=True).encode())


def hash_source(path: Path) -> str:
    """SHA-256 of a data file's bytes; a UserError where it cannot be read."""
    try:
        return hash_file(path)
    except OSError as error:
        raise UserError(f"{one_line(path)}: {error.strerror or error}") from error


def _format_hash(chat_format) -> str:
    """Of the whole tokenizer, not only of its vocabulary: merges decide about ids as well."""
    tokenizer = chat_format.text.tokenizer
    whole = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer)
    parts = [
        type(chat_format).__name__, whole, tokenizer.chat_template, tokenizer.eos_token_id,
        sorted(tokenizer.get_vocab().items()), sorted(map(str, tokenizer.all_special_ids)),
    ]  # fmt: skip
    return _sha256(json.dumps(parts).encode())


def _code_hash() -> str:
    """Of this package's source, so that a change in how rows are read or encoded is noticed."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def total_bytes(sources: list[Source]) -> int:
    """Size of all files together."""
    return sum(source.path.stat().st_size for source in sources)


def stamps(sources: list[Source]) -> list[tuple[int, int]]:
    """Time of the last change, and size, of each file."""
    return [(s.path.stat().st_mtime_ns, s.path.stat().st_size) for s in sources]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
