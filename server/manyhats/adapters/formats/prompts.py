"""Soft prompts as PEFT 0.21.2 writes them: prompt tuning, P-tuning, multitask prompt tuning, CPT.

``save_pretrained`` evaluates a P-tuning encoder (MLP or LSTM) or a CPT projection and saves the
result, [tokens, hidden], as ``prompt_embeddings`` (peft/peft_model.py,
get_prompt_embedding_to_save): what PEFT itself uses at inference. Multitask prompt tuning
(arXiv:2303.02861) saves its factors: task t's prompt is embeddings * (cols[t] rows[t]).
"""

from __future__ import annotations

from functools import partial
from typing import Final

import torch

from manyhats.adapters.formats.builder import Builder
from manyhats.adapters.formats.fields import (
    FieldTable,
    Refusal,
    bad,
    check_fields,
    field_table,
    positive,
)
from manyhats.adapters.formats.job import Job, Section, Shape, assemble
from manyhats.adapters.formats.tokens import input_embedding
from manyhats.adapters.parts import CompiledAdapter, SiteSpec
from manyhats.errors import AdapterRejectedError

EMBEDDINGS: Final = "prompt_embeddings"
"""The tensor's name in a file of any of these families, and of prefix tuning's."""

PROMPT_HONOURED: Final = frozenset({"num_virtual_tokens", "num_transformer_submodules"})
"""Fields of every family that learns a prompt."""

PROMPT_IRRELEVANT: Final = {
    "num_attention_heads": "shapes prefixes alone",
    "num_layers": "shapes prefixes alone",
    "token_dim": "the tensor's own shape decides",
}
PROMPT_REFUSED: Final = {
    "modules_to_save": Refusal("modules trained beside a prompt (modules_to_save)", ([],))
}
_TRAINING: Final = "how training began"
_INIT: Final = dict.fromkeys(
    (
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_name_or_path",
        "tokenizer_kwargs",
    ),
    _TRAINING,
)
_ENCODER: Final = dict.fromkeys(
    (
        "encoder_reparameterization_type",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_dropout",
    ),
    "of the encoder, which PEFT evaluates when it saves",
)
_CPT: Final = dict.fromkeys(
    (
        "cpt_token_ids",
        "cpt_mask",
        "cpt_tokens_type_mask",
        "opt_weighted_loss_type",
        "opt_loss_decay_factor",
        "opt_projection_epsilon",
        "opt_projection_format_epsilon",
        "tokenizer_name_or_path",
    ),
    "of training; PEFT saves the projected embeddings",
)


def _table(irrelevant: dict[str, str], honoured: frozenset[str] = frozenset()) -> FieldTable:
    return field_table(
        PROMPT_HONOURED | honoured, {**PROMPT_IRRELEVANT, **irrelevant}, PROMPT_REFUSED
    )


TASK_FIELD: Final = "manyhats_task"
"""Ours: which task of a multitask prompt is registered, from 0."""

TABLES: Final = {
    "PROMPT_TUNING": _table(_INIT),
    "P_TUNING": _table(_ENCODER),
    "CPT": _table(_CPT),
    "MULTITASK_PROMPT_TUNING": _table(
        {
            **_INIT,
            "prompt_tuning_init_state_dict_path": _TRAINING,
            "prompt_tuning_init_task": _TRAINING,
        },
        frozenset({"num_ranks", "num_tasks", TASK_FIELD}),
    ),
}


def compile_prompt(job: Job, *, family: str) -> CompiledAdapter:
    """Compile PROMPT_TUNING, P_TUNING or CPT; see ``compile_adapter``."""
    check_fields(job.config, TABLES[family])
    tokens, site = virtual_tokens(job), input_embedding(job.base)
    shapes: dict[str, Shape] = {EMBEDDINGS: (tokens, site.out_features)}

    def build(builder: Builder) -> None:
        builder.soft_prompt(site, job.tensor(EMBEDDINGS), EMBEDDINGS)

    return assemble(job, family.lower(), [Section(shapes, build)], virtual_tokens=tokens)


def compile_multitask_prompt(job: Job) -> CompiledAdapter:
    """Compile one task of MULTITASK_PROMPT_TUNING; see ``compile_adapter``."""
    config = job.config
    check_fields(config, TABLES["MULTITASK_PROMPT_TUNING"])
    tokens, site = virtual_tokens(job), input_embedding(job.base)
    tasks = positive("num_tasks", config.get("num_tasks", 1))
    ranks = positive("num_ranks", config.get("num_ranks", 1))
    task = _task(job, tasks)
    hidden = site.out_features
    shapes: dict[str, Shape] = {
        EMBEDDINGS: (tokens, hidden),
        "prefix_task_cols": (tasks, tokens, ranks),
        "prefix_task_rows": (tasks, ranks, hidden),
    }
    section = Section(shapes, partial(_build_task, job, site, task))
    return assemble(job, "multitask_prompt_tuning", [section], virtual_tokens=tokens)


def virtual_tokens(job: Job) -> int:
    """``num_virtual_tokens`` within the bound; also checks that the prompt is a decoder's."""
    tokens = positive("num_virtual_tokens", job.config.get("num_virtual_tokens"))
    bound = job.limits.max_virtual_tokens
    if tokens > bound:
        raise AdapterRejectedError(
            "too_large",
            f"num_virtual_tokens is {tokens}, over the bound of {bound} (max_virtual_tokens)",
            param="num_virtual_tokens",
        )
    submodules = job.config.get("num_transformer_submodules")
    if submodules is not None and (type(submodules) is not int or submodules != 1):
        raise bad("num_transformer_submodules", submodules, "1, as for any decoder")
    return tokens


def _task(job: Job, tasks: int) -> int:
    task = job.config.get(TASK_FIELD, 0 if tasks == 1 else None)
    if type(task) is not int or not 0 <= task < tasks:
        raise bad(TASK_FIELD, task, f"the task to serve, from 0 to {tasks - 1}")
    return task


def _build_task(job: Job, site: SiteSpec, task: int, builder: Builder) -> None:
    cols, rows = (job.tensor(name)[task] for name in ("prefix_task_cols", "prefix_task_rows"))
    vectors: torch.Tensor = job.tensor(EMBEDDINGS) * (cols @ rows)
    builder.soft_prompt(site, vectors, EMBEDDINGS)
