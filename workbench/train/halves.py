"""Decoder layers as two halves around attention or the delta rule on a frozen context.

A half is everything between two kernels that can be compiled into few launches: norms, products,
rotary embeddings, gates and the MLP. Sums are taken in float32 where
transformers rounds in between.

Shape letters: B rows, T positions, D the residual stream's width, C channels of the convolution, W
its width, H heads, K and E widths of a query-key and of a value head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from steer_kernels.conv import conv_silu
from steer_kernels.gdn import gated_delta_rule
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.train.joined import GROUPS, JoinedWeights, Way, products
from workbench.train.kernels import MARK, ApartAttention, attend

__all__ = [
    "DELTA",
    "ROTARY",
    "convolved",
    "delta_inputs",
    "delta_output",
    "has_halves",
    "run_halves",
]

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
KNOWN = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen3DecoderLayer", "Qwen3_5DecoderLayer")
"""Layers that are `x + mixer(norm(x))` and then `x + mlp(norm(x))`, with a gated MLP."""
DELTA, ATTENTION, MLP, DELTA_OUT, ATTENTION_OUT, MLP_OUT = GROUPS
ROTARY = "apply_rotary_pos_emb"


def has_halves(layer: nn.Module) -> bool:
    """Whether this is a decoder layer that `run_halves` knows, without any bias."""
    return type(layer).__name__ in KNOWN and not any(
        isinstance(module, nn.Linear) and module.bias is not None for module in layer.modules()
    )


def run_halves(
    layer: Any,
    plain: Callable[..., Tensor],
    compiled: Compile,
    joined: JoinedWeights | None,
    hidden_states: Tensor,
    **options: Any,
) -> Tensor:
    """A decoder layer on a frozen context; on anything else, `plain` as transformers has it."""
    mixer = getattr(layer, "linear_attn", None) or layer.self_attn
    cache = options.get("past_key_values")
    frozen = cache.layers[mixer.layer_idx] if cache is not None else None
    state_BHKE: Any = getattr(frozen, "recurrent_states", {}).get(0)
    rule, attention = hasattr(state_BHKE, MARK), isinstance(frozen, ApartAttention)
    if frozen is None or not (rule or attention):
        return plain(hidden_states, **options)
    reads = [(mixer, DELTA if rule else ATTENTION), (mixer, DELTA_OUT if rule else ATTENTION_OUT)]
    reads += [(layer.mlp, MLP), (layer.mlp, MLP_OUT)]
    ways: list[Way | None] = [joined.way(*read) if joined is not None else None for read in reads]
    if rule:
        mask_BT, conv_BCW = options.get("attention_mask"), frozen.conv_states[0]
        joint, g, beta, gate, x = compiled(_before_delta)(layer, hidden_states, mask_BT, ways[0])
        q, k, v = convolved(mixer, joint, conv_BCW)
        mixed = gated_delta_rule(q, k, v, g, beta, state_BHKE, normalise=True)
    else:
        cos_sin = options["position_embeddings"]
        q, k, v, gate, x = compiled(_before_attention)(layer, hidden_states, *cos_sin, ways[0])
        k, v = frozen.update(k, v)
        mixed, _ = attend(mixer, q, k, v, None, scaling=mixer.scaling)
    after: Any = compiled(_after_delta if rule else _after_attention)
    out_BTD, *others = after(layer, hidden_states, mixed, gate, ways[1:])
    if joined is not None:
        for (module, names), seen in zip(reads, (x, *others), strict=True):
            joined.keep(module, names, seen)
    return out_BTD


def _before_attention(
    layer: Any, x_BTD: Tensor, cos: Tensor, sin: Tensor, way: Way | None
) -> tuple[Tensor | None, ...]:
    """Queries, keys and values `[B, H, T, K]`, the gate `[B, T, H K]` if any, and what was read."""
    module, x = layer.self_attn, layer.input_layernorm(x_BTD)
    q, k, v = products(module, ATTENTION, x, way)
    heads, gate = (*x.shape[:2], -1, module.head_dim), None
    if module.q_proj.out_features == 2 * module.o_proj.in_features:
        q, gate = q.view(*x.shape[:2], -1, 2 * module.head_dim).chunk(2, -1)
        gate = gate.reshape(*x.shape[:2], -1)
    q, k, v = q.reshape(heads), k.view(heads), v.view(heads)
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm(k)
    rotate = getattr(sys.modules[type(module).__module__], ROTARY)
    q, k = rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q, k, v.transpose(1, 2), gate, x.detach()


def _after_attention(
    layer: Any, x_BTD: Tensor, mixed_BTHK: Tensor, gate: Tensor | None, ways: list[Way | None]
) -> tuple[Tensor, ...]:
    mixed = mixed_BTHK.flatten(2)
    if gate is not None:
        mixed = mixed * gate.sigmoid()
    (out,) = products(layer.self_attn, ATTENTION_OUT, mixed, ways[0])
    return _fed(layer, x_BTD + out, mixed, ways)


def _before_delta(
    layer: Any, x_BTD: Tensor, mask_BT: Tensor | None, way: Way | None
) -> tuple[Tensor, ...]:
    return delta_inputs(layer.linear_attn, layer.input_layernorm(x_BTD), mask_BT, way)


def _after_delta(
    layer: Any, x_BTD: Tensor, mixed_BTHE: Tensor, gate: Tensor, ways: list[Way | None]
) -> tuple[Tensor, ...]:
    mixed = _normed(layer.linear_attn, mixed_BTHE, gate)
    (out,) = products(layer.linear_attn, DELTA_OUT, mixed, ways[0])
    return _fed(layer, x_BTD + out, mixed, ways)


def _fed(layer: Any, x_BTD: Tensor, mixed: Tensor, ways: list[Way | None]) -> tuple[Tensor, ...]:
    """The MLP and the residual stream around it, and what the half's matrices have read."""
    mlp, x = layer.mlp, layer.post_attention_layernorm(x_BTD)
    gate, up = products(mlp, MLP, x, ways[1])
    both = mlp.act_fn(gate) * up
    (out,) = products(mlp, MLP_OUT, both, ways[2])
    return x_BTD + out, mixed.detach(), x.detach(), both.detach()


def delta_inputs(
    module: Any, x: Tensor, mask_BT: Tensor | None, way: Way | None = None
) -> tuple[Tensor, ...]:
    """What is convolved, log-decays and betas of the rule, its output's gate, and what was read.

    `g = -exp(A_log) softplus(a + dt_bias)`, `beta = sigmoid(b)` (Yang et al., arXiv:2412.06464,
    section 3).
    """
    if mask_BT is not None:
        x = (x * mask_BT[:, :, None]).to(x.dtype)
    joint, z, b, a = products(module, DELTA, x, way)
    g_BTH = -module.A_log.float().exp() * F.softplus(a.float() + module.dt_bias.float())
    # Two views of one product would leave the compiler's graph, and be taken apart outside of it.
    return joint.clone(), g_BTH, b.sigmoid(), z, x.detach()


def convolved(module: Any, joint_BTC: Tensor, conv_BCW: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values `[B, T, H, K]` of the rule."""
    sizes = (module.key_dim, module.key_dim, module.value_dim)
    parts = conv_silu(joint_BTC, conv_BCW, module.conv1d.weight.squeeze(1), sizes)
    widths = (module.head_k_dim, module.head_k_dim, module.head_v_dim)
    return tuple(part.unflatten(2, (-1, width)) for part, width in zip(parts, widths, strict=True))


def delta_output(module: Any, out_BTHE: Tensor, z: Tensor) -> Tensor:
    """The gated norm of each head, and the output matrix."""
    return module.out_proj(_normed(module, out_BTHE, z))


def _normed(module: Any, out_BTHE: Tensor, z: Tensor) -> Tensor:
    rows, width, _, wide = out_BTHE.shape
    normed = module.norm(out_BTHE.reshape(-1, wide), z.reshape(-1, wide))
    return normed.reshape(rows, width, -1)
