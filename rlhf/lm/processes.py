"""The Accelerator of who brings none."""

from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from rlhf.lm.config import FitRunConfig

# What one process does alone, writing a large checkpoint to a slow disk, the others wait for.
PATIENCE = timedelta(hours=2)


def default_accelerator(run: FitRunConfig) -> Accelerator:
    """accelerate's own choice of device; but the CPU on Apple's GPUs, which have no float64."""
    on_apple = torch.backends.mps.is_available()
    if on_apple:
        print("training on the CPU: Apple's GPU has no float64")
    return Accelerator(
        cpu=on_apple,
        log_with=run.log_with,
        project_dir=run.run_dir if run.log_with else None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
