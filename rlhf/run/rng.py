"""The state of every random number generator a training program draws from, to continue a run exactly."""

import random
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """Python's, numpy's global, torch's CPU and every CUDA device's generator, as `save_state` can save it.

    Returns:
        {"python", "numpy": dicts of int64 words and numbers; "torch": u8 [n]; "cuda": list of u8 [n], by device}.
    """
    version, words, gauss = random.getstate()
    # The global numpy generator is what libraries beneath draw from, old-fashioned as it is.
    legacy: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    return {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "words": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
            "position": int(legacy["state"]["pos"]),
            "has_gauss": int(legacy["has_gauss"]),
            "gauss": float(legacy["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Set every generator to what `rng_state` returned; the tensors may be on any device.

    CUDA states of devices that this machine lacks are skipped: their draws cannot be continued here.
    """
    python, legacy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    np.random.set_state(  # noqa: NPY002
        {
            "bit_generator": "MT19937",
            "state": {"key": legacy["words"].cpu().numpy().astype(np.uint32), "pos": legacy["position"]},
            "has_gauss": legacy["has_gauss"],
            "gauss": legacy["gauss"],
        }
    )
    torch.set_rng_state(state["torch"].cpu())
    for device, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(device_state.cpu(), device)
