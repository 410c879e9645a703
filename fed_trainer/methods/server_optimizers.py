# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
What the server does with the aggregated delta: the optimisers of Adaptive Federated Optimization (Reddi et al., 2020,
https://huggingface.co/papers/2003.00295, algorithm 2), FedAvgM (Hsu et al., 2019,
https://huggingface.co/papers/1909.06335), and the server's half of FedDyn (Acar et al., 2021,
https://huggingface.co/papers/2111.04263).

A step is `state = optimizer.step(state, delta)`, on dictionaries of tensors, in float32, kept in the dtypes of
`state`. A state in bfloat16 loses steps below its resolution. Methods that restart the adapter (FLoRA) must not be
combined with one: their delta is not a direction.
"""

from __future__ import annotations

import torch

from ..state.adapter_state import AdapterState
from ..state.checks import check_integer, check_number


__all__ = [
    "SERVER_OPTIMIZERS",
    "FedAdagrad",
    "FedAdam",
    "FedAvgM",
    "FedDyn",
    "FedYogi",
    "ServerOptimizer",
]


class ServerOptimizer:
    """
    The plain step `w <- w + lr Delta`, `"sgd"` in the config. With `lr=1` the new adapter is what the
    aggregation gave.

    Args:
        lr (`float`, *optional*, defaults to `1.0`):
            Server learning rate.
    """

    buffers: tuple[str, ...] = ()

    def __init__(self, lr: float = 1.0) -> None:
        check_number("lr", lr, lambda value: value > 0, "positive and finite")
        self.lr = lr
        self._buffers: dict[str, AdapterState] = {name: {} for name in self.buffers}

    def step(self, state: AdapterState, delta: AdapterState, num_sampled: int | None = None) -> AdapterState:
        """
        The next global adapter.

        Args:
            state (`dict[str, torch.Tensor]`):
                The global adapter; not changed.
            delta (`dict[str, torch.Tensor]`):
                What the aggregation gave, for all of `state` or a part of it (RoLoRA alternates). The rest
                stays as it is.
            num_sampled (`int`, *optional*):
                Number of clients that the mean was over; of interest to [`FedDyn`] only.
        """
        stepped = {}
        for key, tensor in state.items():
            if key in delta:
                direction = self._direction(key, delta[key].float())
                stepped[key] = _cast(torch.add(tensor.float(), direction, alpha=self.lr), tensor.dtype)
            else:
                stepped[key] = tensor
        return stepped

    def _direction(self, key: str, delta: torch.Tensor) -> torch.Tensor:
        return delta

    def _buffer(self, name: str, key: str, like: torch.Tensor, value: float = 0.0) -> torch.Tensor:
        if key not in self._buffers[name]:
            self._buffers[name][key] = torch.full_like(like, value)
        return self._buffers[name][key]

    def state_dict(self) -> AdapterState:
        """All that the next step depends on, as flat names for safetensors; copies."""
        return {
            f"{name}.{key}": tensor.clone()
            for name, tensors in self._buffers.items()
            for key, tensor in tensors.items()
        }

    def load_state_dict(self, state: AdapterState) -> None:
        """
        Take over a `state_dict`.

        Raises:
            ValueError: If it is that of another optimiser.
        """
        buffers: dict[str, AdapterState] = {name: {} for name in self.buffers}
        for entry, tensor in state.items():
            name, _, key = entry.partition(".")
            if name not in buffers:
                raise ValueError(
                    f"The state has {entry!r}, which {type(self).__name__} does not keep (it keeps "
                    f"{list(self.buffers)}). Resume with the server optimiser the run was started with."
                )
            buffers[name][key] = tensor.to(torch.float32, copy=True)
        incomplete = [name for name, tensors in buffers.items() if tensors.keys() != buffers[self.buffers[0]].keys()]
        if incomplete:
            raise ValueError(
                f"The state has no {incomplete[0]!r} for some of its tensors, which {type(self).__name__} keeps "
                "for all. Resume with the server optimiser the run was started with."
            )
        self._buffers = buffers


class FedAvgM(ServerOptimizer):
    """
    Server momentum: `v <- beta v + Delta`, `w <- w + lr v`.

    The momentum is a sum, as in `torch.optim.SGD`, not an average `(1 - beta) Delta`: a constant `Delta` ends up as
    steps of `lr Delta / (1 - beta)`, ten times `Delta` for `beta=0.9` and `lr=1`.

    Args:
        lr (`float`, *optional*, defaults to `1.0`):
            Server learning rate.
        beta (`float`, *optional*, defaults to `0.9`):
            Momentum.
    """

    buffers = ("momentum",)

    def __init__(self, lr: float = 1.0, beta: float = 0.9) -> None:
        super().__init__(lr)
        _check_unit("beta", beta)
        self.beta = beta

    def _direction(self, key: str, delta: torch.Tensor) -> torch.Tensor:
        return self._buffer("momentum", key, delta).mul_(self.beta).add_(delta)


class FedAdam(ServerOptimizer):
    """
    `m <- b1 m + (1 - b1) Delta`, `v <- b2 v + (1 - b2) Delta^2`, `w <- w + lr m / (sqrt(v) + tau)`, from `m = 0`
    and `v = tau^2`, without bias correction. The second moment is that of `Delta`, not of `m`.

    Args:
        lr (`float`, *optional*, defaults to `0.01`):
            Server learning rate: about the size of a step per coordinate.
        beta1 (`float`, *optional*, defaults to `0.9`):
            Decay of the first moment.
        beta2 (`float`, *optional*, defaults to `0.99`):
            Decay of the second moment.
        tau (`float`, *optional*, defaults to `0.001`):
            Degree of adaptivity: the larger, the closer to momentum.
    """

    buffers = ("momentum", "second_moment")

    def __init__(self, lr: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> None:
        super().__init__(lr)
        _check_unit("beta1", beta1)
        _check_unit("beta2", beta2)
        check_number("tau", tau, lambda value: value > 0, "positive and finite")
        self.beta1, self.beta2, self.tau = beta1, beta2, tau

    def _direction(self, key: str, delta: torch.Tensor) -> torch.Tensor:
        momentum = self._buffer("momentum", key, delta).mul_(self.beta1).add_(delta, alpha=1 - self.beta1)
        second_moment = self._buffer("second_moment", key, delta, self.tau**2)
        self._update_second_moment(second_moment, delta.square())
        return momentum / (second_moment.sqrt() + self.tau)

    def _update_second_moment(self, second_moment: torch.Tensor, squared: torch.Tensor) -> None:
        second_moment.mul_(self.beta2).add_(squared, alpha=1 - self.beta2)


class FedYogi(FedAdam):
    """
    [`FedAdam`] with `v <- v - (1 - b2) Delta^2 sign(v - Delta^2)`, which grows by no more than
    `(1 - b2) Delta^2` a round.
    """

    def _update_second_moment(self, second_moment: torch.Tensor, squared: torch.Tensor) -> None:
        second_moment.sub_(squared * torch.sign(second_moment - squared), alpha=1 - self.beta2)


class FedAdagrad(FedAdam):
    """
    [`FedAdam`] with `v <- v + Delta^2`.

    Args:
        lr (`float`, *optional*, defaults to `0.01`):
            Server learning rate.
        beta1 (`float`, *optional*, defaults to `0.0`):
            Decay of the first moment.
        tau (`float`, *optional*, defaults to `0.001`):
            Degree of adaptivity.
    """

    def __init__(self, lr: float = 0.01, beta1: float = 0.0, tau: float = 1e-3) -> None:
        super().__init__(lr, beta1=beta1, tau=tau)

    def _update_second_moment(self, second_moment: torch.Tensor, squared: torch.Tensor) -> None:
        second_moment.add_(squared)


class FedDyn(ServerOptimizer):
    """
    The server's half of FedDyn: `h <- h - alpha / m sum_k Delta_k` over the clients of the round,
    `w <- w + mean_k Delta_k - h / alpha`, with `m` the number of *all* clients. The mean is uniform. The clients'
    half is in `fed_trainer.methods.objectives`.

    Args:
        alpha (`float`):
            Weight of the regulariser, the same at the clients.
        num_clients (`int`):
            Number of all clients.
    """

    buffers = ("correction",)

    def __init__(self, alpha: float, num_clients: int) -> None:
        super().__init__()
        check_number("alpha", alpha, lambda value: value > 0, "positive and finite")
        check_integer("num_clients", num_clients, least=1)
        self.alpha, self.num_clients = alpha, num_clients
        self.num_sampled = num_clients

    def step(self, state: AdapterState, delta: AdapterState, num_sampled: int | None = None) -> AdapterState:
        """As [`ServerOptimizer.step`], for the uniform mean over `num_sampled` clients (all, if not given)."""
        self.num_sampled = self.num_clients if num_sampled is None else num_sampled
        return super().step(state, delta)

    def _direction(self, key: str, delta: torch.Tensor) -> torch.Tensor:
        correction = self._buffer("correction", key, delta)
        correction.sub_(delta, alpha=self.alpha * self.num_sampled / self.num_clients)
        return delta - correction / self.alpha


SERVER_OPTIMIZERS: dict[str, type[ServerOptimizer]] = {
    "sgd": ServerOptimizer,
    "fedavgm": FedAvgM,
    "fedadagrad": FedAdagrad,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
}
"""
By the name in the config; the one dictionary that is looked up, so that no name can mean a plain step by accident.
[`FedDyn`] is not in it: without the clients' half it is not FedDyn, so the local objective brings it.
"""


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """To `dtype`; to the nearest integer, where a cast would truncate a count of 6.9999 to 6."""
    return (tensor if dtype.is_floating_point else tensor.round()).to(dtype)


def _check_unit(name: str, value: float) -> None:
    check_number(name, value, lambda number: 0 <= number < 1, "in [0, 1)")
