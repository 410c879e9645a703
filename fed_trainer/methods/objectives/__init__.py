# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What a client adds to its own gradients: FedProx, SCAFFOLD (option II), FedDyn, Ditto, the self-pruning of HetLoRA.

An objective and `server = objective.server_half()` serve a whole run; clients are trained one after the other. A
round is

```python
server.begin_round()
for client in sampled:
    previous = stored.get(client)
    objective.begin(state, previous, server.to_client(client))
    (trained,) = trainer.local_rounds([Task(state, ..., objective=objective)])  # `add_gradients` in every step
    delta = subtract(trained.state, state)
    client_state = objective.finish(delta)  # stays with the client
    sent = objective.to_server()  # travels with the delta
    if accepted(delta):  # a refused client leaves no trace
        server.accept(client, sent, delta)
        stored[client] = client_state
server.end_round()
```
"""

from .base import LocalObjective, ServerHalf
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
    "ServerHalf",
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
