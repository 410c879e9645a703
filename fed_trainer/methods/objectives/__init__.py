# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What a client adds to its own gradients: FedProx, SCAFFOLD (option II), FedDyn, Ditto, the self-pruning of HetLoRA.

One object serves a whole run; clients are trained one after the other. A round is

```python
for client in sampled:
    previous = stored.get(client)
    objective.begin(state, previous)
    local, _ = trainer.local_round(state, ..., objective=objective)  # `add_gradients` in every optimiser step
    delta = subtract(local, state)
    client_state = objective.finish(delta)  # stays with the client
    sent = objective.to_server()  # travels with the delta
    if accepted(delta):  # a refused client leaves no trace
        objective.accept(sent, delta)
        stored[client] = client_state
objective.end_round()
```
"""

from .base import LocalObjective
from .feddyn import FedDynRegularizer
from .fedprox import Ditto, FedProx
from .rank_pruning import RankPruning
from .scaffold import Scaffold, check_plain_sgd


__all__ = [
    "LOCAL_OBJECTIVES",
    "Ditto",
    "FedDynRegularizer",
    "FedProx",
    "LocalObjective",
    "RankPruning",
    "Scaffold",
    "check_plain_sgd",
]

LOCAL_OBJECTIVES: dict[str, type[LocalObjective]] = {
    "ditto": Ditto,
    "feddyn": FedDynRegularizer,
    "fedprox": FedProx,
    "rank_pruning": RankPruning,
    "scaffold": Scaffold,
}
"""By the name in the config."""
