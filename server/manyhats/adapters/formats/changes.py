"""HiRA, RoAd, FourierFT and C3A as PEFT 0.21.2 writes them: changes of a whole weight.

They are of full rank as a rule, so that most are served as a replaced weight; see ``convert``.
"""

from __future__ import annotations

from functools import partial
from typing import Final

import torch

from manyhats.adapters.formats.builder import Builder
from manyhats.adapters.formats.convert import put_change
from manyhats.adapters.formats.fields import bad, boolean, number, positive, table, text
from manyhats.adapters.formats.inner import inner_rank, literal_table
from manyhats.adapters.formats.job import PREFIX, Job, Section, Shape
from manyhats.adapters.formats.targets import PatternTable
from manyhats.adapters.formats.tuner import Tuner, tuner_table
from manyhats.adapters.parts import SiteSpec

_TRAINING: Final = "acts in training only"
_START: Final = "how training began"


def _plan_hira(job: Job, targets: list[SiteSpec]) -> Section:
    boolean(job.config, "fan_in_fan_out")
    r = inner_rank(job, "r", job.config.get("r", 32))
    ranks = PatternTable(
        {k: inner_rank(job, "rank_pattern", v) for k, v in table(job.config, "rank_pattern")},
        "rank_pattern",
        job.matcher,
    )
    shapes: dict[str, Shape] = {}
    for site in targets:
        rank = ranks.get(site.name, r)
        shapes[f"{PREFIX}{site.name}.hira_A"] = (rank, site.in_features)
        shapes[f"{PREFIX}{site.name}.hira_B"] = (site.out_features, rank)
    return Section(shapes, partial(_build_hira, job, targets))


def _build_hira(job: Job, targets: list[SiteSpec], builder: Builder) -> None:
    """W' = W * (1 + B A), elementwise (peft/tuners/hira/layer.py)."""
    for site in targets:
        name = f"{PREFIX}{site.name}.hira_B"
        put_change(job, builder, site, partial(_hira, job, site), name)


def _hira(job: Job, site: SiteSpec) -> torch.Tensor:
    a, b = (job.tensor(f"{PREFIX}{site.name}.hira_{leaf}") for leaf in "AB")
    return job.base_weight(site) * (b @ a)


_VARIANTS: Final = {"road_1": 0.5, "road_2": 1.0, "road_4": 2.0}


def _plan_road(job: Job, targets: list[SiteSpec]) -> Section:
    variant = text(job.config, "variant", "road_1", _VARIANTS)
    group = positive("group_size", job.config.get("group_size", 64))
    shapes: dict[str, Shape] = {}
    for site in targets:
        if group % 2 or site.out_features % group:
            raise bad("group_size", group, f"even and a divisor of {site.out_features} outputs")
        size = int(site.out_features * _VARIANTS[variant])
        for leaf in ("road_theta", "road_alpha"):
            shapes[f"{PREFIX}{site.name}.{leaf}"] = (size,)
    return Section(shapes, partial(_build_road, job, targets, variant, group))


def _build_road(
    job: Job, targets: list[SiteSpec], variant: str, group: int, builder: Builder
) -> None:
    """y = R (W x + b), R a scaled rotation of pairs of outputs (peft/tuners/road/layer.py;
    arXiv:2409.00119).
    """
    for site in targets:
        place = f"{PREFIX}{site.name}.road_"
        theta, alpha = job.tensor(f"{place}theta"), job.tensor(f"{place}alpha")
        columns = _road_columns(variant, group, theta, alpha)
        change = partial(_road_change, job, site, columns, group)
        put_change(job, builder, site, change, f"{place}theta")
        if site.bias is not None:
            delta = _rotated(site.bias, columns, group) - site.bias
            builder.bias(site, delta, f"{place}theta")


def _road_columns(
    variant: str, group: int, theta: torch.Tensor, alpha: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What an output, and its partner in the pair, are multiplied by; [out] each."""
    if variant == "road_4":
        theta, alpha = theta.view(-1, 2, group), alpha.view(-1, 2, group)
        first, second = alpha[:, 0] * theta[:, 0].cos(), alpha[:, 1] * theta[:, 1].sin()
        return first.flatten(), second.flatten()
    if variant == "road_1":
        theta, alpha = (
            t.view(-1, group // 2).repeat_interleave(2, dim=0).flatten() for t in (theta, alpha)
        )
    return alpha * theta.cos(), alpha * theta.sin()


def _rotated(
    rows: torch.Tensor, columns: tuple[torch.Tensor, torch.Tensor], group: int
) -> torch.Tensor:
    """R of each row, [..., out]."""
    halves = rows.reshape(-1, 2, group // 2)
    partners = torch.stack((-halves[:, 1], halves[:, 0]), dim=1).reshape(rows.shape)
    return rows * columns[0] + partners * columns[1]


def _road_change(
    job: Job, site: SiteSpec, columns: tuple[torch.Tensor, torch.Tensor], group: int
) -> torch.Tensor:
    weight = job.base_weight(site)
    return _rotated(weight.t().contiguous(), columns, group).t() - weight


def _plan_fourier(job: Job, targets: list[SiteSpec]) -> Section:
    config = job.config
    boolean(config, "fan_in_fan_out")
    seed = config.get("random_loc_seed", 777)
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise bad("random_loc_seed", seed, "an integer from 0 to 2**63 - 1")
    scaling = number("scaling", config.get("scaling", 150.0))
    count = positive("n_frequency", config.get("n_frequency", 1000))
    field = "n_frequency_pattern"
    counts = literal_table(job, {k: positive(field, v) for k, v in table(config, field)}, field)
    shapes: dict[str, Shape] = {}
    for site in targets:
        own = counts.get(site.name, count)
        if own > site.in_features * site.out_features:
            raise bad("n_frequency", own, f"at most the size of {site.name}'s weight")
        shapes[_fourier_name(site)] = (own,)
    return Section(shapes, partial(_build_fourier, job, targets, seed, scaling))


def _build_fourier(
    job: Job, targets: list[SiteSpec], seed: int, scaling: float, builder: Builder
) -> None:
    for site in targets:
        name = _fourier_name(site)
        change = partial(_fourier, job.tensor(name), site, seed, scaling)
        put_change(job, builder, site, change, name)


def _fourier(values: torch.Tensor, site: SiteSpec, seed: int, scaling: float) -> torch.Tensor:
    """The inverse transform of a spectrum with few entries, whose places are drawn from the seed
    (peft/tuners/fourierft/layer.py; arXiv:2405.03003).
    """
    size = site.out_features * site.in_features
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(size, generator=generator)[: len(values)]
    spectrum = torch.zeros(size)
    spectrum[places] = values
    spectrum = spectrum.view(site.out_features, site.in_features)
    change: torch.Tensor = torch.fft.ifft2(spectrum).real * scaling
    return change


def _fourier_name(site: SiteSpec) -> str:
    return f"{PREFIX}{site.name}.fourierft_spectrum"


def _plan_c3a(job: Job, targets: list[SiteSpec]) -> Section:
    config, field = job.config, "block_size_pattern"
    block = positive("block_size", config.get("block_size", 256))
    blocks = literal_table(job, {k: positive(field, v) for k, v in table(config, field)}, field)
    shapes: dict[str, Shape] = {}
    for site in targets:
        size = blocks.get(site.name, block)
        if site.in_features % size or site.out_features % size:
            raise bad("block_size", size, f"a divisor of the sizes of {site.name}")
        shapes[_c3a_name(site)] = (site.out_features // size, site.in_features // size, size)
    return Section(shapes, partial(_build_c3a, job, targets))


def _build_c3a(job: Job, targets: list[SiteSpec], builder: Builder) -> None:
    for site in targets:
        name = _c3a_name(site)
        put_change(job, builder, site, partial(_circulant, job.tensor(name)), name)


def _circulant(kernel: torch.Tensor) -> torch.Tensor:
    """Blocks that are circular convolutions (peft/tuners/c3a; arXiv:2407.19342)."""
    _, n, size = kernel.shape
    eye = torch.eye(n * size).reshape(n * size, n, size)
    mixed = torch.einsum("...nb,mnb->...mb", torch.fft.ifft(eye), torch.fft.fft(kernel))
    change: torch.Tensor = torch.fft.fft(mixed).real.flatten(start_dim=1).t() / (n * size)
    return change


def _c3a_name(site: SiteSpec) -> str:
    return f"{PREFIX}{site.name}.c3a_kernel"


HIRA: Final = Tuner(
    "HiRA",
    tuner_table(
        frozenset({"r", "rank_pattern", "fan_in_fan_out"}),
        {"hira_dropout": _TRAINING, "init_weights": _START},
    ),
    _plan_hira,
    transposed=True,
)
"""The family."""

ROAD: Final = Tuner(
    "RoAd",
    tuner_table(
        frozenset({"variant", "group_size"}),
        {"init_weights": _START},
        without=frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"}),
    ),
    _plan_road,
    transposed=False,
)
"""The family."""

FOURIERFT: Final = Tuner(
    "FourierFT",
    tuner_table(
        frozenset(
            {
                "n_frequency",
                "n_frequency_pattern",
                "scaling",
                "random_loc_seed",
                "fan_in_fan_out",
                "bias",
            }
        ),
        {"init_weights": _START},
    ),
    _plan_fourier,
    transposed=True,
    own_bias="fourier_only",
)
"""The family."""

C3A: Final = Tuner(
    "C3A",
    tuner_table(
        frozenset({"block_size", "block_size_pattern", "bias"}),
        {"init_weights": _START},
        without=frozenset({"exclude_modules"}),
    ),
    _plan_c3a,
    transposed=False,
    own_bias="c3a_only",
)
"""The family."""
