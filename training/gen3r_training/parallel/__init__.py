"""Many processes as one run: the launch, what ranks say to each other, sharding of one model.

`start` reads what ``accelerate launch`` or ``torchrun`` began and returns a `Parallel`; `shard`
spreads a built module's weights (FSDP2) and, where asked, a sample's tokens (Ulysses) over it;
`make_optimizer` gives the optimiser that belongs to it.
"""

from __future__ import annotations

from gen3r_training.parallel.launch import Parallel, start
from gen3r_training.parallel.sharding import (
    backward,
    make_optimizer,
    master_mode,
    parameter_dtype,
    shard,
)
from gen3r_training.parallel.ulysses import check_heads

__all__ = [
    "Parallel",
    "backward",
    "check_heads",
    "make_optimizer",
    "master_mode",
    "parameter_dtype",
    "shard",
    "start",
]
