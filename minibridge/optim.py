"""What both training scripts share: the device, the optimizer, the learning rate, one clipped step."""
import math

import torch

from minibridge.config import InputError
from minibridge.model import Decoder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """ "auto" is the first GPU if there is one, else the CPU. InputError for a device this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r}: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Of the matrix products; "auto" is bf16 on a GPU and fp32 on a CPU. Parameters and Adam's state stay fp32: in
    bf16 an update smaller than the weight's last bit (at lr 1e-6, nearly all of them) would be lost."""
    return DTYPES[name] if name != "auto" else DTYPES["bf16" if device.type == "cuda" else "fp32"]


def adamw(model: Decoder, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW over all parameters (arXiv 1711.05101); `update` sets its learning rate at every step."""
    return torch.optim.AdamW(model.parameters(), betas=betas, weight_decay=weight_decay, fused=True)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 0, schedule: str = "constant") -> float:
    """Learning rate of step 0 .. steps - 1. The first step is never 0, so none is wasted."""
    # 1) linear warm-up over `warmup` steps
    if step < warmup:
        return peak * (step + 1) / warmup
    # 2) constant after it
    if schedule == "constant":
        return peak
    # 3) or a half cosine, down to a tenth of the peak
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def update(model: Decoder, optimizer: torch.optim.Optimizer, rate: float, clip: float) -> float:
    """Clip the accumulated gradient to the norm `clip`, take one step at `rate`, drop the gradient.

    Returns the norm before clipping. A norm that is not finite raises InputError and changes nothing: the
    checkpoints written so far stay good.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item()
    if not math.isfinite(norm):
        raise InputError(f"the gradient norm is {norm}: stopped before this step, earlier checkpoints are whole")
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
