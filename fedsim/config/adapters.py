"""The base model, and what of it is trained: the methods of PEFT, fedsim's own adapters, full fine-tuning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fedsim.core.section import Count, OneOf, Positive, Share, Text, section, wrong

Layers = Annotated[list[str], Field(min_length=1)]


@section
class Model:
    """The base model."""

    path: Text = "tiny"
    """`tiny` (included in fedsim), a hub id, a transformers folder, a GGUF file, or `package:NAME/FILE` for a file or folder inside an installed package."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Data type of the frozen base; trained parameters stay float32 (float64 under a float64 base)."""
    task: Literal["causal_lm", "sequence_classification"] = "causal_lm"
    """`causal_lm`: answers are text, evaluated by their likelihood; `sequence_classification`: a head on the last token or the pooled output."""
    base_dropout: bool = False
    """Whether dropout layers of the base are active in training; an adapter's own dropout is a key of the adapter."""


@section
class _OfPeft:
    peft: dict[str, Any] = Field(default_factory=dict)
    """Further options of PEFT's own config class for the method, e.g. {use_dora: true} of lora; they take precedence over the other keys."""

    @model_validator(mode="after")
    def _check_options(self) -> Any:
        if self.peft:
            from fedsim.models.adapters import check_peft_options

            check_peft_options(self.name, self.peft, "adapter")  # type: ignore[attr-defined]
        return self


@section
class Ranks:
    """Ranks that are drawn for each client, by the seed."""

    choices: Annotated[list[Count], Field(min_length=1)]
    """The ranks."""
    weights: Annotated[list[Positive], Field(min_length=1)] | None = None
    """How often each is drawn, relative to the others; null = equally often."""


@section
class Lora(_OfPeft):
    """Low-rank adaptation (Hu et al., 2021), by PEFT."""

    name: Literal["lora"] = "lora"
    r: Count = 8
    """Rank of the update."""
    alpha: Positive = 16.0
    """Scaling: the update is multiplied by alpha / r."""
    dropout: Share = 0.0
    """Dropout on the input of A, in training only."""
    target_modules: Layers | Literal["auto", "all-linear"] = "auto"
    """Leaf names of the layers to adapt; auto = the input projections of attention: q, k and v, or the fused one."""
    ranks: Count | Annotated[list[Count], Field(min_length=1)] | Ranks | None = None
    """Ranks of the clients, for algorithms that take them: one for all, a list by client, or a distribution to draw from; `r` is the largest. null = r for all."""
    init: Literal["kaiming", "xavier", "gaussian"] = "kaiming"
    """Initialization of A (B starts at zero): kaiming is PEFT's default, xavier that of the published runs."""


@section
class PTuning(_OfPeft):
    """P-tuning (Liu et al., 2021): virtual tokens made by an MLP prompt encoder, by PEFT."""

    name: Literal["p_tuning"] = "p_tuning"
    num_virtual_tokens: Count = 10
    """Virtual tokens in front of every input."""
    hidden: Count = 1024
    """Width of the prompt encoder's hidden layers."""


@section
class Bottleneck:
    """Bottleneck adapters (Houlsby et al., 2019) after the attention's and the MLP's output projection; fedsim's own."""

    name: Literal["adapter"] = "adapter"
    bottleneck: Count = 32
    """Width of the bottleneck."""
    dropout: Share = 0.0
    """Dropout on the adapter's hidden layer, in training only."""
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    """Non-linearity inside the bottleneck."""
    target_modules: Layers | Literal["auto"] = "auto"
    """Leaf names of the layers whose output is adapted; auto = the output projections of attention and MLP."""


@section
class Prefix(_OfPeft):
    """Prefix tuning (Li and Liang, 2021), by PEFT."""

    name: Literal["prefix"] = "prefix"
    num_virtual_tokens: Count = 10
    """Length of the trained key/value prefix of every layer."""
    projection: bool = False
    """Whether an MLP makes the prefix, as in the paper; otherwise it is trained directly."""
    hidden: Count = 512
    """Width of that MLP."""


@section
class Prompt(_OfPeft):
    """Prompt tuning (Lester et al., 2021), by PEFT."""

    name: Literal["prompt"] = "prompt"
    num_virtual_tokens: Count = 10
    """Trained embeddings in front of every input."""
    init_text: Text | None = None
    """Start from the embeddings of this text; null = random ones."""


@section
class Ia3(_OfPeft):
    """IA3 (Liu et al., 2022): trained scales on keys, values and the MLP's inner activations, by PEFT."""

    name: Literal["ia3"] = "ia3"
    target_modules: list[str] | Literal["auto"] = "auto"
    """Leaf names of the layers to scale; auto = PEFT's choice for the architecture."""
    feedforward_modules: list[str] | Literal["auto"] = "auto"
    """Those of target_modules whose input is scaled instead of the output; auto = PEFT's choice."""

    @model_validator(mode="after")
    def _check(self) -> Ia3:
        if (self.target_modules == "auto") != (self.feedforward_modules == "auto"):
            raise wrong("feedforward_modules", self.feedforward_modules, "goes with target_modules; give both or none")
        return self


@section
class Whole:
    """Full fine-tuning: every parameter of the base model is trained and exchanged."""

    name: Literal["none"] = "none"


@section
class OtherPeft:
    """Any PEFT method by its PEFT name, with PEFT's own settings as keys.

    The methods with a name of their own here go by PEFT's in capitals, e.g. LORA. A `peft.PeftConfig` in Python becomes such a section.
    """

    name: str = ""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Keys of PEFT's config class for the method."""

    @property
    def num_virtual_tokens(self) -> int:
        """Virtual tokens in front of every input."""
        return self.settings.get("num_virtual_tokens") or 0

    @model_validator(mode="after")
    def _check(self) -> OtherPeft:
        from fedsim.models.adapters import check_peft_settings

        check_peft_settings(self.name, self.settings, "adapter")
        return self


ADAPTERS = {
    **{"lora": Lora, "p_tuning": PTuning, "adapter": Bottleneck, "prefix": Prefix, "prompt": Prompt, "ia3": Ia3},
    "none": Whole,
}
Adapter = Annotated[
    Lora | PTuning | Bottleneck | Prefix | Prompt | Ia3 | Whole | OtherPeft, OneOf(ADAPTERS, other=OtherPeft)
]
