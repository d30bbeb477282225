"""Does a merged model say what the adapter said?  Measured on probe prompts, kept beside the weights.

Three models are compared: the base with the adapter beside it (the reference), the merged one in
float32, and the merged one as it was read back from disk.  All compute in float32, so that what is
measured is the merge and the rounding of the weights, and nothing of a processor's short cuts.
The probes are the golden conversations, each followed by the reference's own greedy reply; every
position counts.

The float32 limit lies between what correct merges were measured to cost and what wrong ones do; the
others bound the rounding alone.  The measurements are in docs/export.md.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from tinyllm.chat_format import chat_format_of
from tinyllm.errors import UserError
from tinyllm.golden import CONVERSATIONS

REPLY_TOKENS = 24
MAX_PROBE_TOKENS = 256


@dataclass(frozen=True)
class Limits:
    """What a merge may cost: ``logit`` is the largest difference over the logits' spread."""

    logit: float
    kl: float
    agreement: float


LIMITS = {
    "float32": Limits(logit=1e-3, kl=5e-6, agreement=0.995),
    "float16": Limits(logit=1e-1, kl=1e-4, agreement=0.97),
    "bfloat16": Limits(logit=1.0, kl=1e-2, agreement=0.93),
    "q8_0": Limits(logit=2.0, kl=5e-2, agreement=0.93),
}


@dataclass(frozen=True)
class Comparison:
    """How far one model's predictions lie from another's.

    Attributes:
        max_logit_difference: largest absolute difference of two logits.
        logit_spread: standard deviation of the reference's logits, what a difference is held against.
        mean_kl, max_kl: Kullback-Leibler divergence from the reference, nats per position.
        greedy_agreement: share of positions at which both like the same token best.
        num_positions: how many positions were compared.
    """

    max_logit_difference: float
    logit_spread: float
    mean_kl: float
    max_kl: float
    greedy_agreement: float
    num_positions: int

    @property
    def relative(self) -> float:
        """The largest difference in units of the spread."""
        return self.max_logit_difference / max(self.logit_spread, 1e-12)

    def problems(self, limits: Limits) -> list[str]:
        """What lies over a limit, in words; a NaN lies over every limit."""
        rows = (
            ("logits differ by", self.relative, limits.logit, "of their spread, allowed"),
            ("mean KL is", self.mean_kl, limits.kl, "nats, allowed"),
            ("greedy choices differ at", 1 - self.greedy_agreement, 1 - limits.agreement,
             "of the positions, allowed"),
        )  # fmt: skip
        return [f"{a} {got:.2g} {b} {most:.2g}" for a, got, most, b in rows if not got <= most]


@torch.no_grad()
def probe_ids(model, tokenizer) -> list[torch.Tensor]:
    """Probes ``(1, T)``: golden prompts, each with the model's greedy reply behind it."""
    chat_format = chat_format_of(tokenizer)
    probes = []
    for turns in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in turns[:-1]]
        try:
            ids = chat_format.encode_prompt(messages)[-MAX_PROBE_TOKENS:]
        except UserError:  # the base's own template refuses this one
            continue
        prompt = torch.tensor([ids], device=model.device)
        probes.append(_with_reply(model, prompt, tokenizer.eos_token_id))
    assert probes, "no golden conversation fits this template"
    return probes


def _with_reply(model, prompt: torch.Tensor, eos_token_id: int | None) -> torch.Tensor:
    """Append the greedy reply, token by token: free of a base's own generation settings."""
    ids = prompt
    for _ in range(REPLY_TOKENS):
        token = model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
        if token.item() == eos_token_id:
            break
    return ids


@torch.no_grad()
def logits_of(model, probes: list[torch.Tensor]) -> torch.Tensor:
    """Logits at every position of every probe, ``(N, V)`` float32 on the CPU."""
    rows = [model(input_ids=ids.to(model.device)).logits[0] for ids in probes]
    return torch.cat(rows).float().cpu()


def certify(
    reference: torch.Tensor, model, probes: list[torch.Tensor], name: str, precision: str
) -> Comparison:
    """Compare a model's logits with the reference ``(N, V)``; a UserError over the limits."""
    comparison = compare(reference, logits_of(model, probes))
    check(name, comparison, precision)
    return comparison


def compare(reference: torch.Tensor, other: torch.Tensor) -> Comparison:
    """Compare two ``(N, V)`` logits."""
    log_p, log_q = reference.log_softmax(-1), other.log_softmax(-1)
    # rounding may leave a hair below zero, which no divergence can be
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0.0)
    same = (reference.argmax(-1) == other.argmax(-1)).float()
    return Comparison(
        max_logit_difference=(reference - other).abs().max().item(),
        logit_spread=reference.std().item(),
        mean_kl=kl.mean().item(),
        max_kl=kl.max().item(),
        greedy_agreement=same.mean().item(),
        num_positions=len(reference),
    )


def check(name: str, comparison: Comparison, precision: str) -> None:
    """Raise a UserError when a merge costs more than its precision explains."""
    problems = comparison.problems(LIMITS[precision])
    if problems:
        raise UserError(
            f"nothing was written: the {name} model does not say what the adapter says: "
            f"{'; '.join(problems)} in {precision}; write a higher precision, or keep the adapter "
            "beside its base"
        )


def certificate(
    facts: dict, precision: str, num_probes: int, comparisons: dict[str, Comparison]
) -> dict:
    """Content of ``merge_certificate.json``."""
    return {
        **facts,
        "precision": precision,
        "num_probes": num_probes,
        "reference": "the base in float32 with the adapter beside it",
        "comparisons": {name: asdict(c) for name, c in comparisons.items()},
        "limits": {"merged": asdict(LIMITS["float32"]), "reloaded": asdict(LIMITS[precision])},
        "passed": True,
    }


def summary(content: dict) -> str:
    """The certificate as Markdown, for the model card."""
    rows = [
        f"| {name} | {c['max_logit_difference']:.2e} ({c['logit_spread']:.2f}) | {c['mean_kl']:.2e} "
        f"| {c['greedy_agreement']:.2%} |"
        for name, c in content["comparisons"].items()
    ]
    head = "| against the adapter | largest logit difference (spread) | mean KL, nats | same greedy choice |"
    positions = next(iter(content["comparisons"].values()))["num_positions"]
    return (
        f"Merged in float32, written in {content['precision']}, and compared with the adapter beside its "
        f"base on {content['num_probes']} prompts ({positions} positions):\n\n"
        + "\n".join([head, "|---|---|---|---|", *rows])
    )
