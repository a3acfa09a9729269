"""What the settings ask of the kernels and the kernels cannot do is said at start-up."""

import pytest

from manyhats.engine.kernels import check_rank
from manyhats.errors import ConfigError
from manyhats_kernels import Resolved
from manyhats_kernels.reference import ReferenceBackend


class Bounded(ReferenceBackend):
    name = "bounded"
    max_rank = 256


def test_a_rank_over_the_kernels_bound_is_refused():
    check_rank(Resolved(Bounded(), "bounded", ""), 256)
    with pytest.raises(ConfigError, match="max_rank: 257 is over the 256 that the bounded"):
        check_rank(Resolved(Bounded(), "bounded", ""), 257)


def test_kernels_without_a_bound_take_any():
    check_rank(Resolved(ReferenceBackend(), "reference", ""), 1024)
