"""The bounds that every step and every sequence keeps."""

from __future__ import annotations

from dataclasses import dataclass

from manyhats.errors import ConfigError, ContextLengthError, RequestError
from manyhats.scheduler.blocks import BlockManager
from manyhats.types import Sequence


@dataclass(frozen=True, slots=True)
class Budget:
    """``max_num_seqs`` sequences run at once, of an ensemble its lanes being counted;
    ``max_step_tokens`` tokens are computed in a step, ``max_queue`` sequences wait, ``max_context``
    tokens are a sequence's prompt and output at most. Of background sequences ``max_background``
    wait, and beside live ones they compute ``background_tokens`` tokens a step together.

    Raises ConfigError where a running sequence could be left without its token in a step.
    """

    max_num_seqs: int
    max_step_tokens: int
    max_queue: int
    max_context: int
    max_background: int
    background_tokens: int

    def __post_init__(self) -> None:
        if not 1 <= self.max_num_seqs <= self.max_step_tokens:
            raise ConfigError(
                f"max_num_seqs ({self.max_num_seqs}) must be at least 1 and at most "
                f"max_step_tokens ({self.max_step_tokens}): each running sequence computes a token "
                "in each step.",
                param="max_num_seqs",
            )
        if self.max_background < 1 or self.background_tokens < 1:
            raise ConfigError(
                f"max_background ({self.max_background}) and background_tokens "
                f"({self.background_tokens}) must be at least 1.",
                param="max_background",
            )

    def check(self, seq: Sequence, blocks: BlockManager) -> None:
        """Raise ContextLengthError or RequestError for a sequence that could never be finished."""
        lanes = len(seq.computed)
        if lanes > self.max_num_seqs:
            raise RequestError(
                f"adapter: an ensemble of {lanes} takes {lanes} places, of at most "
                f"{self.max_num_seqs} (max_num_seqs)",
                param="adapter",
            )
        if seq.lanes and seq.wants_prompt_logprobs:
            raise RequestError(
                "adapter: log-probabilities of the prompt are not served for an ensemble",
                param="adapter",
            )
        for lane in seq.computed:
            self._check_lane(lane, lanes, blocks)

    def _check_lane(self, seq: Sequence, lanes: int, blocks: BlockManager) -> None:
        """``lanes``: how many of its kind the cache must hold."""
        prompt, output = seq.prompt_len, seq.params.max_tokens
        virtual = seq.virtual_tokens
        if prompt - virtual < 1:
            raise RequestError("The prompt has no token.", param="prompt")
        asked = f"The prompt has {prompt - virtual} tokens and max_tokens is {output}"
        if virtual:
            asked += f", the adapter has {virtual} virtual tokens"
        asked += f": {prompt + output}"
        if prompt + output > self.max_context:
            raise ContextLengthError(
                f"{asked} is over the context of {self.max_context} tokens.", param="max_tokens"
            )
        # The last token drawn is never computed.
        if lanes * blocks.needed(prompt + max(output, 1) - 1) > blocks.num_blocks:
            capacity = blocks.num_blocks * blocks.block_size
            each = f" in each of {lanes} lanes" if lanes > 1 else ""
            raise ContextLengthError(
                f"{asked}{each} is over the cache's {capacity} tokens.", param="max_tokens"
            )
