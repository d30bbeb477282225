"""The model card of an exported base: what it saw, what it cost, how good it is."""

from tinyllm.pretrain.sources import SOURCES

LICENCES = {source.name: (source.version, source.licence, source.content) for source in SOURCES}
LICENCES["own"] = (
    "this repository",
    "Apache-2.0",
    "stories, knowledge, dialogues (`data/pretrain/`)",
)
LICENCES["chat"] = (
    "this repository",
    "Apache-2.0",
    "questions and answers of `data/pretrain/` once more, in the chat format",
)
LICENCES["patterns"] = (
    "this repository",
    "Apache-2.0",
    "short conversations from the patterns in `data/pretrain/`, in the chat format",
)
LICENCES["turns"] = (
    "this repository",
    "Apache-2.0",
    "short conversations written out in `data/pretrain/`, in the chat format",
)

OPTIMIZERS = {
    "muon": "Muon on the matrices inside the layers, AdamW on the rest",
    "adamw": "AdamW",
}


OUR_TEXT = "data/pretrain"  # in the repository; of other folders no licence is known


def described(source: str, own_texts: list[str]) -> tuple[str, str, str]:
    """Version, licence and content of a source."""
    version, licence, content = LICENCES.get(source, ("", "not known", "not known"))
    if version != "this repository" or own_texts == [OUR_TEXT]:
        return version, licence, content
    return "", "those of their authors", content.replace(f"{OUR_TEXT}/", ", ".join(own_texts))


def source_rows(facts: dict) -> str:
    """One table row per text, the most seen first."""
    rows = []
    for source, tokens in sorted(facts["seen"].items(), key=lambda item: -item[1]):
        version, licence, content = described(source, facts["own_texts"])
        counts = facts["corpus"].get(source, {"train": 0, "train_characters": 0})
        rows.append(
            f"| {source} {version} | {content} | {licence} | {counts['train']:,} | "
            f"{counts['train_characters']:,} | {tokens:,} |"
        )
    return "\n".join(rows)


def result_rows(results: dict[str, float]) -> str:
    """One table row per held-out text."""
    return "\n".join(f"| {source} | {bits:.2f} |" for source, bits in results.items())


def share_kept(share: float) -> str:
    """What the weights have of those that the run began from."""
    return (
        f"; {1 - share:.0%} of the last weights and {share:.0%} of those it began from"
        if share
        else ""
    )


def model_card(facts: dict) -> str:
    """Markdown from facts: `parameters`, `vocabulary`, `layers`, `hidden`, `heads`, `kv_heads`,
    `steps`, `tokens`, `seconds`, `seen` (tokens by source), `start_share` (of the first weights),
    `own_texts` (folders), `started_from` (a folder, or empty), `corpus` (counts by source) and `results` (bits per character by held-out source).
    """
    start = facts["started_from"]
    origin = f"further from the weights that were in `{start}`" if start else "from random weights"
    ours = facts["own_texts"] == [OUR_TEXT]
    return f"""---
license: {"apache-2.0" if ours else "other"}
language: [zh]
library_name: transformers
pipeline_tag: text-generation
---

# A small Chinese base model ({facts["parameters"] / 1e6:.1f}M parameters)

A plain `LlamaForCausalLM` ({facts["layers"]} layers, hidden {facts["hidden"]}, {facts["heads"]} query \
and {facts["kv_heads"]} key/value heads, tied embeddings) with a byte-level BPE vocabulary of \
{facts["vocabulary"]:,}, trained {origin} by `script/ptm_tiny_llm.sh`. It is the base to \
try LoRA fine-tuning on: small enough for any machine, and too small to know much.

## Text

| text | content | licence | documents | characters | tokens seen |
|---|---|---|---|---|---|
{source_rows(facts)}

Documents were cleaned, deduplicated and split by document; {facts["heldout_share"]:.1%} of them are
held out, but none of those that are conversations only (chat, patterns, turns). None of the fetched text is part of this folder.

## Training

{facts["steps"]:,} optimizer steps, {facts["tokens"] / 1e6:.2f}M tokens in rows of {facts["length"]}, \
{facts["seconds"] / 60:.0f} minutes; {OPTIMIZERS[facts["optimizer"]]}; \
warm-up, stable rate, linear decay\
{share_kept(facts["start_share"])}.

## Results

Bits per character on held-out text, lower is better (the weights as exported, in bfloat16):

| text | bits per character |
|---|---|
{result_rows(facts["results"])}

`hsk-sentences-audio` (everyday sentences) was never trained on.

## Limits

It has seen {facts["tokens"]:,} tokens. Sentences come out well formed; their content is often invented.
Use it for experiments, not for facts, advice or anything that matters.

## Licence

{"The weights are ours, under Apache-2.0." if ours else "Whoever trained them says so."} The texts keep the licences in the table.
"""
