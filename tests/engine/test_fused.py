"""The base's norms and MLPs in one pass give what transformers' own modules give."""

import pytest
import torch
from support.models import tiny_model

from manyhats.engine.kernels import resolve_kernels
from manyhats.engine.model.fused import FusedGate, FusedNorm, fuse

FUSED = {
    # layers x (two norms, one MLP) and the last norm; Qwen 3 has two norms more a layer
    "llama": 3 * 3 + 1,
    "qwen2": 3 * 3 + 1,
    "qwen3": 3 * 5 + 1,
    # its MLP is fused in one projection, its norms are the usual ones
    "phi3": 3 * 2 + 1,
    # norms that multiply by 1 + weight, a GELU; norms with a mean
    "gemma3": 0,
    "gpt2": 0,
}


@pytest.fixture(scope="module")
def native(home):
    return resolve_kernels("native", device=torch.device("cpu"), home=home).backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUSED)
@torch.inference_mode()
def test_the_model_answers_as_before(native, name, dtype):
    model = tiny_model(name).to(dtype)
    ids = torch.arange(3, 40)[None]
    before = model(ids).logits.float()
    assert fuse(model, native) == FUSED[name]
    taken = [m.forward for m in model.modules() if isinstance(m.forward, FusedNorm | FusedGate)]
    assert len(taken) == FUSED[name]
    after = model(ids).logits.float()
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    assert (after - before).abs().max() <= bound * before.abs().max()


@torch.inference_mode()
def test_what_computes_something_else_keeps_its_own(native):
    """An activation that is no SiLU is found out, whatever its module is called."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    assert fuse(model, native) == FUSED["llama"] - 3
