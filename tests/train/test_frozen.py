"""Reference and property tests: a frozen context is a constant, in every kind of layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer
from transformers.models.qwen3_5 import modeling_qwen3_5

from vectors.errors import InputError, ModelNotSupported, ShapeMismatch
from workbench.train.cache import FrozenCache
from workbench.train.frozen import FrozenContext, freeze_context

P, T = 11, 6


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 128, shape, generator=torch.Generator().manual_seed(seed))


def read(model, ids_BP: Tensor) -> FrozenContext:
    return freeze_context(model, ids_BP, torch.ones_like(ids_BP))


def loss_of(logits: Tensor, ids_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())


def gradients(model) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def tensors_of(cache: FrozenCache) -> list[Tensor]:
    found = []
    for layer in cache.layers:
        for value in vars(layer).values():
            values = value.values() if isinstance(value, dict) else [value]
            found += [v for v in values if isinstance(v, Tensor)]
    return found


@contextmanager
def context_detached(model, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One whole-sequence graph in which what layers keep of the first P positions is constant."""

    def cut(module, inputs, output):
        return torch.cat([output[:, :P].detach(), output[:, P:]], 1)

    names = ("k_proj", "k_norm", "v_proj", "in_proj_qkv", "in_proj_a", "in_proj_b")
    found = [m for n, m in model.named_modules() if n.rsplit(".", 1)[-1] in names]
    handles = [module.register_forward_hook(cut) for module in found]
    rule = modeling_qwen3_5.torch_chunk_gated_delta_rule

    def two_parts(q, k, v, g, beta, initial_state, output_final_state, **kwargs):
        parts = (q, k, v, g, beta)
        first, state = rule(
            *(x[:, :P].detach() for x in parts),
            initial_state=None,
            output_final_state=True,
            **kwargs,
        )
        second, _ = rule(
            *(x[:, P:] for x in parts),
            initial_state=state.detach(),
            output_final_state=False,
            **kwargs,
        )
        return torch.cat([first, second], 1), None

    with monkeypatch.context() as patch:
        patch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", two_parts)
        yield
    for handle in handles:
        handle.remove()


def test_loss_and_gradients_equal_a_graph_with_the_context_detached(model, monkeypatch):
    context_BP, decision_BT = tokens(2, P), tokens(2, T, seed=2)
    frozen = loss_of(
        read(model, context_BP).forward(decision_BT, torch.ones_like(decision_BT).bool()),
        decision_BT,
    )
    frozen.backward()
    ours = gradients(model)
    with context_detached(model, monkeypatch):
        output = model(torch.cat([context_BP, decision_BT], 1), use_cache=False)
        plain = loss_of(output.logits[:, P:], decision_BT)
        plain.backward()
    theirs = gradients(model)
    torch.testing.assert_close(frozen, plain, rtol=1e-5, atol=1e-6)
    assert ours.keys() == theirs.keys() == {n for n, _ in model.named_parameters()}
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-6, msg=name)
        assert ours[name].abs().max() > 0, name


def test_whole_context_gives_another_gradient(model):
    context_BP, decision_BT = tokens(2, P), tokens(2, T, seed=2)
    frozen = read(model, context_BP).forward(decision_BT, torch.ones_like(decision_BT).bool())
    loss_of(frozen, decision_BT).backward()
    ours = gradients(model)
    output = model(torch.cat([context_BP, decision_BT], 1), use_cache=False)
    torch.testing.assert_close(output.logits[:, P:], frozen, rtol=1e-4, atol=1e-5)
    loss_of(output.logits[:, P:], decision_BT).backward()
    theirs = gradients(model)
    name = next(n for n in ours if n.endswith(("k_proj.weight", "in_proj_qkv.weight")))
    assert (ours[name] - theirs[name]).norm() > 0.05 * theirs[name].norm()


def test_directional_derivative_in_float64(model, monkeypatch):
    # Norms, rotations and the delta rule compute in float32 by name; here they compute in float64.
    model.double()
    for buffer in model.buffers():
        buffer.data = buffer.data.double() if buffer.is_floating_point() else buffer.data
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    context_BP, decision_BT = tokens(2, P), tokens(2, T, seed=2)
    ones_BT = torch.ones_like(decision_BT).bool()
    context = read(model, context_BP)
    loss_of(context.forward(decision_BT, ones_BT), decision_BT).backward()
    generator = torch.Generator().manual_seed(3)
    way = {
        n: torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for n, p in model.named_parameters()
    }
    analytic = sum((g * way[n]).sum().item() for n, g in gradients(model).items())

    def loss_at(distance: float) -> float:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += distance * way[name]
            value = loss_of(context.forward(decision_BT, ones_BT), decision_BT).item()
            for name, parameter in model.named_parameters():
                parameter -= distance * way[name]
        return value

    eps = 1e-6
    numeric = (loss_at(eps) - loss_at(-eps)) / (2 * eps)
    assert numeric == pytest.approx(analytic, rel=1e-6)


def test_cache_is_bit_identical_and_reusable(model):
    decision_BT = tokens(2, T, seed=2)
    ones_BT = torch.ones_like(decision_BT).bool()
    context = read(model, tokens(2, P))
    before = [tensor.clone() for tensor in tensors_of(context.cache)]
    assert before
    assert not any(tensor.requires_grad for tensor in tensors_of(context.cache))
    first = loss_of(context.forward(decision_BT, ones_BT), decision_BT)
    first.backward()
    second = loss_of(context.forward(decision_BT, ones_BT), decision_BT)
    second.backward()
    assert first.item() == second.item()
    assert context.cache.get_seq_length() == P
    for old, new in zip(before, tensors_of(context.cache), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("kind", ["llama", "hybrid", "sliding"])
def test_unequal_rows_equal_one_by_one(kind, request):
    model = request.getfixturevalue(kind)
    lengths, widths = (3, 11, 8), (6, 2, 4)
    ids_BP, mask_BP = torch.zeros(3, P, dtype=torch.long), torch.zeros(3, P)
    ids_BT, mask_BT = torch.zeros(3, T, dtype=torch.long), torch.zeros(3, T).bool()
    alone = []
    for row, (p, t) in enumerate(zip(lengths, widths, strict=True)):
        context, decision = tokens(1, p, seed=row), tokens(1, t, seed=9 + row)
        ids_BP[row, P - p :], mask_BP[row, P - p :] = context[0], 1
        ids_BT[row, :t], mask_BT[row, :t] = decision[0], True
        alone.append(model(torch.cat([context, decision], 1), use_cache=False).logits[0, p:])
    context = freeze_context(model, ids_BP, mask_BP)
    together = context.forward(ids_BT, mask_BT)
    picked = context.forward(ids_BT, mask_BT, mask_BT)
    assert picked.shape == (sum(widths), 128)
    torch.testing.assert_close(picked, together[mask_BT], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(picked, torch.cat(alone), rtol=1e-3, atol=3e-5)
    picked.logsumexp(1).mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_gradient_checkpointing_keeps_the_context(model):
    decision_BT = tokens(2, T, seed=2)
    ones_BT = torch.ones_like(decision_BT).bool()
    loss_of(read(model, tokens(2, P)).forward(decision_BT, ones_BT), decision_BT).backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable()
    model.train()
    context = read(model, tokens(2, P))
    assert all(module.training for module in model.modules())
    loss_of(context.forward(decision_BT, ones_BT), decision_BT).backward()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name]), name
    assert not any("_can_checkpoint_with_cache" in vars(m) for m in model.modules())


def test_bad_input_is_refused(llama):
    with pytest.raises(ShapeMismatch, match="one shape"):
        freeze_context(llama, tokens(2, 4), torch.ones(2, 5))
    with pytest.raises(InputError, match="on the left"):
        freeze_context(llama, tokens(1, 3), torch.tensor([[1, 1, 0]]))
    with pytest.raises(InputError, match="needs a token"):
        freeze_context(llama, torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 0))
    context = read(llama, tokens(2, 4))
    with pytest.raises(InputError, match="two positions"):
        context.forward(tokens(2, 1), torch.ones(2, 1).bool())
    with pytest.raises(ShapeMismatch, match="2 rows"):
        context.forward(tokens(3, 2), torch.ones(3, 2).bool())
    cache = read(llama, tokens(2, 4)).cache
    cache.layers[0] = LinearAttentionAndFullAttentionLayer()
    with pytest.raises(ModelNotSupported, match="tier 1"):
        FrozenCache(cache)
