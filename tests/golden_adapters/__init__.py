"""Names and conventions of the peers whose numbers are recorded in golden/: one module per peer.

Each module maps the peer's functions to our public ones (`ADAPTERS`) and lists what has no counterpart, with the reason
(`OUT_OF_SCOPE`). Adapters only rename, lay out, and apply the plain step by which the peer's convention differs from
ours: 1e-8 in a denominator, no 1/2 in the value loss, raw scores of groups of one.
"""

from golden_adapters import (
    cleanrl,
    nemo_rl,
    openrlhf,
    prime_rl,
    rlax,
    stable_baselines3,
    torchrl,
    trl,
    verl,
)
from golden_adapters.comparing import Peer

PEERS = {
    module.__name__.rpartition(".")[2]: Peer(module.ADAPTERS, module.OUT_OF_SCOPE)
    for module in (cleanrl, nemo_rl, openrlhf, prime_rl, rlax, stable_baselines3, torchrl, trl, verl)
}
