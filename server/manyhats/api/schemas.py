"""The bodies of completions and chat completions: strict types, unknown fields refused.

A field of OpenAI's that this server does not honour is refused by name unless it cannot matter.
Bounds that are settings (``max_n``, ``max_stops``, ``max_logprobs``, the context) are checked in
``sampling`` and ``prompts``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from manyhats.api.fields import (
    CompositionField,
    Content,
    LogitBias,
    Metadata,
    Prompts,
    Stops,
    only,
)
from manyhats.lifecycle.audit import MAX_REASON

_TEMPLATE = "is not accepted from a request (the model's own chat template is used)"


class StrictModel(BaseModel):
    """Base of every request model: no unknown field, no coercion, no NaN or infinity."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class Reasoned(StrictModel):
    """Body of a change: why it is made, for the audit log."""

    reason: Annotated[str, Field(max_length=MAX_REASON)] = ""


class StreamOptions(StrictModel):
    """Options of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, only(False)] = None


class JsonSchemaFormat(StrictModel):
    """The schema of ``response_format``. It is always enforced, whatever ``strict`` says."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(StrictModel):
    """``response_format``: free text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class SamplingFields(StrictModel):
    """What completions and chat completions share. ``adapter``: several adapters worn as one;
    ``priority``: the highest first among the tenant's own waiting requests.
    """

    model: Annotated[str, Field(min_length=1, max_length=256)]
    adapter: CompositionField = None
    max_tokens: Annotated[int | None, Field(ge=0)] = None
    min_tokens: Annotated[int | None, Field(ge=0)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1, le=2**31 - 1)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=10)] = None
    logit_bias: LogitBias = ()
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    n: Annotated[int | None, Field(ge=1)] = None
    stop: Stops = ()
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int | None, Field(ge=-100, le=100)] = None

    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: Metadata | None = None
    store: Annotated[Any, only(False)] = None
    service_tier: Annotated[Any, only("auto", "default")] = None


class CompletionRequest(SamplingFields):
    """Body of ``POST /v1/completions``."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: Annotated[int | None, Field(ge=0)] = None
    best_of: Annotated[int | None, Field(ge=1)] = None
    suffix: Annotated[Any, only()] = None


class ChatMessage(StrictModel):
    """One message. An assistant's message may carry OpenAI's empty fields, so that answers can be
    sent back.
    """

    role: Literal["system", "user", "assistant"]
    content: Content
    name: Annotated[Any, only()] = None
    refusal: Annotated[Any, only()] = None
    annotations: Annotated[Any, only([])] = None
    audio: Annotated[Any, only()] = None
    tool_calls: Annotated[Any, only([])] = None
    tool_call_id: Annotated[Any, only()] = None
    function_call: Annotated[Any, only()] = None


class ChatRequest(SamplingFields):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0)] = None
    response_format: ResponseFormat | None = None

    modalities: Annotated[Any, only(["text"])] = None
    parallel_tool_calls: bool | None = None
    tools: Annotated[Any, only([])] = None
    tool_choice: Annotated[Any, only("none", "auto")] = None
    functions: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only("none", "auto")] = None
    audio: Annotated[Any, only()] = None
    prediction: Annotated[Any, only()] = None
    reasoning_effort: Annotated[Any, only()] = None
    verbosity: Annotated[Any, only("medium")] = None
    web_search_options: Annotated[Any, only()] = None
    chat_template: Annotated[Any, only(why=_TEMPLATE)] = None
    chat_template_kwargs: Annotated[Any, only(why=_TEMPLATE)] = None


def examples(*bodies: dict[str, Any]) -> ConfigDict:
    """``model_config`` of a model that ``/docs`` shows these bodies of."""
    return ConfigDict(json_schema_extra={"examples": list(bodies)})


def request_body(model: type[BaseModel]) -> dict[str, Any]:
    """``openapi_extra`` of a route whose body is ``model``: the schema in one piece."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})
    content = {"application/json": {"schema": _inlined(schema, definitions)}}
    return {"requestBody": {"required": True, "content": content}}


def _inlined(node: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_inlined(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inlined(definitions[node["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(value, definitions) for key, value in node.items()}
