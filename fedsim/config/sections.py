"""How an experiment is run: training, evaluation, messages, simulation, execution.

Types and bounds are in the annotations, a sentence is under each field; what a bound cannot say is a validator beside its fields.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from fedsim.core.section import Count, Natural, OneOf, Positive, Share, section, wrong

MOST_EXAMPLES = 10**8  # of a model per round: their order is drawn at once and held in memory

NotNegative = Annotated[float, Field(ge=0)]
Trace = Annotated[list[Literal[0, 1]], Field(min_length=1)]
Workers = Annotated[int, Field(ge=1, le=1024)]  # more than any machine has cores is a slip that would take it down


def _known_type(name: str) -> str:
    from fedsim.channel.codecs import canonical  # torch comes with it

    try:
        return canonical(name)
    except ValueError as error:
        raise ValueError(str(error)) from None  # a UserError would stand without the key


def _known_device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise wrong("", device, "is not a device; use cpu, cuda or cuda:N")
    return device


DataType = Annotated[str, AfterValidator(_known_type)]
Device = Annotated[str, AfterValidator(_known_device)]


@section
class CohortKeys:
    """Client sampling."""

    size: Count | Literal["all"] = "all"
    """Clients sampled per round, without replacement; or all. With `poisson` as many as are expected."""
    sampler: Literal["fixed", "poisson"] = "fixed"
    """fixed: so many clients in each round; poisson: each client with probability size / clients, independently, so that a cohort may also be empty."""


@section
class LocalWork:
    """Local training: what one client does in one round."""

    steps: Count | None = None
    """Optimizer steps per client and round, each on a full batch; the examples are reshuffled after every pass. Excludes epochs."""
    epochs: Annotated[int, Field(ge=1, le=MOST_EXAMPLES)] | None = None
    """Passes over the client's examples per round; the last batch of a pass may be smaller. 1 if neither steps nor epochs is given."""
    batch_size: Count = 32
    """Examples per optimizer step."""
    micro_batch: Count | None = None
    """Examples per forward and backward pass; null = the whole batch. Changes memory and speed, not the results."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """torch's AdamW or SGD."""
    lr: Positive = 1e-3
    """Peak learning rate."""
    weight_decay: NotNegative = 0.01
    """Weight decay of every trained tensor, as torch's optimizer defines it."""
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = Field(default_factory=lambda: [0.9, 0.999])
    """Decay rates of the two moment estimates of AdamW."""
    eps: Positive = 1e-8
    """AdamW's epsilon."""
    momentum: Share = 0.0
    """SGD's momentum."""
    clip: Positive | None = 1.0
    """Maximum global norm of a client's gradient (gradient clipping); null = no clipping."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up: constant, or a half cosine or a straight line from lr to min_lr at the horizon."""
    warmup: Natural = 0
    """Steps of linear warm-up from zero."""
    min_lr: NotNegative = 0.0
    """Learning rate at the end of a cosine or linear schedule, and after it."""
    horizon: Count | None = None
    """Step at which a cosine or linear schedule ends; null = the steps of the whole run (or of the round, with schedule_over: round)."""
    schedule_over: Literal["run", "round"] = "run"
    """`run`: one learning-rate schedule across all rounds; `round`: restart the schedule every round."""
    keep_state: bool = True
    """Whether clients keep their optimizer state between rounds (otherwise it is reset). Local-only and centralized training always keep it."""
    shuffle: bool = True
    """Reshuffle the client's examples before every pass."""
    drop_last: bool = False
    """With epochs: drop the smaller last batch of a pass."""

    @model_validator(mode="after")
    def _check(self) -> LocalWork:
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "epochs", 1)
        if self.steps is not None:
            if self.epochs is not None:
                both = f"and local.epochs={self.epochs} exclude each other; set one of them to null"
                raise wrong("steps", self.steps, both)
            if self.drop_last:
                raise wrong("drop_last", True, "goes with epochs; work in steps always draws full batches")
            if self.steps * self.batch_size > MOST_EXAMPLES:
                many = f"x batch_size={self.batch_size} are more than {MOST_EXAMPLES} examples per round; lower one of them"
                raise wrong("steps", self.steps, many)
        if self.micro_batch is not None and self.micro_batch > self.batch_size:
            raise wrong("micro_batch", self.micro_batch, f"is above batch_size={self.batch_size}")
        if self.min_lr > self.lr:
            raise wrong("min_lr", self.min_lr, f"is above lr={self.lr}")
        if self.optimizer == "adamw" and self.momentum != 0:
            raise wrong("momentum", self.momentum, "is a key of sgd; adamw takes betas")
        if self.horizon is not None:
            if self.schedule == "constant":
                raise wrong("horizon", self.horizon, "needs local.schedule=cosine or linear")
            if self.horizon <= self.warmup:
                raise wrong("horizon", self.horizon, f"is not beyond warmup={self.warmup}")
        return self


@section
class Central:
    """How the budget of centralized training is matched to federated training."""

    match: Literal["epochs", "steps"] = "epochs"
    """`epochs`: as many examples per round as all sampled clients together; `steps`: as many optimizer steps as one client."""


@section
class Best:
    """How the best model is selected on the validation examples."""

    metric: Literal["accuracy", "loss", "exact_match", "macro_f1", "perplexity"] | None = None
    """Validation metric; null = accuracy where there are label words or a head, else loss."""
    mode: Literal["max", "min"] | None = None
    """Whether a higher or a lower value is better; null = min for loss and perplexity, max otherwise."""


@section
class Checkpoint:
    """How often the state of the run is saved."""

    every: Count = 1
    """Rounds between two checkpoints; a crash loses at most this many rounds."""
    keep: Count = 2
    """Number of checkpoints kept; older ones are deleted."""
    shard_mb: Count = 1024
    """Maximum size of a safetensors file in a checkpoint or an exported full model, in MiB; a larger tensor gets a file of its own."""


@section
class Evaluate:
    """When and how models are evaluated on the validation examples."""

    every_steps: Count | None = None
    """Evaluate a client within a round after every N of its optimizer steps since the start; null = only after its round."""
    every_rounds: Count = 1
    """Evaluate every N rounds, and always after the last."""
    clients: bool = True
    """Also evaluate the clients of a federated round just before aggregation; otherwise the global model alone."""
    batch_size: Count = 64
    """Examples per evaluation batch."""
    generate: bool = False
    """Also generate answers greedily and count exact matches (causal LM)."""
    max_new_tokens: int = Field(32, ge=1, le=1 << 16)
    """Maximum length of a generated answer, in tokens."""
    cross_site: bool = False
    """After training, evaluate every model (each client's own, global, centralized) on every client's own validation examples: `cross_site/METRIC.csv`. For at most 100 clients."""
    max_examples: Count | None = None
    """Evaluate on at most this many validation examples: a random subset, the same for every model, round and seed; null = all. Test scores are always of all test examples."""


@section
class Training:
    """How clients share a device."""

    lanes: Count | Literal["auto", "measure"] = "auto"
    """Number of clients trained in one forward and backward pass. auto = a rule on the sizes of experiment and base model and on the kind of device, the same on every machine; measure = timed at the run's first start, so another start may choose another number, with other last bits; 1 = one client after another, PEFT's own model in padded batches."""
    checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass instead of keeping them; auto = if one lane does not fit into memory otherwise."""
    packing: bool = False
    """Full fine-tuning only: examples are concatenated without padding, each attending to itself alone; a pass takes as many as fit into local.micro_batch x data.max_length tokens. Adapters in lanes are always trained like this. An error for bases whose layers do not support it, e.g. GPT-Neo."""
    master_weights: bool = True
    """Full fine-tuning under a 16-bit model.dtype: weights, gradients and optimizer state in float32, computation in 16 bits; false = everything in 16 bits, in half the memory. Sums over clients are float32 either way."""


@section
class Aggregation:
    """Memory of aggregation; the results do not depend on it."""

    chunk_mb: Count = 16
    """Parameters that are summed, encoded or saved at a time, in MiB of float32; a round needs this much memory beside the global parameters and their running sum."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the global parameters and the running sum are kept: auto = on the training device; cpu = in host memory, which leaves device memory to training; cuda = as auto, but an error without a GPU."""


@section
class Messages:
    """Compression of what server and clients send; training and aggregation stay in full precision."""

    up: DataType | None = None
    """Data type of a client's update: fp32, fp16, bf16, blockwise8 (8 bits per value) or nf4 (4 bits); null = no conversion."""
    down: DataType | None = None
    """Data type of the global parameters that a client receives and starts from; same values as `up`."""
    error_feedback: bool = False
    """Error feedback: each client keeps the compression error of its update and adds it to its next one."""

    @model_validator(mode="after")
    def _check(self) -> Messages:
        if self.error_feedback and self.up is None:
            raise wrong("error_feedback", True, "needs a lossy type; set messages.up, e.g. nf4")
        return self


@section
class Faults:
    """What happens to a client whose loss or update is not finite, or whose update is too large."""

    policy: Literal["fail", "skip", "clip"] = "fail"
    """`fail`: abort and name the client; `skip`: drop the client's update for this round; `clip`: scale an update above `max_norm` down to it, and skip one that is not finite."""
    max_norm: Positive | None = None
    """Maximum 2-norm of a client's update over all trained parameters; null = no limit. Federated rounds only."""

    @model_validator(mode="after")
    def _check(self) -> Faults:
        if self.policy == "clip" and self.max_norm is None:
            raise wrong("policy", "clip", "needs faults.max_norm, the norm to scale updates down to")
        return self


@section
class Attackers:
    """Clients that attack federated training; they are drawn by the seed."""

    fraction: Annotated[float, Field(gt=0, le=1)]
    """Share of the clients that attack."""
    kind: Literal["sign_flip", "gaussian", "label_flip", "scaled"]
    """What they do: send minus their update, noise, or their update times `factor`; or train on the class C - 1 - c instead of c."""
    factor: float = 10.0
    """For `scaled`: what they multiply their update by."""
    std: Positive = 1.0
    """For `gaussian`: standard deviation of what they send."""


@section
class Simulation:
    """Client availability, dropout and stragglers, drawn by the seed; see docs/simulation.md."""

    availability: Annotated[float, Field(gt=0, le=1)] | dict[str, Trace] = 1.0
    """Probability that a client is available in a round, or {client: [1, 0, ...]}, a 0/1 trace per client, repeated cyclically. In all modes the cohort is sampled from the available clients."""
    drop: float = Field(0.0, ge=0, le=1)
    """Probability that a client fails during a round; its work is lost."""
    speeds: Positive | Annotated[list[Positive], Field(min_length=2, max_length=2)] | dict[str, Positive] | None = None
    """Compute speed in tokens per second: one number, a range [min, max] from which each client's speed is drawn log-uniformly, or {client: number}; null = no simulated clock."""
    deadline_s: Positive | None = None
    """Simulated seconds that the server waits in a round; null = until all clients have finished."""
    attackers: Attackers | None = None
    """Clients that attack; null = none."""
    late: Literal["drop", "next"] = "drop"
    """Updates after the deadline: `drop` discards them, `next` adds them in the next round, in which the client is not sampled."""

    @model_validator(mode="after")
    def _check(self) -> Simulation:
        if isinstance(self.speeds, list) and self.speeds[0] > self.speeds[1]:
            raise wrong("speeds", self.speeds, "is not [min, max]; swap the two")
        if self.deadline_s is not None and self.speeds is None:
            raise wrong("deadline_s", self.deadline_s, "needs simulation.speeds")
        if self.late != "drop" and self.deadline_s is None:
            raise wrong("late", self.late, "needs simulation.deadline_s")
        return self


@section
class AutoExecutor:
    """All CUDA devices, with one worker process each if there are several; without any, this process on the CPU."""

    name: Literal["auto"] = "auto"
    workers: Workers | None = None
    """Number of worker processes on the default devices; null = one per CUDA device, none on the CPU."""
    threads: Workers | None = None
    """CPU threads per worker; null = the cores divided by the workers, fixed at the run's first start."""
    hang_s: Positive | None = 600.0
    """As for `pool`; null = wait forever. No effect without worker processes."""


@section
class Serial:
    """Everything in this process, on one device."""

    name: Literal["serial"] = "serial"
    device: Device = "auto"
    """cpu, cuda, cuda:1, ...; auto = the first CUDA device, else the CPU."""
    threads: Workers | None = None
    """CPU threads; null = all cores, fixed at the run's first start."""


@section
class Pool:
    """Worker processes, each on one device, for the whole run."""

    name: Literal["pool"] = "pool"
    devices: Annotated[list[Device], Field(min_length=1)] | Literal["auto"] = "auto"
    """Devices, e.g. [cuda:0, cuda:1] or [cpu]; auto = every CUDA device, else the CPU."""
    workers: Workers | None = None
    """Number of worker processes, assigned to the devices in turn; null = one per device."""
    threads: Workers | None = None
    """CPU threads per worker; null = the cores divided by the workers, fixed at the run's first start."""
    hang_s: Positive | None = 600.0
    """Seconds without a heartbeat after which a busy worker is replaced; null = wait forever. Heartbeats: a new task, each forward and backward pass, evaluation batch, generated token, and each chunk or record that is copied, added or saved. Not limited: loading the model, and waiting for a turn to add."""

    @model_validator(mode="after")
    def _check(self) -> Pool:
        if self.devices != "auto" and self.workers is not None and self.workers < len(self.devices):
            few = f"leaves some of the {len(self.devices)} devices without work"
            raise wrong("workers", self.workers, few)
        return self


@section
class Tracking:
    """Experiment trackers, through accelerate."""

    with_: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(default_factory=list, alias="with")
    """Trackers that receive the metrics of each round, and the figures; each needs its own package."""
    clients: bool = False
    """Log the metrics of each client; otherwise their mean, minimum and maximum."""


EXECUTORS = {"auto": AutoExecutor, "serial": Serial, "pool": Pool}
Executor = Annotated[AutoExecutor | Serial | Pool, OneOf(EXECUTORS, default="auto")]
