"""The variants in every mode: recomputed, frozen, tiled, half."""

import copy

import pytest
import torch
from rest_variants import OTHERS, tiny
from weights_rule import image

# with EMSA, which has a dense and a tiled implementation
WITH_EMSA = [name for name in OTHERS if name.startswith(('stem', 'pos'))]
WITH_EMSA += ['attn_avg', 'attn_max']


def train_step(model, size=(40, 64)):
    """Outputs and gradients of a step with fixed random numbers."""
    torch.manual_seed(0)
    outs = model.train()(image((2, 3, *size)))
    sum((out.float() * image(out.shape, 9)).sum() for out in outs).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return outs, grads


@pytest.mark.parametrize('variant', OTHERS)
def test_checkpointing_and_training(variant):
    options = dict(drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.2)
    outs, grads = train_step(tiny(variant, **options))
    again, grads_again = train_step(tiny(variant, with_cp=True, **options))
    for stored, recomputed in zip(outs, again):
        assert torch.equal(stored, recomputed)
    for name, grad in grads.items():
        assert torch.equal(grad, grads_again[name]), name


@pytest.mark.parametrize(
    'variant, frozen_stages',
    # each variant with two values, so that every value meets several variants
    [(v, (i + j) % 6 - 1) for i, v in enumerate(OTHERS) for j in (0, 3)],
)
def test_names_keep_their_form_and_freeze(variant, frozen_stages):
    model = tiny(variant, frozen_stages=frozen_stages)
    names = {name for name, _ in model.named_parameters()}
    parts = {'stem', *(f'patch_embed_{k}' for k in (2, 3, 4))}
    parts |= {f'stage{k}' for k in (1, 2, 3, 4)} | {'norm1', 'norm2', 'norm3', 'norm'}
    assert {name.split('.')[0] for name in names} == parts

    prefixes = ['stem.'] if frozen_stages >= 0 else []
    for k in range(1, frozen_stages + 1):
        prefixes += [f'stage{k}.', f'patch_embed_{k}.']
    frozen = {name for name in names if name.startswith(tuple(prefixes))}
    before = copy.deepcopy(model.state_dict())
    _, grads = train_step(model, size=(64, 64))
    assert grads.keys() == names - frozen
    assert all(grad is not None for grad in grads.values())
    for name, tensor in model.state_dict().items():  # BatchNorm's statistics too
        if name.startswith(tuple(prefixes)):
            assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize('variant', WITH_EMSA)
def test_tiled_attention_is_the_dense_one(variant):
    """Of an odd size, in float64: rounding is all that differs."""
    results = []
    for impl in ('dense', 'tiled'):
        model = tiny(variant, attn_impl=impl).double().eval()
        x = image((1, 3, 45, 83)).double().requires_grad_()
        outs = model(x)
        sum((out * image(out.shape, 9)).sum() for out in outs).backward()
        results.append([*outs, x.grad])
    for dense, other in zip(*results):
        scale = float(dense.detach().abs().max())
        assert float((dense - other).detach().abs().max()) < 1e-9 * scale


@pytest.mark.parametrize('variant', OTHERS)
def test_mixed_precision(variant):
    model = tiny(variant)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        outs, grads = train_step(model)
    assert all(out.isfinite().all() for out in outs)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32 and grad.isfinite().all(), name
