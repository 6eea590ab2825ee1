"""K adapters over one frozen base, trained in one forward and backward pass.

The base sees the rows of all lanes end to end (`fedsim.data.stream`). PEFT's own layers run as they are; only the leaves
that are trained - linear layers, IA3's vectors, the embedding of a prompt - are exchanged for K stacked sets of weights,
batched products in which lane k touches its own rows alone. So names, target rules, scales and the order of operations
stay PEFT's, and a new method whose trained leaves are linear layers packs without a line of code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.core.params import Layout
from fedsim.data.stream import Span, Stream, stream, stream_of
from fedsim.data.tokens import Tokens
from fedsim.models import flat
from fedsim.models.adapters import trained
from fedsim.models.base import position_offset
from fedsim.models.dropout import position_kinds
from fedsim.models.flat import Unsuitable
from fedsim.models.forward import Net, Recompute, head_dtype

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")
_BY_LENGTH = {"dynamic", "longrope", "su", "yarn_dynamic"}


class Lanes:
    """What the exchanged layers look at while a pass is under way.

    Attributes:
        stream: the rows of the pass; None outside a pass, when every layer is PEFT's own again.
        prefix: keys and values in front of each row, `[R, V, layers, 2, H, d]`; None but for prefix tuning.
    """

    def __init__(self) -> None:
        self.stream: Stream | None = None
        self.prefix: Tensor | None = None
        self.prompt: Span | None = None
        self._last: tuple[Tensor, Span, Tensor] | None = None

    def begin(self, rows: Stream) -> None:
        """A pass begins."""
        self.stream, self.prefix, self._last = rows, None, None

    def end(self) -> None:
        """It is over, its backward pass too."""
        self.stream = self.prefix = self._last = None

    def span(self, kind: str) -> Span:
        """How the positions that a layer sees divide into lanes: those of tokens, rows, scored or prompt."""
        return self.prompt if kind == "prompt" else getattr(self.stream, kind)

    def split(self, x: Tensor, span: Span) -> Tensor:
        """`[..., D]` -> `[K, L, D]`; layers side by side on one input (query, key, value) share the result."""
        if self._last is not None and self._last[0] is x and self._last[1] is span:
            return self._last[2]
        out = span.split(x.reshape(-1, x.shape[-1]))
        if span.index is not None:
            self._last = (x, span, out)
        return out

    def put_prefix(self, prefix: Tensor) -> None:
        """Give each row its lane's prefix, `[K, V, layers, 2, H, d]`."""
        span, k = self.stream.rows, prefix.shape[0]  # a join, whose backward pass sums over a lane's rows
        wide = prefix.reshape(k, 1, -1).expand(-1, span.longest, -1)
        self.prefix = span.join(wide).reshape(-1, *prefix.shape[1:])

    def prefix_of(self, module: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values in front of these rows in an attention layer, each `[R, H, V, d]`."""
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            raise Unsuitable("its attention layers have no numbers, which prefix tuning needs")
        both = self.prefix[:, :, layer].index_select(0, rows).permute(2, 0, 3, 1, 4)  # [2, R, H, V, d]
        return both[0], both[1]


class StackedNet:
    """A model with K sets of trained weights.

    Args:
        model: from `attach`, on its device; changed in place: it is PEFT's again outside a pass.
        own: the adapter's modules.
        task: causal_lm | sequence_classification.
        device: where the model lies.

    Raises:
        Unsuitable: if the method or the base cannot be packed; the text says why.
    """

    def __init__(self, model: nn.Module, own: list[nn.Module], *, task: str, device: torch.device) -> None:
        self.model, self.task, self.device = model, task, device
        self.plain = Net(model, own, task=task, device=device, base_dropout=False, autocast=None)
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        params = trained(model)
        self.layout = Layout.of(params)
        self.offset = position_offset(self.base.config)
        self.virtual, self.prefix = 0, 0
        self._leaves: dict[str, Tensor] = {}
        self._names = {id(p): n for n, p in params.items()}
        self._own_params = params
        self._lanes = Lanes()
        self._head_out: Tensor | None = None
        self._recompute: Recompute | None = None
        self._fast = False
        self._undo: list[Callable[[], Any]] = []
        if reason := _cannot_pack(self.base, task):
            raise Unsuitable(reason)
        self.draws = self.plain.draws
        try:
            self._stack_prompt()
            self._stack_layers()
            self._hook_head()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the model back as it was."""
        for undo in reversed(self._undo):
            undo()
        self._undo = []

    # --------------------------------------------------------------------------------------------- lanes

    @property
    def lanes(self) -> int:
        """K, lanes bound at the moment."""
        return self._count

    def bind(self, weights: Tensor, grad: Tensor | None) -> None:
        """Use these weights from now on.

        Args:
            weights: `[K, N]`, a row a lane; read in place.
            grad: `[K, N]`, gradients are added here; None where nothing is trained.
        """
        self._count = len(weights)
        self._leaves = {n: v.detach().requires_grad_(grad is not None) for n, v in self.layout.lanes(weights).items()}
        self._grads = None if grad is None else list(self.layout.lanes(grad).values())

    def show(self, lane: int) -> None:
        """Put a lane's weights into the model itself, for what works on one model: generation."""
        with torch.no_grad():
            for name, parameter in self._own_params.items():
                parameter.copy_(self._leaves[name][lane])

    def begin(self, seeds: Sequence[int]) -> None:
        """A pack begins: streams of dropout, one a lane."""
        self.draws.begin(seeds)

    def checkpoint(self, on: bool) -> None:
        """Compute each layer's activations a second time instead of keeping them, or not.

        Raises:
            UserError: if the architecture has no layers that can be.
        """
        if on and self._recompute is None:
            self._recompute = Recompute(self.base, lambda: self._lanes.stream is not None)
            self._undo.append(self._recompute.release)
        if self._recompute is not None:
            self._recompute.on = on

    def train(self, on: bool) -> None:
        """Switch the adapter's own dropout on or off; the base's is always off."""
        self.plain.train(on)

    # -------------------------------------------------------------------------------------------- passes

    def backward(self, tokens: Tokens, rows: Sequence[np.ndarray], answers: Tensor) -> tuple[Tensor, list[int]]:
        """Add the gradient of each lane's own mean loss.

        Args:
            tokens: the training split.
            rows: row numbers of the pass, one array a lane; some may be empty.
            answers: scored positions of each lane's whole optimiser step, `[K]`.

        Returns:
            Sums of the negative log-likelihood over `answers`, in nats, `[K]`; and tokens computed, by lane.
        """
        with self._pass(stream_of(tokens, rows, **self._keys())) as rows_of:
            logits = self._logits(rows_of)
            nll = F.cross_entropy(logits, rows_of.targets, reduction="none")
            loss = rows_of.scored.split(nll[:, None]).sum(dim=(1, 2)) / answers
            # Asked for, not left in `.grad`: the views of a [K, N] tensor have strides that autograd would copy around.
            found = torch.autograd.grad(loss.sum(), list(self._leaves.values()))
        torch._foreach_add_(self._grads, found)
        computed = list(rows_of.tokens.sizes)
        return loss.detach(), computed

    def logits(
        self, sequences: Sequence[np.ndarray], prompts: np.ndarray | None, pad_id: int
    ) -> tuple[Tensor, np.ndarray, Tensor]:
        """The same rows under each lane's weights.

        Args:
            sequences: tokens of each row.
            prompts: tokens of each row's prompt, or None for a classification head.
            pad_id: not looked at.

        Returns:
            Logits `[K, S, V]` at scored positions (`[K, R, L]` of rows), the row of each position `[S]`, and the tokens
            that follow there, `[S]`.
        """
        k = self._count
        lengths = np.tile([len(s) for s in sequences], k)
        batch = stream(
            np.tile(np.concatenate(sequences), k),
            lengths,
            [len(sequences)] * k,
            prompts=None if prompts is None else np.tile(prompts, k),
            targets=np.zeros(len(lengths), dtype=np.int64) if prompts is None else None,
            **self._keys(),
        )
        with self._pass(batch):
            out = self._logits(batch)
        out = out.view(k, -1, out.shape[-1])
        return out, batch.row_of[: out.shape[1]], batch.targets[: out.shape[1]]

    def _keys(self) -> dict[str, Any]:
        keys = {"virtual": self.virtual, "offset": self.offset + self.prefix, "device": self.device}
        return keys | {"round_up": self._fast and self.device.type == "cpu"}

    @contextmanager
    def _pass(self, rows: Stream) -> Any:
        config = self.base.config
        before = config._attn_implementation
        try:
            config._attn_implementation = flat.ATTENTION
            self._lanes.begin(rows)
            if self.plain.drops:
                *front, last = rows.tokens.sizes
                sizes = {"tokens": [*front, last - rows.filled], "scored": rows.scored.sizes, "rows": rows.rows.sizes}
                self.draws.next(sizes)
            yield rows
        finally:
            self._lanes.end()
            self._head_out = None
            config._attn_implementation = before

    def _logits(self, rows: Stream) -> Tensor:
        """`[S, V]`, or `[R, L]` under a classification head; at least float32."""
        inputs: dict[str, Tensor] = {"input_ids": rows.ids[None]}
        if self._prompts is not None:
            made = self._prompts()  # [K, V, D], or all that a prefix holds
            if self.prefix:
                self._lanes.put_prefix(made)
            else:
                inputs = {"inputs_embeds": self._with_prompt(rows, made)[None]}
        out = self.base(**inputs, position_ids=rows.positions[None], use_cache=False).logits
        if self._head_out is not None:
            out = self._head_out
        out = out.reshape(-1, out.shape[-1])
        return out if out.dtype == torch.float64 else out.float()

    def _with_prompt(self, rows: Stream, prompts: Tensor) -> Tensor:
        """`[N, D]`: embedded tokens, and in front of each row its lane's virtual tokens."""
        embedded = self.base.get_input_embeddings()(rows.ids)
        k, v, d = prompts.shape
        wide = prompts.reshape(k, 1, v * d).expand(-1, rows.rows.longest, -1)
        each = rows.rows.join(wide).reshape(-1, d)  # [R V, D]
        return embedded.index_copy(0, rows.virtual, each.to(embedded.dtype))

    # ------------------------------------------------------------------------------------------ stacking

    def _leaf(self, parameter: nn.Parameter) -> Callable[[], Tensor]:
        name = self._names[id(parameter)]
        return lambda: self._leaves[name]  # looked up at each use: `bind` exchanges it

    def _replace(self, layer: nn.Module, forward: Callable) -> None:
        layer.forward = forward
        self._undo.append(lambda: layer.__dict__.pop("forward", None))

    def _stack_prompt(self) -> None:
        """Prompt methods of PEFT: what makes the virtual tokens is stacked here, and put in front of rows by us."""
        self._prompts: Callable[[], Tensor] | None = None
        configs = getattr(self.model, "peft_config", {})
        config = configs.get("default") if configs else None
        if config is None or not config.is_prompt_learning:
            return
        encoder = self.model.prompt_encoder["default"]
        method = config.peft_type.value
        if method == "PROMPT_TUNING":
            head: nn.Module = nn.Identity()
        elif method == "P_TUNING" and config.encoder_reparameterization_type == "MLP":
            head = encoder.mlp_head
        elif method == "PREFIX_TUNING":
            head = encoder.transform if config.prefix_projection else nn.Identity()
        else:
            raise Unsuitable(f"its prompts are made by {type(encoder).__name__}, which has no stacked form")
        count, table = config.num_virtual_tokens, self._leaf(encoder.embedding.weight)

        def make() -> Tensor:
            tokens = table()  # [K, V, D]
            self._lanes.prompt = Span((count,) * len(tokens))
            return head(tokens.reshape(-1, tokens.shape[-1])).view(len(tokens), count, -1)

        if method != "PREFIX_TUNING":
            self.virtual, self._prompts = count, make
            return
        self._check_prefix(config)
        heads, dtype = config.num_attention_heads, self.model.base_model_torch_dtype
        shape = (config.num_layers, 2, heads, config.token_dim // heads)

        def make_prefix() -> Tensor:
            made = make()
            return (made if dtype is None else made.to(dtype)).unflatten(-1, shape)  # [K, V, layers, 2, H, d]

        self.prefix, self._prompts = count, make_prefix

    def _check_prefix(self, config: Any) -> None:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING as SPECIAL

        kind = self.base.config.model_type
        if kind in SPECIAL or kind.startswith(("gemma2", "gemma3", "gemma4")):
            raise Unsuitable(f"PEFT shapes the prefix for {kind} in a way of its own")
        if config.num_transformer_submodules != 1:
            raise Unsuitable("it has an encoder and a decoder")

    def _stack_layers(self) -> None:
        lanes, left = self._lanes, dict(self._own_params)
        kinds = position_kinds(self.model, self.task)
        if self._prompts is not None:
            left.pop(self._names[id(self.model.prompt_encoder["default"].embedding.weight)])
        for module in self.model.modules():
            module.fedsim_lanes = lanes
            self._undo.append(lambda m=module: m.__dict__.pop("fedsim_lanes", None))
            own = [p for p in module.parameters(recurse=False) if p.requires_grad]
            if hasattr(module, "ia3_l") and "default" in module.ia3_l:
                self._stack_ia3(module, kinds.get(id(module), "tokens"))
                left.pop(self._names[id(module.ia3_l["default"])])
            elif own and type(module) is nn.Linear and all(p.requires_grad for p in module.parameters()):
                self._stack_linear(module, kinds.get(id(module), "tokens"))
                for p in own:
                    left.pop(self._names[id(p)])
            elif not own and (fast := flat.fast_frozen(module)):
                self._fast = True
                original = module.forward
                self._replace(
                    module, lambda x, fast=fast, slow=original: fast(x) if lanes.stream is not None else slow(x)
                )
        if left:
            name = next(iter(left))
            owner = self.model.get_submodule(name.rpartition(".")[0])
            raise Unsuitable(f"it trains {name} in a {type(owner).__name__}, which has no stacked form")

    def _stack_linear(self, layer: nn.Linear, kind: str) -> None:
        """K weights `[K, O, I]` and biases `[K, O]` in place of one; `[..., I]` -> `[..., O]`."""
        lanes, original = self._lanes, layer.forward
        weight = self._leaf(layer.weight)
        bias = None if layer.bias is None else self._leaf(layer.bias)

        def forward(x: Tensor) -> Tensor:
            if lanes.stream is None:
                return original(x)
            span, w, b = lanes.span(kind), weight(), None if bias is None else bias()
            if flat.worth_a_loop(x, w, span):
                return flat.LaneLinear.apply(x.reshape(-1, x.shape[-1]), w, b, span.sizes).view(*x.shape[:-1], -1)
            split, turned = lanes.split(x, span), w.transpose(1, 2)  # [K, L, I], [K, I, O]
            y = split @ turned if b is None else torch.baddbmm(b[:, None], split, turned)
            return span.join(y).view(*x.shape[:-1], -1)

        self._replace(layer, forward)

    def _stack_ia3(self, layer: nn.Module, kind: str) -> None:
        """K vectors in place of one: they scale the input of a feed-forward layer, the output of others; as PEFT does."""
        lanes, original, base_layer = self._lanes, layer.forward, layer.base_layer
        vector = self._leaf(layer.ia3_l["default"])

        def scale(x: Tensor) -> Tensor:
            span, own = lanes.span(kind), vector()
            y = lanes.split(x.to(own.dtype), span) * own.reshape(len(own), 1, -1)
            return span.join(y).view(x.shape).to(x.dtype)

        def forward(x: Tensor, *args: Any, **keys: Any) -> Tensor:
            if lanes.stream is None:
                return original(x, *args, **keys)
            return base_layer(scale(x)) if layer.is_feedforward else scale(base_layer(x))

        self._replace(layer, forward)

    # ---------------------------------------------------------------------------------------------- head

    def _hook_head(self) -> None:
        base, add = self.base, lambda handle: self._undo.append(handle.remove)
        if self.task == "causal_lm":
            add(base.get_output_embeddings().register_forward_pre_hook(self._pick_scored))
            return
        backbone = getattr(base, base.base_model_prefix, None)
        score = getattr(base, "score", None)
        if score is not None:
            add(score.register_forward_pre_hook(self._pick_last))
            add(score.register_forward_hook(self._keep_logits))
            return
        if backbone is None or backbone is base:
            raise Unsuitable("its classification head cannot be told from its body")
        add(backbone.register_forward_hook(self._first_of_rows))
        if isinstance(getattr(backbone, "pooler", None), nn.Module):
            add(backbone.pooler.register_forward_pre_hook(self._pick_first))

    def _pick_scored(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        rows = self._lanes.stream
        return None if rows is None else (args[0][0].index_select(0, rows.at)[None], *args[1:])  # [1, S, D]

    def _pick_last(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        rows = self._lanes.stream
        if rows is None:
            return None
        hidden = args[0][0].index_select(0, rows.last)[None]  # [1, R, D]
        return (hidden.to(head_dtype(module)), *args[1:])

    def _keep_logits(self, module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        rows = self._lanes.stream
        if rows is None:
            return None
        self._head_out = out
        # What follows in transformers picks one position of each batch row by pad id; ours are picked already.
        return out.new_zeros(1, 1, out.shape[-1]).expand(1, len(rows.ids), -1)

    def _pick_first(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        rows = self._lanes.stream
        return None if rows is None else (args[0][0].index_select(0, rows.first)[:, None], *args[1:])  # [R, 1, D]

    def _first_of_rows(self, module: nn.Module, args: Any, out: Any) -> Any:
        """The body's output as the head wants it: a batch of rows, of which it reads the first position."""
        rows = self._lanes.stream
        if rows is None:
            return None
        hidden = out[0][0].index_select(0, rows.first)[:, None]
        if isinstance(out, tuple):
            return (hidden, *out[1:])
        out["last_hidden_state"] = hidden
        return out


class StreamNet(StackedNet):
    """A whole model on rows that lie end to end, each attending to itself alone: one set of weights, no padding.

    Args:
        autocast: compute in this type over float32 weights, or None.

    The others are `StackedNet`'s.
    """

    def __init__(
        self,
        model: nn.Module,
        own: list[nn.Module],
        *,
        task: str,
        device: torch.device,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, own, task=task, device=device)
        self.autocast = autocast

    def adopt(self, weights: Tensor) -> None:
        """See `Net.adopt`."""
        self.plain.adopt(weights)

    def bind(self, weights: Tensor, grad: Tensor | None) -> None:
        """Use these weights, `[1, N]`, from now on; gradients are added to `grad`, `[1, N]`."""
        self._count = 1
        self.plain.bind(weights, grad)

    def show(self, lane: int) -> None:
        """Put a lane's weights into the model itself; they are there."""

    def backward(self, tokens: Tokens, rows: Sequence[np.ndarray], answers: Tensor) -> tuple[Tensor, list[int]]:
        """Add the gradient of the mean loss; see `StackedNet.backward`."""
        with self._pass(stream_of(tokens, rows, **self._keys())) as rows_of:
            loss = F.cross_entropy(self._logits(rows_of), rows_of.targets, reduction="sum") / answers
            loss.sum().backward()
        return loss.detach(), [len(rows_of.ids)]

    def _logits(self, rows: Stream) -> Tensor:
        context = nullcontext() if self.autocast is None else torch.autocast(self.device.type, dtype=self.autocast)
        with context:
            return super()._logits(rows)

    def _stack_layers(self) -> None:
        for module in self.model.modules():
            module.fedsim_lanes = self._lanes
            self._undo.append(lambda m=module: m.__dict__.pop("fedsim_lanes", None))


def _cannot_pack(base: nn.Module, task: str) -> str | None:
    config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    if any((getattr(config, key, None) or 0) > 1 for key in _EXPERTS):
        return "it routes tokens to experts, and a router's losses and capacities couple the lanes"
    if frequencies_by_length(config):
        return "its rotary frequencies depend on the longest row of a pass, whoever's that is"
    for name, module in base.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return f"{name} takes statistics over the batch, which couples the lanes"
    if task == "causal_lm" and base.get_output_embeddings() is None:
        return "it has no output head that could be told from its body"
    return None


def frequencies_by_length(config: Any) -> bool:
    """Whether the rotary frequencies of a base depend on the length of its input, so that cached keys go stale."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    return bool(_rotary_types(scaling) & _BY_LENGTH)


def _rotary_types(value: Any) -> set[str]:
    """The kinds of rotary scaling that a config names, at whatever depth."""
    if not isinstance(value, dict):
        return set()
    own = {str(value[k]) for k in ("rope_type", "type") if k in value}
    return own.union(*(_rotary_types(v) for v in value.values()))


_FAILS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, Unsuitable)


def probe(net: StackedNet) -> None:
    """Compare two lanes of unlike weights with the model itself under each: logits, and gradients, of a few random rows.

    An architecture that mixes tokens outside the attention interface or counts positions in a way of its own, and a method
    that does not call the layers it trains, show it here, before a run would silently be wrong.

    Raises:
        Unsuitable: if they differ by more than rounding.
    """
    rng, rows, prompts, pad = _random_rows(net)
    before = {n: p.data for n, p in net._own_params.items()}
    start = net.layout.fill(net.layout.empty(net.device), before)
    noise = torch.from_numpy(rng.normal(size=(2, len(start)))).to(start)
    weights, grad = start + 0.02 * noise, torch.zeros(2, len(start), dtype=start.dtype, device=net.device)
    net.begin([1, 2])
    try:
        net.train(True)
        net.bind(weights, grad)
        with torch.no_grad():
            net.logits(rows, prompts, pad)  # its dropout layers must see what belongs to lanes
        net.train(False)
        found, _, _ = net.logits(rows, prompts, pad)
        ask = torch.from_numpy(rng.normal(size=tuple(found.shape[1:]))).to(found)
        leaves = list(net._leaves.values())
        found_grads = _gradients((found * ask).sum(), leaves)
        expected, expected_grads = [], []
        for lane in weights:
            net.plain.bind(lane[None].clone(), None)
            expected.append(net.plain.logits(rows, prompts, pad)[0][0])
            expected_grads.append(_gradients((expected[-1] * ask).sum(), list(net._own_params.values())))
    except _FAILS as error:
        raise _fails(error) from None
    finally:
        for name, parameter in net._own_params.items():
            parameter.data = before[name]
    for k in range(2):
        _compare(net, found[k], expected[k], [g[k] for g in found_grads], expected_grads[k])


def probe_stream(net: StreamNet) -> None:
    """Compare rows end to end with the model's own padded batches, as `probe` does: logits and gradients at its weights.

    Raises:
        Unsuitable: if they differ by more than rounding.
    """
    rng, rows, prompts, pad = _random_rows(net)
    params = list(net._own_params.values())
    net._count = 1
    net.train(False)
    try:
        found, _, _ = net.logits(rows, prompts, pad)
        ask = torch.from_numpy(rng.normal(size=tuple(found.shape))).to(found)
        found_grads = _gradients((found * ask).sum(), params)
        expected = net.plain.logits(rows, prompts, pad)[0]
        expected_grads = _gradients((expected * ask).sum(), params)
    except _FAILS as error:
        raise _fails(error) from None
    _compare(net, found, expected, found_grads, expected_grads)


def _fails(error: Exception) -> Unsuitable:
    if isinstance(error, Unsuitable):
        return error
    return Unsuitable(f"rows end to end fail in it ({' '.join(str(error).split())[:160]})")


def _random_rows(net: StackedNet) -> tuple[np.random.Generator, list[np.ndarray], np.ndarray | None, int]:
    rng = np.random.default_rng(0)
    vocabulary = int(net.base.get_input_embeddings().weight.shape[0])
    rows = [rng.integers(0, vocabulary, n) for n in (7, 3, 12, 7, 5)]
    prompts = None if net.task != "causal_lm" else np.array([3, 1, 8, 6, 2])
    return rng, rows, prompts, net.base.config.pad_token_id or 0


def _compare(
    net: StackedNet, found: Tensor, expected: Tensor, found_grads: list[Tensor], expected_grads: list[Tensor]
) -> None:
    in_logits, in_gradients = {torch.float64: (1e-8, 1e-6), torch.float32: (1e-3, 2e-2)}.get(net.base.dtype, (0.1, 0.5))
    apart = _apart([found], [expected])
    if not apart <= in_logits:
        raise Unsuitable(f"rows end to end give other results in it than rows alone (relative difference {apart:.1e})")
    apart = _apart(found_grads, expected_grads)
    if not apart <= in_gradients:
        raise Unsuitable(f"its gradients in lanes are others than alone (relative difference {apart:.1e})")


def _gradients(value: Tensor, of: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(value, of, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g.detach() for t, g in zip(of, found, strict=True)]


def _apart(found: list[Tensor], expected: list[Tensor]) -> float:
    """Norm of the difference, relative to the norm of what was expected."""
    apart = sum(float((a - b).detach().double().square().sum()) for a, b in zip(found, expected, strict=True))
    norm = sum(float(b.detach().double().square().sum()) for b in expected)
    return float(np.sqrt(apart) / max(np.sqrt(norm), 1e-12))
