"""Ensembles: several members' distributions as one.

The log-probabilities of the members are averaged, by their weights where they were given, at every
position: a product of experts (Hinton, "Training Products of Experts by Minimizing Contrastive
Divergence", 2002), which is the geometric mean of the distributions. Whoever draws from the result
renormalizes it, as logits are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from manyhats.types import AdapterRef, ScheduledSequence
from manyhats.types import Sequence as LiveSequence


def wholes(items: Iterable[ScheduledSequence]) -> dict[int, list[ScheduledSequence]]:
    """The items of a step by whose they are (the id of a sequence, of a lane that of its whole)."""
    found: dict[int, list[ScheduledSequence]] = {}
    for item in items:
        found.setdefault(item.sequence.ticket, []).append(item)
    return found


def united(
    logits: Tensor, sampled: Sequence[ScheduledSequence]
) -> tuple[Tensor, list[LiveSequence]]:
    """A row for each whole sequence, in the order of their first items, and the sequences.

    ``logits`` [B, V]: row i is of ``sampled[i]``. Without ensembles they come back as they are;
    else as fp32, an ensemble's row being sum_m w_m * log_softmax(logits_m), the weights' sum 1. A
    row is a function of its own members' rows alone, bit for bit.
    """
    if all(item.sequence.whole is None for item in sampled):
        return logits, [item.sequence for item in sampled]
    rows = {item.sequence.id: row for row, item in enumerate(sampled)}
    found = [(items[0].sequence.whole or items[0].sequence) for items in wholes(sampled).values()]
    of_lane = [[rows[lane.id] for lane in seq.computed] for seq in found]
    first = torch.tensor([lanes[0] for lanes in of_lane], device=logits.device)
    out = logits.index_select(0, first).float()
    several = [i for i, seq in enumerate(found) if seq.lanes]
    out[several] = 0.0
    # Lane by lane, not by one sum over all: in one order for each row, whoever shares the batch.
    for lane in range(max(len(of_lane[i]) for i in several)):
        having = [i for i in several if lane < len(of_lane[i])]
        logprobs = torch.log_softmax(logits[[of_lane[i][lane] for i in having]].float(), dim=-1)
        weights = torch.tensor([shares(found[i].adapter)[lane] for i in having], device=out.device)
        out[having] += logprobs * weights.unsqueeze(1)
    return out, found


def shares(adapter: AdapterRef | None) -> Sequence[float]:
    """The members' weights, their sum 1. Raises ValueError for what is no ensemble."""
    whole = adapter.composition if adapter is not None else None
    if whole is None:
        raise ValueError(f"{adapter} is no ensemble")
    weights = whole.weights or (1.0,) * len(whole.members)
    return [weight / sum(weights) for weight in weights]
