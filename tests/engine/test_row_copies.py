"""Rank rows come whole, through lanes that are not written to while what they hold is under way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhats.engine.row_copies import CudaLane, StagedCopies, copies_to


class LateLane:
    """Copies as late as it may: when it is waited for. Then its room is spoiled."""

    def __init__(self, nbytes):
        self.room = torch.zeros(nbytes, dtype=torch.uint8)
        self.under_way = []
        self.sent = 0

    def send(self, pairs):
        assert not self.under_way, "sent again without a wait"
        begin, end = self.room.data_ptr(), self.room.data_ptr() + len(self.room)
        assert all(begin <= s.data_ptr() and s.data_ptr() + s.nbytes <= end for _, s in pairs)
        self.under_way = list(pairs)
        self.sent += 1

    def wait(self):
        for rows, staged in self.under_way:
            rows.copy_(staged)
        self.under_way = []
        self.room.fill_(255)


def random_pairs(shapes, dtype, source):
    generator = torch.Generator().manual_seed(len(shapes))
    values = [torch.randn(*shape, generator=generator).to(source) for shape in shapes]
    pool = [torch.full((rows + 2, width), 7.0, dtype=dtype) for rows, width in shapes]
    return pool, [p[1:-1] for p in pool], values


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 64)), max_size=12),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.integers(1, 3),
    st.integers(280, 4000),
)
def test_all_rows_are_there_on_return_and_no_others(shapes, dtype, source, count, nbytes):
    pool, rows, values = random_pairs(shapes, dtype, source)
    lanes = [LateLane(nbytes // 64 * 64) for _ in range(count)]
    StagedCopies(lanes)(rows, values)
    for whole, value in zip(pool, values, strict=True):
        assert torch.equal(whole[1:-1], value.to(dtype))
        assert bool((whole[0] == 7).all())
        assert bool((whole[-1] == 7).all())


def test_one_lane_is_filled_while_the_other_is_under_way():
    _, rows, values = random_pairs([(16, 32)] * 6, torch.float32, torch.float32)
    lanes = [LateLane(16 * 32 * 4) for _ in range(2)]
    StagedCopies(lanes)(rows, values)
    assert [lane.sent for lane in lanes] == [3, 3]


def test_a_value_of_another_shape_and_a_row_too_long_are_refused_and_nothing_stays_under_way():
    _, rows, values = random_pairs([(2, 8), (2, 8)], torch.float32, torch.float32)
    lanes = [LateLane(64)]
    with pytest.raises(ValueError, match=r"\(1, 8\) values for \(2, 8\) rows"):
        StagedCopies(lanes)(rows, [values[0], values[1][:1]])
    with pytest.raises(ValueError, match="a row of 32 bytes is longer than a lane's 16"):
        StagedCopies([LateLane(16)])(rows, values)
    assert not lanes[0].under_way


@pytest.mark.parametrize("shapes", [[], [(3, 5), (1, 70)]])
def test_the_way_to_the_host_s_own_memory_is_straight(shapes):
    _, rows, values = random_pairs(shapes, torch.bfloat16, torch.float32)
    copies_to(torch.device("cpu"))(rows, values)
    assert all(torch.equal(r, v.to(torch.bfloat16)) for r, v in zip(rows, values, strict=True))


@pytest.mark.gpu
def test_rows_on_a_gpu_are_there_on_return_beside_a_busy_default_stream():
    shapes = [(16, 576), (16, 1536), (3, 192), (64, 49152)] * 20
    device = torch.device("cuda")
    _, rows, values = random_pairs(shapes, torch.bfloat16, torch.bfloat16)
    rows = [r.to(device) for r in rows]
    copy = copies_to(device)
    busy = torch.randn(4096, 4096, device=device)
    for _ in range(20):
        busy = busy @ busy / 64
    copy(rows, values)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # not behind the default stream's work
        found = [r.cpu() for r in rows]
    assert all(torch.equal(f, v) for f, v in zip(found, values, strict=True))
    lane = CudaLane(side, 64)
    assert lane.room.is_pinned()
