"""What a family file gives: plain fields of the model and its rule table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from gspo_megatron.errors import UserError
from gspo_megatron.weights.rules import QKV, GateUp, Rule, TensorSpec, Vocabulary, expand

FURTHER_TOKEN_MARK = "eh_proj.weight"  # a tensor that only layers have that predict further tokens


@dataclass(frozen=True)
class Yarn:
    """Rotary embeddings stretched to a longer context than the model was first trained on (arXiv 2309.00071)."""

    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    truncate: bool  # the range of interpolated frequencies is rounded to whole ones
    attention_factor: float | None  # on rotated queries and keys; None: from the next two, or from the factor alone
    mscale: float | None
    mscale_all_dim: float | None

    @property
    def rotation_factor(self) -> float:
        """Factor on cosine and sine, so that rotated queries and keys are scaled by it."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._growth(self.mscale) / self._growth(self.mscale_all_dim)
        return self._growth(1.0)

    def _growth(self, scale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * scale * math.log(self.factor) + 1.0


@dataclass(frozen=True)
class ModelFields:
    """A decoder-only transformer in plain numbers; policy/model.py makes Megatron's config of it."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int  # of dense layers
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    rope_theta: float
    tied_embeddings: bool
    initializer_range: float
    qk_layernorm: bool
    qk_norm_of_heads: bool = True  # each head's queries and keys are normalised alone; False: all heads' together
    qkv_bias: bool = False
    rotary_dim: int | None = None  # of a head, the first so many numbers are rotated; None: all
    yarn: Yarn | None = None
    attention_sinks: bool = False  # see policy/sink_attention.py, which has the windows too
    attention_windows: tuple[int | None, ...] = ()  # of each layer, tokens that a query sees; None: all before it
    biases: bool = False  # on the output of attention, on router and experts
    num_experts: int | None = None
    experts_per_token: int = 0
    expert_ffn_hidden_size: int = 0
    stacked_experts: bool = False  # a layer's experts are one tensor on disk, and one parameter here
    swiglu_limit: float | None = None  # clamps the experts' activation, which then is gpt-oss's; None: plain SwiGLU
    moe_layers: tuple[int, ...] = ()  # layers with experts
    router_score: Literal["softmax", "sigmoid"] = "softmax"
    router_pre_softmax: bool = False  # softmax before (True) or after top-k
    router_selection_bias: bool = False  # added to the scores for the choice of experts alone; frozen, in float32
    router_groups: int | None = None  # groups of experts, of which a token may use `router_groups_chosen`; None: one
    router_groups_chosen: int | None = None  # by the sum of a group's best two scores
    router_scale: float | None = None  # factor on the chosen experts' weights
    shared_ffn_hidden_size: int | None = None  # of the experts that every token uses, together; None: there are none
    shared_expert_gate: bool = False  # a sigmoid gate on them
    further_token_layers: int | None = None  # layers behind the last that predict further tokens: see `left_out`

    @property
    def dense_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_layers) if i not in self.moe_layers)

    @property
    def split_by_tensor(self) -> dict[str, int]:
        """Sizes that the tensor-parallel degree must divide, by what config.json calls them."""
        sizes = {"num_attention_heads": self.num_attention_heads, "num_key_value_heads": self.num_query_groups}
        if self.dense_layers:
            sizes["intermediate_size"] = self.ffn_hidden_size
        if self.shared_ffn_hidden_size is not None:
            sizes["intermediate size of the shared experts"] = self.shared_ffn_hidden_size
        return sizes

    @property
    def left_out(self) -> tuple[str, ...]:
        """Prefixes of tensors that are neither loaded, trained nor exported: of the layers that predict further
        tokens, which neither log-probabilities nor rollouts use."""
        first, count = self.num_layers, self.further_token_layers or 0
        return tuple(f"model.layers.{i}." for i in range(first, first + count))


@dataclass(frozen=True)
class Family:
    """One model family: from its HF config to fields, from fields to rules."""

    model_type: str
    fields: Callable[[dict[str, Any]], ModelFields]
    rules: Callable[[ModelFields], Sequence[Rule]]
    known_to_servers: bool = False  # weights/server_layout.py knows what SGLang makes of its tensors
    split_by_servers: bool = True  # SGLang can spread it over several GPUs
    known_to_transformer_engine: bool = False  # Megatron's attention over Transformer Engine computes it

    def specs(self, fields: ModelFields) -> list[TensorSpec]:
        """Every parameter of the model."""
        return expand(self.rules(fields), fields.num_layers)


class ConfigReader:
    """Reads an HF config.json, refusing what is missing or can't be expressed."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def __call__(self, name: str, *older_names: str) -> Any:
        for candidate in (name, *older_names):
            if self.config.get(candidate) is not None:
                return self.config[candidate]
        raise UserError(f'config.json of a {self.config.get("model_type")} model lacks "{name}"')

    def optional(self, name: str, default: Any) -> Any:
        """A value that may be left out, which means transformers' `default` for the family; null is refused."""
        value = self.config.get(name, default)
        if value is None:
            raise UserError(f"config.json: {name}=null is no value; give one, or leave it out, which means {default!r}")
        return value

    def refuse_unless(self, name: str, allowed: Sequence[Any], reason: str) -> None:
        """Refuse a value that is given and not allowed; the first allowed one is what leaving it out means."""
        value = self.config.get(name, allowed[0])
        if value not in allowed:
            raise UserError(f"config.json: {name}={value!r} is not supported: {reason}")

    def rope(self) -> dict[str, Any]:
        """`rope_parameters` (transformers 5) or `rope_scaling`."""
        # Where both are given, transformers lets the older name go first: that is where users add scaling.
        return self.config.get("rope_scaling") or self.config.get("rope_parameters") or {}

    def rope_theta(self) -> float:
        """From `rope_parameters`, `rope_scaling` or `rope_theta`; scaled variants are refused."""
        parameters = self.rope()
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind != "default":
            raise UserError(f"config.json: rope_type={kind!r} is not supported; only unscaled rotary embeddings are")
        return float(parameters.get("rope_theta") or self("rope_theta"))

    def yarn(self) -> Yarn | None:
        """YaRN's numbers; None if rotary embeddings are unscaled. Other variants are refused."""
        given = self.rope()
        kind = given.get("rope_type", given.get("type", "default"))
        if kind == "default":
            return None
        if kind != "yarn":
            raise UserError(f"config.json: rope_type={kind!r} is not supported; only unscaled ones and yarn are")
        for table in (given, self.config):
            if table.get("partial_rotary_factor") not in (None, 1):
                raise UserError(
                    f"config.json: partial_rotary_factor={table['partial_rotary_factor']!r} with rope_type='yarn' is "
                    "not supported; leave it out"
                )
        optional = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
        for name in ("factor", "original_max_position_embeddings", *optional):
            value, least = given.get(name), 0 if name in optional else 1e-9
            if value is None and name in optional:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
                raise UserError(f"config.json: rope_type='yarn' with {name}={value!r}; it must be a number > 0")
        return Yarn(
            factor=float(given["factor"]),
            original_positions=int(given["original_max_position_embeddings"]),
            beta_fast=float(given.get("beta_fast") or 32),
            beta_slow=float(given.get("beta_slow") or 1),
            truncate=given.get("truncate", True),
            attention_factor=given.get("attention_factor"),
            mscale=given.get("mscale"),
            mscale_all_dim=given.get("mscale_all_dim"),
        )

    def experts_per_token(self, *, renormalised: bool) -> int:
        """`num_experts_per_tok`; refused where it would keep the router from being trained."""
        count: int = self("num_experts_per_tok")
        if count == 1 and renormalised:
            raise UserError(
                "config.json: num_experts_per_tok=1 with norm_topk_prob=true is not supported: the one expert's "
                "weight would always be the same and its router never trained; use norm_topk_prob=false or more "
                "experts a token"
            )
        return count

    def renormalised_sigmoid(self) -> bool:
        """`norm_topk_prob` of a family whose router scores by sigmoid; refused if false."""
        self.refuse_unless(
            "norm_topk_prob",
            [True],
            "Megatron-Core always renormalises the weights of a sigmoid router's chosen experts",
        )
        return True

    def sparse_layers(self) -> tuple[int, ...]:
        """Layers with experts, of the families that place them by `decoder_sparse_step` and `mlp_only_layers`."""
        step, dense = self.optional("decoder_sparse_step", 1), self.config.get("mlp_only_layers") or []
        return tuple(i for i in range(self("num_hidden_layers")) if i not in dense and (i + 1) % step == 0)

    def further_token_layers(self) -> int | None:
        """Layers that predict further tokens, by either of their names; transformers' default is one."""
        given = [self.config[name] for name in ("num_nextn_predict_layers", "num_mtp_layers") if name in self.config]
        return next(filter(None, given), None) if given else 1

    def shared_ffn_hidden_size(self) -> int | None:
        """Of `n_shared_experts` together; transformers' default is one."""
        return self.optional("n_shared_experts", 1) * self("moe_intermediate_size") or None

    def expert_groups(self, groups: int, chosen: int) -> tuple[int | None, int | None]:
        """Groups of experts and how many of them a token may use; (None, None) where that is no restriction. Given:
        transformers' defaults."""
        groups, chosen = self.optional("n_group", groups), self.optional("topk_group", chosen)
        if not 1 <= chosen <= groups:
            raise UserError(
                f"config.json: topk_group={chosen} must lie between 1 and n_group={groups}: a token chooses so many of "
                "the groups"
            )
        per_token, num_experts = self("num_experts_per_tok"), self("n_routed_experts", "num_local_experts")
        if num_experts % groups:
            raise UserError(f"config.json: n_group={groups} must divide the number of experts, {num_experts}")
        if groups == chosen:
            return None, None
        if per_token // chosen != 2:
            raise UserError(
                f"config.json: num_experts_per_tok={per_token} with topk_group={chosen} is not supported: "
                f"Megatron-Core scores a group by its best num_experts_per_tok // topk_group = {per_token // chosen} "
                f"experts, the model by its best 2; only num_experts_per_tok={2 * chosen} or {2 * chosen + 1} agree, "
                "or n_group=1"
            )
        return groups, chosen


def attention_and_norm_rules(f: ModelFields) -> list[Rule]:
    """Embedding, attention, norms and head: the same in all Llama-like families."""
    attention = "decoder.layers.{layer}.self_attention."
    hf_attention = "model.layers.{layer}.self_attn."
    q_rows, kv_rows = f.num_attention_heads * f.head_dim, f.num_query_groups * f.head_dim
    h = f.hidden_size
    vocabulary = Vocabulary(f.vocab_size)
    qkv = QKV(f.num_query_groups, f.num_attention_heads // f.num_query_groups, f.head_dim)
    rules = [
        Rule(
            "embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ((f.vocab_size, h),), vocabulary, dim=0
        ),
        Rule(
            "decoder.layers.{layer}.input_layernorm.weight", ("model.layers.{layer}.input_layernorm.weight",), ((h,),)
        ),
        Rule(
            attention + "linear_qkv.weight",
            tuple(f"{hf_attention}{x}_proj.weight" for x in "qkv"),
            ((q_rows, h), (kv_rows, h), (kv_rows, h)),
            qkv,
            dim=0,
        ),
        Rule(attention + "linear_proj.weight", (hf_attention + "o_proj.weight",), ((h, q_rows),), dim=1),
    ]
    if f.qkv_bias:
        biases = tuple(f"{hf_attention}{x}_proj.bias" for x in "qkv")
        rules.append(Rule(attention + "linear_qkv.bias", biases, ((q_rows,), (kv_rows,), (kv_rows,)), qkv, dim=0))
    if f.qk_layernorm:
        rows = {"q": f.head_dim, "k": f.head_dim} if f.qk_norm_of_heads else {"q": q_rows, "k": kv_rows}
        cut = None if f.qk_norm_of_heads else 0
        rules += [
            Rule(f"{attention}{x}_layernorm.weight", (f"{hf_attention}{x}_norm.weight",), ((size,),), dim=cut)
            for x, size in rows.items()
        ]
    rules += [
        Rule(
            "decoder.layers.{layer}.pre_mlp_layernorm.weight",
            ("model.layers.{layer}.post_attention_layernorm.weight",),
            ((h,),),
        ),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",), ((h,),)),
    ]
    # A tied model's last pipeline stage holds its own copy of the embedding: loaded, never exported.
    head = "model.embed_tokens.weight" if f.tied_embeddings else "lm_head.weight"
    shape = ((f.vocab_size, h),)
    rules.append(Rule("output_layer.weight", (head,), shape, vocabulary, dim=0, load_only=f.tied_embeddings))
    return rules


def dense_mlp_rules(f: ModelFields) -> list[Rule]:
    """Gated MLP of the layers without experts."""
    if not f.dense_layers:
        return []
    mlp, hf_mlp = "decoder.layers.{layer}.mlp.", "model.layers.{layer}.mlp."
    ffn, h = f.ffn_hidden_size, f.hidden_size
    gate_up = tuple(f"{hf_mlp}{x}_proj.weight" for x in ("gate", "up"))
    return [
        Rule(mlp + "linear_fc1.weight", gate_up, ((ffn, h), (ffn, h)), GateUp(), dim=0, layers=f.dense_layers),
        Rule(mlp + "linear_fc2.weight", (hf_mlp + "down_proj.weight",), ((h, ffn),), dim=1, layers=f.dense_layers),
    ]


def expert_rules(
    f: ModelFields, *, module: str = "mlp", projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> list[Rule]:
    """Router and experts, named per expert as published checkpoints do."""
    mlp, hf_mlp = "decoder.layers.{layer}.mlp.", "model.layers.{layer}." + module + "."
    expert, hf_expert = mlp + "experts.local_experts.{expert}.", hf_mlp + "experts.{expert}."
    ffn, h = f.expert_ffn_hidden_size, f.hidden_size
    assert f.num_experts is not None
    gate, up, down = (f"{hf_expert}{x}.weight" for x in projections)
    layers, count = f.moe_layers, f.num_experts
    fc1, fc2 = expert + "linear_fc1.weight", expert + "linear_fc2.weight"
    rules = [
        Rule(mlp + "router.weight", (hf_mlp + "gate.weight",), ((count, h),), layers=layers),
        Rule(fc1, (gate, up), ((ffn, h), (ffn, h)), GateUp(), dim=0, layers=layers, num_experts=count),
        Rule(fc2, (down,), ((h, ffn),), dim=1, layers=layers, num_experts=count),
    ]
    if f.router_selection_bias:  # in no optimizer: a buffer of Megatron's router, too fine for bfloat16
        bias, hf_bias = mlp + "router.expert_bias", hf_mlp + "gate.e_score_correction_bias"
        rules.append(Rule(bias, (hf_bias,), ((count,),), layers=layers, dtype=torch.float32))
    return rules


def shared_expert_rules(f: ModelFields, *, module: str = "shared_experts") -> list[Rule]:
    """The experts that every token uses: one MLP, cut over the ranks of dense layers."""
    ffn, h, layers = f.shared_ffn_hidden_size, f.hidden_size, f.moe_layers
    if ffn is None:
        return []
    shared, hf_mlp = "decoder.layers.{layer}.mlp.shared_experts.", "model.layers.{layer}.mlp."
    gate, up, down = (f"{hf_mlp}{module}.{x}_proj.weight" for x in ("gate", "up", "down"))
    rules = [
        Rule(shared + "linear_fc1.weight", (gate, up), ((ffn, h), (ffn, h)), GateUp(), dim=0, layers=layers),
        Rule(shared + "linear_fc2.weight", (down,), ((h, ffn),), dim=1, layers=layers),
    ]
    if f.shared_expert_gate:
        rules.append(Rule(shared + "gate_weight", (f"{hf_mlp}{module}_gate.weight",), ((1, h),), layers=layers))
    return rules
