"""How many sequences fit: from free memory and from what each needs."""

import psutil
import torch

from rlhf.lm.generation.attention import LayerShape

SHARE = 0.8  # of free memory that is planned with; activations and fragments need the rest
SAMPLING_COPIES = 16  # bytes per slot and vocabulary entry: logits, probabilities and what truncation makes of them


def plan_slots(shapes: list[LayerShape], *, columns: int, vocabulary: int, at_most: int, free: int) -> int:
    """Slots that `free` bytes hold, between 1 and `at_most`: whether the first one fits is found out by trying."""
    per_slot = columns * sum(shape.bytes_per_token for shape in shapes) + vocabulary * SAMPLING_COPIES
    return max(1, min(at_most, int(SHARE * free) // per_slot))


def free_bytes(device: torch.device) -> int:
    """What a cache could take on this device now."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def is_out_of_memory(error: RuntimeError) -> bool:
    """CUDA's own error, or that of torch's allocator for CPUs."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
