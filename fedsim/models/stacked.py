"""K adapters over one frozen base, trained in one forward and backward pass.

The base sees the examples of all lanes end to end (`fedsim.data.stream`). PEFT's own layers run as they are; only the
leaves that are trained - linear layers, IA3's vectors, the embedding of a prompt - are replaced by K stacked sets of
weights (`fedsim.models.lanes`). So names, target rules, scales and the order of operations stay PEFT's, and a new method
whose trained leaves are linear layers packs without a line of code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.data.stream import Span, Stream, stream, stream_of
from fedsim.data.tokens import Tokens
from fedsim.models.adapters import prompt_of
from fedsim.models.attention import ATTENTION
from fedsim.models.dropout import position_kinds
from fedsim.models.forward import Net, at_least_float32, autocast, head_dtype
from fedsim.models.lanes import Lanes, stacked
from fedsim.models.per_example import Examples, clipped_sums
from fedsim.models.positions import position_offset
from fedsim.models.projections import fast_frozen
from fedsim.models.unsuitable import Unsuitable, cannot_pack


class StackedNet(Net):
    """A model with K sets of trained weights; its methods are those of `Net` with a leading lane axis.

    Args:
        model: from `attach`, on its device; changed in place: it is PEFT's again outside a pass.
        own: the adapter's modules.
        task: causal_lm | sequence_classification.
        device: of the model.

    Raises:
        Unsuitable: if the method or the base cannot be packed; the text says why.
    """

    def __init__(self, model: nn.Module, own: list[nn.Module], *, task: str, device: torch.device) -> None:
        super().__init__(model, own, task=task, device=device, base_dropout=False, autocast=None)
        self.lanes, self.leaves = 0, {}
        self._names = {id(p): n for n, p in self.params.items()}
        self._lanes = Lanes()
        self._head_out: Tensor | None = None
        self._prompts: Callable[[], Tensor] | None = None
        self._in_stream, self._prefix = 0, 0  # virtual tokens in front of an example, or only in its attention
        self._fast, self._shown = False, 0
        self._kinds = position_kinds(model, task)
        self._undo = ExitStack()
        if reason := cannot_pack(self.base, task):
            raise Unsuitable(reason)
        try:
            for module in model.modules():
                self._put(module, "fedsim_lanes", self._lanes)
            self._stack_prompt()
            self._stack_layers()
            self._hook_head()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the model back as it was."""
        self._undo.close()

    def _put(self, module: nn.Module, name: str, value: Any) -> None:
        setattr(module, name, value)
        self._undo.callback(module.__dict__.pop, name, None)

    # -------------------------------------------------------------------------------------------- passes

    def in_pass(self) -> bool:
        """Whether a training or scoring pass is under way."""
        return self._lanes.stream is not None

    def bind(self, weights: Tensor, grad: Tensor | None) -> None:
        """Use these weights, `[K, N]`, from now on, read in place; gradients are added to `grad`, `[K, N]`, or None."""
        self.lanes = len(weights)
        self.leaves = {n: v.detach().requires_grad_(grad is not None) for n, v in self.layout.lanes(weights).items()}
        self._grads = None if grad is None else list(self.layout.lanes(grad).values())

    def show(self, lane: int) -> None:
        """Put a lane's weights into the model itself, for what works on one model: generation."""
        self._shown = lane
        with torch.no_grad():
            for name, parameter in self.params.items():
                parameter.copy_(self.leaves[name][lane])

    def multiply(self, layer: nn.Module, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """See `Net.multiply`; outside a pass, the lane that is shown."""
        if not self.in_pass():
            return x @ a[self._shown].T @ b[self._shown].T
        span = self._lanes.span(self._kinds.get(id(layer), "tokens"))
        a, b = a[: self.lanes], b[: self.lanes]
        y = self._lanes.split(x, span) @ a.transpose(1, 2) @ b.transpose(1, 2)
        return span.join(y).view(*x.shape[:-1], -1)

    def backward(self, tokens: Tokens, rows: Sequence[np.ndarray], answers: Tensor) -> tuple[Tensor, list[int]]:
        """Add the gradient of each lane's own mean loss; see `Net.backward`.

        `rows` has one array for each lane, some may be empty; `answers` and the loss are `[K]`.
        """
        made = stream_of(tokens, rows, **self._keys())
        with self._pass(made):
            nll = F.cross_entropy(self._stream_logits(made), made.targets, reduction="none")
            loss = made.scored.split(nll[:, None]).sum(dim=(1, 2)) / answers
            # Not left in `.grad`: the views of a [K, N] tensor have strides that autograd would copy around.
            found = torch.autograd.grad(loss.sum(), list(self.leaves.values()))
        torch._foreach_add_(self._grads, found)
        return loss.detach(), list(made.tokens.sizes)

    def clipped(
        self, tokens: Tokens, rows: Sequence[np.ndarray], clip: float, trains: np.ndarray | None = None
    ) -> tuple[Tensor, list[int]]:
        """Add the sum of each lane's gradients by example, each scaled down to norm `clip`; see `per_example`.

        The loss of an example is the mean over its own answer tokens.

        Args:
            tokens, rows: as in `backward`; some lane has an example.
            clip: bound of the 2-norm over all that trains.
            trains: which parameters do, bool `[K, P]`; None = all.

        Returns:
            Sum of the losses of its examples, and tokens computed, of each lane.
        """
        every, examples = np.concatenate(rows), Examples([len(r) for r in rows], self.device)
        # Nothing is filled up: it would lengthen an example.
        made = stream_of(tokens, every[:, None], **(self._keys() | {"round_up": False}))
        which = np.ones((len(rows), len(self.leaves)), dtype=bool) if trains is None else trains
        at = np.flatnonzero(which.any(axis=0)).tolist() or [0]
        shared, names = self.leaves, list(self.leaves)
        try:
            self.leaves = {n: leaf.detach().index_select(0, examples.of) for n, leaf in shared.items()}  # [R, ...]
            wanted = [self.leaves[names[i]].requires_grad_() for i in at]
            with self._pass(made, examples):
                nll = F.cross_entropy(self._stream_logits(made), made.targets, reduction="none")
                answers = torch.from_numpy(tokens.answers_of(every)).to(nll)
                loss = made.scored.split(nll[:, None]).sum(dim=(1, 2)) / answers  # [R]
                found = torch.autograd.grad(loss.sum(), wanted)
        finally:
            self.leaves = shared
        sums = clipped_sums(found, examples, clip, torch.from_numpy(which[:, at]).to(self.device))
        torch._foreach_add_([self._grads[i] for i in at], sums)
        return examples.sums(loss.detach()), examples.totals(made.tokens.sizes)

    def logits(
        self, sequences: Sequence[np.ndarray], prompts: np.ndarray | None, pad_id: int
    ) -> tuple[Tensor, np.ndarray, Tensor]:
        """The same examples under each lane's weights: `[K, S, V]`, or `[K, R, L]`; see `Net.logits`. `pad_id` is not used."""
        k, count = self.lanes, len(sequences)
        made = stream(
            np.tile(np.concatenate(sequences), k),
            np.tile([len(s) for s in sequences], k),
            [count] * k,
            prompts=None if prompts is None else np.tile(prompts, k),
            targets=np.zeros(k * count, dtype=np.int64) if prompts is None else None,
            **self._keys(),
        )
        with self._pass(made):
            out = self._stream_logits(made)
        out = out.view(k, -1, out.shape[-1])
        return out, made.row_of[: out.shape[1]], made.targets[: out.shape[1]]

    def _keys(self) -> dict[str, Any]:
        offset = position_offset(self.base.config) + self._prefix
        round_up = self._fast and self.device.type == "cpu"
        return {"virtual": self._in_stream, "offset": offset, "device": self.device, "round_up": round_up}

    @contextmanager
    def _pass(self, made: Stream, apart: Examples | None = None) -> Iterator[None]:
        """A pass over a stream; `apart`: whose its examples are, where each is a lane of the stream."""
        config = self.base.config
        before = config._attn_implementation
        try:
            config._attn_implementation = ATTENTION
            self._lanes.set(made, apart is not None)
            if self.drops:
                *front, last = made.tokens.sizes
                sizes = {"tokens": [*front, last - made.filled], "scored": made.scored.sizes, "rows": made.rows.sizes}
                self.draws.next(sizes if apart is None else {n: apart.totals(s) for n, s in sizes.items()})
            yield
        finally:
            self._lanes.set(None)
            self._head_out = None
            config._attn_implementation = before

    def _stream_logits(self, made: Stream) -> Tensor:
        """`[S, V]`, or `[R, L]` under a classification head; at least float32."""
        inputs: dict[str, Tensor] = {"input_ids": made.ids[None]}
        if self._prompts is not None:
            front = self._lanes.in_front(self._prompts())  # [R, V, D], or all that a prefix holds
            if self._prefix:
                self._lanes.prefix = front
            else:
                embedded = self.base.get_input_embeddings()(made.ids)  # [N, D]
                front = front.flatten(0, 1).to(embedded.dtype)
                inputs = {"inputs_embeds": embedded.index_copy(0, made.virtual, front)[None]}
        out = self.base(**inputs, position_ids=made.positions[None], use_cache=False).logits
        out = out if self._head_out is None else self._head_out
        return at_least_float32(out.reshape(-1, out.shape[-1]))

    # ------------------------------------------------------------------------------------------ stacking

    def _leaf(self, parameter: nn.Parameter) -> Callable[[], Tensor]:
        name = self._names[id(parameter)]
        return lambda: self.leaves[name]  # looked up at each use: `bind` replaces it

    def _stack_prompt(self) -> None:
        """Prompt methods of PEFT: what makes the virtual tokens is stacked here; `_stream_logits` puts them in front."""
        config = prompt_of(self.model)
        if config is None:
            return
        encoder = self.model.prompt_encoder["default"]
        method, as_made = config.peft_type.value, nn.Identity()
        if method == "PROMPT_TUNING":
            head: nn.Module = as_made
        elif method == "P_TUNING" and config.encoder_reparameterization_type == "MLP":
            head = encoder.mlp_head
        elif method == "PREFIX_TUNING":
            head = encoder.transform if config.prefix_projection else as_made
        else:
            raise Unsuitable(f"its prompts are made by {type(encoder).__name__}, which has no stacked form")
        count, table = config.num_virtual_tokens, self._leaf(encoder.embedding.weight)

        def make() -> Tensor:
            tokens = table()  # [K, V, D]
            self._lanes.prompt = Span((count,) * len(tokens))
            return head(tokens.reshape(-1, tokens.shape[-1])).view(len(tokens), count, -1)

        if method != "PREFIX_TUNING":
            self._in_stream, self._prompts = count, make
            return
        self._check_prefix(config)
        heads, dtype = config.num_attention_heads, self.model.base_model_torch_dtype
        shape = (config.num_layers, 2, heads, config.token_dim // heads)
        self._prefix, self._prompts = count, lambda: make().to(dtype).unflatten(-1, shape)  # [K, V, layers, 2, H, d]

    def _check_prefix(self, config: Any) -> None:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING as SPECIAL

        kind = self.base.config.model_type
        if kind in SPECIAL or kind.startswith(("gemma2", "gemma3", "gemma4")):
            raise Unsuitable(f"PEFT shapes the prefix for {kind} in a way of its own")
        if config.num_transformer_submodules != 1:
            raise Unsuitable("it has an encoder and a decoder")

    def _stack_layers(self) -> None:
        left, kinds = dict(self.params), self._kinds
        if self._prompts is not None:
            left.pop(self._names[id(self.model.prompt_encoder["default"].embedding.weight)])
        for module in self.model.modules():
            own = any(p.requires_grad for p in module.parameters(recurse=False))
            found = stacked(module, kinds.get(id(module), "tokens"), self._lanes, self._leaf)
            if found is not None:
                self._put(module, "forward", found[0])
                for p in found[1]:
                    left.pop(self._names[id(p)])
            elif not own and (fast := fast_frozen(module)):
                self._fast = True
                self._put(module, "forward", self._in_pass_only(fast, module.forward))
        if left:
            name = next(iter(left))
            owner = type(self.model.get_submodule(name.rpartition(".")[0])).__name__
            raise Unsuitable(f"it trains {name} in a {owner}, which has no stacked form")

    def _in_pass_only(self, fast: Callable, slow: Callable) -> Callable:
        return lambda x: slow(x) if self._lanes.stream is None else fast(x)

    # ---------------------------------------------------------------------------------------------- head

    def _hook_head(self) -> None:
        base = self.base
        if self.task == "causal_lm":
            self._hook(base.get_output_embeddings().register_forward_pre_hook, self._pick_scored)
            return
        body, score = getattr(base, base.base_model_prefix, None), getattr(base, "score", None)
        if score is not None:
            self._hook(score.register_forward_pre_hook, self._pick_ends)
            self._hook(score.register_forward_hook, self._keep_logits)
            return
        if body is None or body is base:
            raise Unsuitable("its classification head cannot be told from its body")
        self._hook(body.register_forward_hook, self._pick_starts)
        if isinstance(getattr(body, "pooler", None), nn.Module):
            self._hook(body.pooler.register_forward_pre_hook, self._pick_pooled)

    def _hook(self, register: Callable, hook: Callable) -> None:
        """Register a hook (stream, module, arguments[, output]) that acts in a pass alone."""

        def acting(*given: Any) -> Any:
            return hook(self._lanes.stream, *given) if self.in_pass() else None

        self._undo.callback(register(acting).remove)

    def _pick_scored(self, made: Stream, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][0].index_select(0, made.at)[None], *args[1:])  # [1, S, D]

    def _pick_ends(self, made: Stream, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0][0].index_select(0, made.last)[None]  # [1, R, D]
        return (hidden.to(head_dtype(head)), *args[1:])

    def _keep_logits(self, made: Stream, head: nn.Module, args: Any, out: Tensor) -> Tensor:
        self._head_out = out
        # transformers then picks one position of each sequence by pad id; ours are picked already.
        return out.new_zeros(1, 1, out.shape[-1]).expand(1, len(made.ids), -1)

    def _pick_pooled(self, made: Stream, pooler: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][0].index_select(0, made.first)[:, None], *args[1:])  # [R, 1, D]

    def _pick_starts(self, made: Stream, body: nn.Module, args: Any, out: Any) -> Any:
        """The body's output as the head wants it: a batch of examples, of which it reads the first position."""
        hidden = out[0][0].index_select(0, made.first)[:, None]
        if isinstance(out, tuple):
            return (hidden, *out[1:])
        out["last_hidden_state"] = hidden
        return out


class StreamNet(StackedNet):
    """A whole model on examples that lie end to end, each attending to itself alone: one set of weights, no padding.

    Args:
        autocast: compute in this type over float32 weights, or None.

    The others are `StackedNet`'s.
    """

    bind, show = Net.bind, Net.show

    def __init__(self, *args: Any, autocast: torch.dtype | None = None, **keys: Any) -> None:
        super().__init__(*args, **keys)
        self.autocast, self.lanes, self.leaves = autocast, 1, self.params

    def backward(self, tokens: Tokens, rows: Sequence[np.ndarray], answers: Tensor) -> tuple[Tensor, list[int]]:
        """Add the gradient of the mean loss; see `Net.backward`."""
        made = stream_of(tokens, rows, **self._keys())
        with self._pass(made):
            loss = F.cross_entropy(self._stream_logits(made), made.targets, reduction="sum") / answers
            loss.sum().backward()
        return loss.detach(), [len(made.ids)]

    def _stream_logits(self, made: Stream) -> Tensor:
        with autocast(self.device, self.autocast):
            return super()._stream_logits(made)

    def _stack_layers(self) -> None:
        """Nothing is stacked: there is one set of weights."""
