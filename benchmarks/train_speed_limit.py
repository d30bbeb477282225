"""How fast this machine multiplies matrices, and how much of that a training step must do.

python benchmarks/train_speed_limit.py JOB.json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

Matrix = tuple[int, int]

LARGE = 1024
WIDEST = 8192  # a wider head is measured at this width: as fast, and sooner done
REPETITIONS = 20
ENOUGH_SECONDS = 0.2


def flops_of_step(
    linears: list[Matrix],
    num_layers: int,
    head: Matrix,
    rank: int,
    tokens: float,
    supervised: float,
) -> float:
    """Floating-point operations of an optimizer step, without those that nobody needs.

    Two a weight and token forward, two more for the gradient of the input; a frozen weight has no
    gradient of its own, LoRA's matrices have.  What queries, keys and values of the first layer read has
    no gradient; behind the attention of the last layer, and under the head, only a supervised
    token counts.  Attention scores, norms and the optimizer are left out, so the share is a little understated.

    Args:
        linears: ``(in, out)`` of the adapted linear layers of one layer: queries, keys, values, and the rest.
        head: ``(hidden, vocabulary)``.
        tokens: real tokens of a step, no padding.
        supervised: tokens of a step that have a label.
    """
    before, behind = (
        sum(4 * a * b + 6 * rank * (a + b) for a, b in part) for part in (linears[:3], linears[3:])
    )
    needless = sum(2 * a * b + 2 * rank * a for a, b in linears[:3])
    layers = num_layers * before + (num_layers - 1) * behind
    return tokens * (layers - needless) + supervised * (behind + 4 * head[0] * head[1])


def main() -> int:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    linears, head = [tuple(m) for m in job["linears"]], tuple(job["head"])
    result = {}
    for dtype in ("float32", "bfloat16"):
        work = [(job["tokens"], m, job["layers"]) for m in linears]
        work.append((job["supervised"], head, 1))
        result[dtype] = {
            "own": gflops(work, dtype),
            "large": gflops([(LARGE, (LARGE, LARGE), 1)], dtype),
        }
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")
    return 0


def gflops(work: list[tuple[int, Matrix, int]], dtype: str) -> float:
    """GFLOP/s over products of ``rows`` by each matrix, forward and back, weighted by ``times``."""
    flops, seconds, known = 0.0, 0.0, {}
    for rows, (inside, outside), times in work:
        key = (rows, inside, min(outside, WIDEST))
        if key not in known:
            known[key] = _seconds(*key, dtype)
        flops += times * 4 * rows * inside * outside
        seconds += times * known[key] * outside / key[2]
    return flops / seconds / 1e9


def _seconds(rows: int, inside: int, outside: int, dtype: str) -> float:
    """Best time of ``x Wᵀ`` and ``g W`` together."""
    import torch
    import torch.nn.functional as F

    kind = getattr(torch, dtype)
    x, g = torch.randn(rows, inside).to(kind), torch.randn(rows, outside).to(kind)
    weight = torch.randn(outside, inside).to(kind)
    times, begin = [], time.perf_counter()
    while not times or (len(times) < REPETITIONS and time.perf_counter() - begin < ENOUGH_SECONDS):
        start = time.perf_counter()
        F.linear(x, weight)
        g @ weight
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    sys.exit(main())
