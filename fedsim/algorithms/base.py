"""The interface of a federated algorithm. Its defaults are FedAvg.

An algorithm is a frozen dataclass in one file: its fields are the keys of the config section `algorithm`, its methods are
called on the clients (`start`, `scratch`, `adjust`, `after_step`, `finish`) and on the server (`step`). State is passed in and
handed back, never kept on `self`: it can then be checkpointed, sent to a worker and compared.

On a client every tensor has a leading lane axis `[K, ...]`, one lane for each client that trains beside others; only what was
received from the server has none. Written elementwise, the same lines serve K packed adapters, one adapter and a whole model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:  # a config is read before torch is loaded
    from torch import Tensor

    from fedsim.core.params import Layout, Message, Params

Factors = dict[str, "tuple[Tensor, Tensor]"]
"""Adapted layer -> B `[m, R]` and A `[R, n]`."""


# Rounds and steps at which it is looked up whether a name ever trains or travels.
_SAMPLES = (*range(64), *(1 << i for i in range(6, 21)))


@dataclass(frozen=True)
class ClientOptimizer:
    """The clients' optimizer, by the keys of the same names under `local`: adamw | sgd, the peak learning rate, SGD's momentum."""

    optimizer: str = "adamw"
    lr: float = 1e-3
    momentum: float = 0.0


@dataclass(frozen=True)
class Buffered:
    """An asynchronous server: it steps once `size` messages are there, while `clients` are at work all the time."""

    size: int
    clients: int


@dataclass(frozen=True)
class ClientView:
    """What an algorithm may look at while K clients train.

    Attributes:
        round: from 1.
        params: the global parameters that the round started from, as the clients received them, by name; `[...]`. Personal
            parameters are each client's own, `[K, ...]`; where clients have ranks, all are cut to these, `[K, ...]`.
        server: the server's state as they received it, by name, where the algorithm has `sends_state`; `[...]`.
        state: each client's own state as its last round left it, by name; `[K, ...]`.
        steps: optimizer steps each client has done in this round, `[K]`, int64.
        lr_sum: sum of the learning rates of these steps, `[K]`.
        part: the training that is looked at, one of the algorithm's `parts`.
        batch: which batch of the step, from 0.
        facts: what the algorithm `needs`, by name, `[K]`.
        rank: LoRA rank of each client, `[K]`, int64; None where the algorithm gives none.
        optim: the clients' optimizer.
    """

    round: int
    params: Params
    server: Params
    state: Params
    steps: Tensor
    lr_sum: Tensor
    part: str = "shared"
    batch: int = 0
    facts: Mapping[str, Tensor] = field(default_factory=dict[str, "Tensor"])
    rank: Tensor | None = None
    optim: ClientOptimizer = ClientOptimizer()


@dataclass
class Server:
    """What the server carries from round to round.

    Attributes:
        params: the global parameters, by name.
        state: the algorithm's state, by name.
        fold: adapted layer -> (B, A), whose product `step` adds to the frozen base; in units of the adapter, without its scale.
            The sum of all products is server state `fold/LAYER`, which `init` makes.
    """

    params: Params
    state: Params
    fold: Factors | None = None


@dataclass(frozen=True)
class Info:
    """What the server knows of a round.

    Attributes:
        round: from 1.
        clients: how many sent a message.
        weight: sum of their weights.
        all_clients, all_weight: the same of all clients of the experiment.
        shares: each client's share of the weight, `[clients]`, in the order of a stack; None without one.
        seed: of the experiment.
    """

    round: int
    clients: int
    weight: float
    all_clients: int
    all_weight: float
    shares: Tensor | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A federated algorithm. A method is a subclass that overrides what it does otherwise.

    Attributes:
        blockwise: the methods may be called on chunks of the parameters, one after another; false where one has to see whole
            tensors, or several of them together. Chunks are used only where all state and messages are laid out like the
            parameters.
        aggregates: message group -> how the clients' messages become one: a name (mean, sum) or an `Aggregator`. No group:
            nothing is sent or merged, and each client has a model of its own, in its state.
        exact: message groups that travel as they are whatever `messages.up` says, e.g. a number that others are divided by.
        sends_state: the server's state goes to the clients together with the parameters.
        parts: trainings that a client takes in a round, each in a lane of its own. With several, client state is named
            `PART/NAME` in `init`, and each part sees its own, by `NAME`. The first part is the one that metrics of
            steps count; the last one is the client's own model, which is evaluated.
        batches: batches of each step; the optimizer steps by the gradient of the last one. They are drawn one by one, or are
            all the same one (`same_batch`).
        lora: works on the factors of plain LoRA alone, which the server sees client by client.
        folds: the stack of a round's factors goes to the clients, who fold it into their base.
        needs: facts that are measured for it: `start_loss`, the mean loss of the received model on all training examples of the
            client; `optimizer_steps`, the steps behind the optimizer state that the client starts from, 0 for a fresh one.
        lives_on: parts whose optimizer state is kept from round to round whatever `local.keep_state` says; may be a property.
        adapters: names of the adapters that it is for; none = any, and full fine-tuning.
        takes_late: whether a message may arrive in a later round than it is made for.
        takes_ranks: whether clients may have LoRA ranks of their own, by `adapter.ranks`.
    """

    weights: Literal["samples", "steps", "uniform"] = "samples"
    """A client's weight in the mean: its number of examples, its optimizer steps in the round, or 1."""

    blockwise: ClassVar[bool] = True
    aggregates: ClassVar[Mapping[str, Any]] = {"update": "mean"}
    exact: ClassVar[frozenset[str]] = frozenset()
    sends_state: ClassVar[bool] = False
    parts: ClassVar[tuple[str, ...]] = ("shared",)
    batches: ClassVar[int] = 1
    same_batch: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()
    lora: ClassVar[bool] = False
    folds: ClassVar[bool] = False
    lives_on: ClassVar[frozenset[str]] = frozenset()
    adapters: ClassVar[frozenset[str]] = frozenset()
    takes_late: ClassVar[bool] = True
    takes_ranks: ClassVar[bool] = False

    @property
    def weighing(self) -> str:
        """The kind of weights of the messages: `weights`, where a method does not say otherwise."""
        return self.weights

    @property
    def first_steps(self) -> int:
        """Optimizer steps in front of the round's own, on batches of their own."""
        return 0

    def check_names(self, names: tuple[str, ...]) -> None:
        """Raise a ValueError, `KEY: ...`, where the algorithm does not suit the parameters that are trained."""

    def suits(self, optim: ClientOptimizer) -> None:
        """Raise a ValueError, `KEY: ...`, where the algorithm does not work with the clients' optimizer."""

    def buffered(self, cohort: int) -> Buffered | None:
        """How an asynchronous server works, for this `cohort.size`; None = in rounds of a cohort. A round is one server step."""
        return None

    def discount(self, staleness: int) -> float:
        """What the weight of a message is multiplied by that is made from the model of so many server steps ago."""
        return 1.0

    def trains(self, name: str, round: int, step: int) -> bool:
        """Whether a parameter trains at a step of the round, from 0; what does not keeps its value and its optimizer state."""
        return True

    def travels(self, name: str, round: int) -> bool:
        """Whether a parameter is part of the messages of a round; what is not stays at the server as it is.

        A parameter that trains and never travels is personal: each client keeps its own.
        """
        return True

    def changes(self, name: str, round: int) -> bool:
        """Whether the server may change a parameter in a round; what it has changed goes to the clients."""
        return self.travels(name, round)

    def rank(self, client: int) -> int | None:
        """LoRA rank of a client, by its number from 0, at most the adapter's; None = the adapter's.

        What lies beyond a client's rank is zero in what it receives, trains and sends.
        """
        return None

    def resets(self, name: str, round: int) -> bool:
        """Whether a parameter starts the round with fresh optimizer state."""
        return False

    def init(self, params: Params) -> tuple[Params, Params]:
        """State before round 1: (the server's, that of a client that takes part for the first time)."""
        return {}, {}

    def message(self, params: Params) -> Message:
        """Message group -> tensors of the names and shapes that a client sends in it; their values do not matter."""
        return dict.fromkeys(self.aggregates, params)

    def start(self, c: ClientView) -> Params:
        """The parameters a client starts its round from; with or without a lane axis."""
        return c.params

    def beside(self, c: ClientView) -> Factors:
        """Adapted layer -> B `[K, m, R]` and A `[K, R, n]`, whose product the client's model is without while it trains; in units
        of the adapter. No layer by default."""
        return {}

    def scratch(self, c: ClientView) -> Params:
        """Variables of this round alone, `[K, ...]`, that the other methods may change in place."""
        return {}

    def at(self, params: Params, scratch: Params, c: ClientView) -> Params:
        """Where the gradient of a batch is taken; the step is applied to `params`, which are left as they are."""
        return params

    def adjust(self, grads: Params, params: Params, scratch: Params, c: ClientView) -> None:
        """Change the gradients of a batch in place, before they are clipped; of the parameters that train at this step."""

    def after_step(self, params: Params, scratch: Params, c: ClientView, lr: Tensor) -> None:
        """Change the parameters that train at this step in place, after a step with these learning rates, `[K]`."""

    def carried(self, params: Params, c: ClientView) -> Params:
        """The factors whose products the server should make the mean of, after the last step; what `lora_aggregation_error` is
        measured against."""
        return params

    def finish(self, params: Params, scratch: Params, c: ClientView) -> tuple[Message, Params]:
        """(what the clients send, by group; their new state), after their last step."""
        return {"update": {n: p - c.params[n] for n, p in params.items()}}, c.state

    def adapted(self) -> Algorithm | None:
        """What each client trains of the global model, in one optimizer step, before its own model is scored; None = clients' models
        are not made so."""
        return None

    def step(self, server: Server, reduced: Message, info: Info) -> Server:
        """The server's next parameters and state, from the merged messages."""
        return Server({n: p + reduced["update"][n] for n, p in server.params.items()}, server.state)

    @property
    def warning(self) -> str | None:
        """One line that a user should read before training."""
        return None

    def overrides(self, *hooks: str) -> bool:
        """Whether any of these methods is other than FedAvg's."""
        return any(getattr(type(self), hook) is not getattr(Algorithm, hook) for hook in hooks)

    def stays(self, names: Iterable[str]) -> frozenset[str]:
        """The parameters that neither clients send nor the server ever changes."""
        if not self.overrides("travels"):
            return frozenset()
        rounds = _SAMPLES[1:]
        return frozenset(n for n in names if not any(self.travels(n, r) or self.changes(n, r) for r in rounds))

    def personal(self, names: Iterable[str]) -> frozenset[str]:
        """The parameters that each client keeps: those that never travel, and train at some step."""
        stays = self.stays(names)
        if not self.overrides("trains"):
            return stays
        return frozenset(n for n in stays if any(self.trains(n, r, s) for r in _SAMPLES[1:] for s in _SAMPLES))

    def part_state(self, state: Params, part: str) -> Params:
        """The client state of one part, by the names that the part sees."""
        if len(self.parts) == 1:
            return state
        return {n.removeprefix(f"{part}/"): t for n, t in state.items() if n.startswith(f"{part}/")}

    @property
    def merges(self) -> bool:
        """Whether clients send anything."""
        return bool(self.aggregates)

    def messages(self, params: Layout) -> dict[str, Layout]:
        """Message group -> layout of what a client sends in it."""
        from fedsim.core.params import Layout, meta

        found = self.message(meta(params)) if self.merges else {}
        return {group: Layout.of(found[group]) for group in self.aggregates}

    def sent(self, state: Params) -> Params:
        """The part of the server's state that clients receive."""
        from fedsim.core.params import FOLD

        return state if self.sends_state else {n: t for n, t in state.items() if n.startswith(FOLD)}


def above_zero(section: Any, *names: str) -> None:
    """Raise a ValueError about the first of these fields that is no finite number above 0."""
    for name in names:
        if not 0 < getattr(section, name) < math.inf:
            raise ValueError(f"{name}: {getattr(section, name)} is not a number above 0")


def per_lane(values: Tensor, like: Tensor) -> Tensor:
    """Values `[K]`, one a lane, shaped to be broadcast against a tensor `[K, ...]`."""
    return values.view(-1, *[1] * (like.dim() - 1))


@dataclass(frozen=True, kw_only=True)
class Local(Algorithm):
    """Each client goes on from its own parameters, and nothing is ever merged. With one client it is plain training."""

    aggregates: ClassVar[Mapping[str, Any]] = {}

    def init(self, params: Params) -> tuple[Params, Params]:
        """Every client's state is its own parameters."""
        return {}, dict(params)

    def start(self, c: ClientView) -> Params:
        """The client's own parameters; in its first round these are the initial ones."""
        return c.state

    def finish(self, params: Params, scratch: Params, c: ClientView) -> tuple[Message, Params]:
        """(nothing to send, its parameters)."""
        return {}, params
