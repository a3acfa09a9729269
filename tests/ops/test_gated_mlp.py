"""The gated MLP of a stack on AMX tiles, from whose sums of gate and up the input of down is made.

The oracles: the backend's single calls, to the bit, and the same in double precision.
"""

import numpy as np
import pytest
import torch
from support.uneven_rows import quantized

from manyhats_kernels import resolve
from manyhats_kernels.backend import SiteRows
from manyhats_kernels.batch import AdapterBatch, AttentionBatch
from manyhats_kernels.fourbit import FourBitWeight
from manyhats_kernels.groups import MatrixGroup, SiteGroup, SiteWeights
from manyhats_kernels.stack import LayerStack, StackLayer
from manyhats_kernels.stack_parts import LayerParts, LinearParts, NormParts, VectorRows

HIDDEN, INNER, DIM, EPS = 128, 192, 32, 1e-5
SLOTS = 4
COUNTS = {"gate": [16, 5, 0, 64], "up": [1, 33, 0, 0], "down": [17, 16, 0, 40]}
MIXES = {
    "base": [-1] * 40,
    "long": [0] * 70,
    "ragged": [0] * 37 + [-1] * 5 + [1] * 33 + [0] * 9 + [2] * 3 + [3] * 40 + [1],
    "threshold": [0] * 31 + [1] * 32 + [-1] * 34 + [3] * 33,
    "scattered": [(i * i) % 4 for i in range(200)],
    "prompts and decodes": [1] * 50 + [-1] * 61 + [0, 3, 2, -1],
    "mostly short": [0] * 31 + [-1] + [1] * 31,
    "no full tile": [-1] * 15,
}
NONE = LinearParts(None, None, None)


@pytest.fixture(scope="module")
def native(native_cache):
    backend = resolve("native", device=torch.device("cpu"), cache_dir=native_cache).backend
    if not backend._amx:
        pytest.skip("this machine has no AMX")
    return backend


def sites_of(k, outs, counts, seed):
    """Signed rank rows, of each site and slot as many as `counts` says, with NaN between."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for out, own in zip(outs, counts, strict=True):
        starts = [2 + sum(own[:slot]) + slot for slot in range(SLOTS)]
        a, b = (torch.full((sum(own) + 2 + SLOTS, n), torch.nan) for n in (k, out))
        for start, count in zip(starts, own, strict=True):
            a[start : start + count] = torch.randn(count, k, generator=generator) / 4
            b[start : start + count] = torch.randn(count, out, generator=generator) / 4
        rows = SiteRows(*(torch.tensor(v, dtype=torch.int32) for v in (starts, own)))
        made.append(SiteWeights(a.bfloat16(), b.bfloat16(), rows))
    return SiteGroup(made)


class Mlp:
    """A stack of one layer whose attention adds nothing to the stream, and its MLP in single calls
    and in double precision.
    """

    def __init__(self, native, biased):
        generator = torch.Generator().manual_seed(11)
        self.native = native
        gate, up, down = (
            quantized(*s) for s in ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
        )
        biases = [torch.randn(n, generator=generator).bfloat16() for n in (INNER, INNER, HIDDEN)]
        self.biases = biases if biased else [None] * 3
        self.weights = [gate[1] / 8, up[1] / 8, down[1] / 8]
        scaled = [
            FourBitWeight(w.packed, w.shape, w.blocksize, w.code, w.absmax / 8)
            for w, _ in (gate, up, down)
        ]
        nothing = quantized(HIDDEN, HIDDEN)[0]
        nothing = FourBitWeight(
            nothing.packed, nothing.shape, nothing.blocksize, nothing.code, nothing.absmax * 0
        )
        self.gate_up = MatrixGroup(scaled[:2], self.biases[:2])
        self.down = MatrixGroup(scaled[2:], self.biases[2:])
        self.adapters = (
            sites_of(HIDDEN, (INNER, INNER), (COUNTS["gate"], COUNTS["up"]), 1),
            sites_of(INNER, (HIDDEN,), (COUNTS["down"],), 2),
        )
        self.norm = torch.randn(HIDDEN, generator=generator).bfloat16()
        bare = [0] * SLOTS
        layer = StackLayer(
            input_norm=self.norm,
            post_norm=self.norm,
            q_norm=None,
            k_norm=None,
            qkv=MatrixGroup([nothing] * 3, [None] * 3),
            o=MatrixGroup([nothing], [None]),
            gate_up=self.gate_up,
            down=self.down,
            adapters=(
                sites_of(HIDDEN, (HIDDEN,) * 3, (bare,) * 3, 3),
                sites_of(HIDDEN, (HIDDEN,), (bare,), 4),
                *self.adapters,
            ),
            k_cache=torch.zeros(16, HIDDEN // DIM, 16, DIM, dtype=torch.bfloat16),
            v_cache=torch.zeros(16, HIDDEN // DIM, 16, DIM, dtype=torch.bfloat16),
            sliding_window=None,
        )
        heads = HIDDEN // DIM
        shape = {"heads": heads, "kv_heads": heads, "head_dim": DIM, "scale": 1.0}
        self.stack = LayerStack([layer], **shape, eps=EPS, head_eps=EPS)

    def run(self, hidden, slots, parts=None):
        tokens = len(slots)
        attention = AttentionBatch.build([tokens], [tokens], [list(range(16))], 16)
        rotation = torch.zeros(2, tokens, DIM, dtype=torch.bfloat16)
        stream = hidden.clone()
        batch = AdapterBatch.build(np.array(slots), SLOTS)
        self.native.run_stack(stream, self.stack, *rotation, attention, batch, parts)
        return stream

    def single_calls(self, hidden, slots, scales=None):
        """`scales`: of gate's output and down's input, [slots + 1][n], the last one the base's."""
        batch = AdapterBatch.build(np.array(slots), SLOTS)
        x = self.native.rms_norm(hidden, self.norm, EPS)
        gate, up = self.native.matmul_lora_group(x, self.gate_up, self.adapters[0], batch)
        if scales is not None:
            gate = gate * scales[0][slots]
        inner = self.native.silu_mul(gate, up)
        if scales is not None:
            inner = inner * scales[1][slots]
        (y,) = self.native.matmul_lora_group(inner, self.down, self.adapters[1], batch)
        return hidden + y

    def exact(self, hidden, slots):
        """What is added to the stream, unrounded."""

        def linear(x, at, site):
            y = x @ self.weights[at].double().T
            if self.biases[at] is not None:
                y = y + self.biases[at].double()
            for slot in set(slots) - {-1}:
                rows = [t for t, own in enumerate(slots) if own == slot]
                start, count = int(site.rows.start[slot]), int(site.rows.count[slot])
                a, b = (m[start : start + count].double() for m in (site.a, site.b))
                y[rows] += x[rows] @ a.T @ b
            return y

        x = hidden.double()
        x = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * self.norm.double()
        gate = linear(x, 0, self.adapters[0].sites[0])
        up = linear(x, 1, self.adapters[0].sites[1])
        return linear(torch.nn.functional.silu(gate) * up, 2, self.adapters[1].sites[0])


def signed(tokens):
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens)).bfloat16()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("mix", MIXES)
def test_has_the_bits_of_the_single_calls(native, mix, biased):
    """The last slot owns rows at gate and at down; slot 2 at no site."""
    mlp, slots = Mlp(native, biased), MIXES[mix]
    hidden = signed(len(slots))
    out = mlp.run(hidden, slots)
    assert torch.equal(out, mlp.single_calls(hidden, slots))
    exact = mlp.exact(hidden, slots)
    error = (out.double() - hidden.double() - exact).norm(dim=1)
    # x, gate, up, their product, y and the stream are each rounded to bf16.
    assert (error <= (exact.norm(dim=1) + hidden.double().norm(dim=1)) * 2**-6).all()


def test_a_factor_of_one_adapter_beside_low_rank_rows_of_others(native):
    """As IA3 has them: none is left out, and no one else's rows are scaled."""
    mlp, slots = Mlp(native, False), MIXES["ragged"]
    generator = torch.Generator().manual_seed(5)
    scales, vectors = [], []
    for slot, n in ((2, INNER), (3, INNER)):  # of gate's output; of down's input
        values = torch.ones(SLOTS + 1, n).bfloat16()
        values[slot] = torch.randn(n, generator=generator).bfloat16()
        has = torch.tensor([int(s == slot) for s in range(SLOTS)], dtype=torch.int32)
        scales.append(values)
        vectors.append(VectorRows(values[:SLOTS], has))
    gate, down = LinearParts(None, vectors[0], None), LinearParts(vectors[1], None, None)
    norms = (NormParts(None, None), NormParts(None, None))
    linear = (NONE, NONE, NONE, NONE, gate, NONE, down)
    parts = mlp.stack.parts([LayerParts(linear, norms, (), ())])
    hidden = signed(len(slots))
    out = mlp.run(hidden, slots, parts)
    assert torch.equal(out, mlp.single_calls(hidden, slots, scales))
    changed = (out != mlp.run(hidden, slots)).any(dim=1)
    assert [slot for slot, own in zip(slots, changed.tolist(), strict=True) if own] == [
        slot for slot in slots if slot in (2, 3)
    ]
    again = mlp.run(hidden, slots)  # nothing of a step is left to the next
    assert torch.equal(again, mlp.single_calls(hidden, slots))


def test_who_shares_a_step_changes_no_bit(native):
    mlp = Mlp(native, False)
    slots = [0] * 40 + [-1] * 40
    hidden = signed(len(slots))
    alone = mlp.run(hidden, slots)
    more, others = signed(123), MIXES["ragged"][:43] + [3] * 80
    for beside in (others[:43], others):
        together = mlp.run(torch.cat([more[: len(beside)], hidden]), [*beside, *slots])
        assert torch.equal(together[len(beside) :], alone)
