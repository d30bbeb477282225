"""What this Python can launch, as lines for ``script/launch.sh``:  python -m tinyllm.launch_probe

gpus=2            GPUs that PyTorch can use
bf16=1            whether they compute in bfloat16
torch=2.13.0      PyTorch's version
deepspeed=        why DeepSpeed cannot be used; empty when it can
"""

from __future__ import annotations

import contextlib
import io


def deepspeed_problem() -> str:
    """Why DeepSpeed cannot be imported, in one line; empty when it can."""
    try:
        # it greets on import
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            import deepspeed  # noqa: F401
    except Exception as error:  # a missing CUDA_HOME, a missing compiler, a wrong build, ...
        text = " ".join(str(error).split())[:150]
        return f"{type(error).__name__}: {text}" if text else type(error).__name__
    return ""


def main() -> None:
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    print(f"gpus={gpus}")
    print(f"bf16={int(bool(gpus) and torch.cuda.is_bf16_supported(including_emulation=False))}")
    print(f"torch={torch.__version__}")
    print(f"deepspeed={deepspeed_problem()}")


if __name__ == "__main__":
    main()
