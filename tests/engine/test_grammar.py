"""Constrained output: real JSON from a real tokenizer, bounds, the cache."""

import json
import threading

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from manyhats.engine.grammar import GrammarCompiler
from manyhats.engine.grammar_mask import empty_masks
from manyhats.engine.sampling import Sampler
from manyhats.engine.schema_bounds import MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH
from manyhats.errors import EngineFailedError, RequestError
from manyhats.types import GrammarKind, GrammarSpec, SamplingParams, Sequence, TenantId

EOS = 2
VOCAB = 49_200  # the logits may be wider than the tokenizer
OBJECT = GrammarSpec(GrammarKind.JSON_OBJECT)


@pytest.fixture(scope="session")
def smollm2(smollm2_path):
    return Tokenizer.from_file(str(smollm2_path / "tokenizer.json"))


@pytest.fixture(scope="session")
def compiler(smollm2):
    return GrammarCompiler(smollm2, VOCAB, frozenset({EOS}))


def schema(value):
    return GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(value))


def allowed(matcher):
    bits = empty_masks(1, VOCAB)
    matcher.fill_mask(bits[0])
    return set(np.unpackbits(bits.numpy().view(np.uint8), bitorder="little").nonzero()[0].tolist())


def ids_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "bé", "🙂"]}, "maxItems": 3},
        "home": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/place"}]},
    },
    "required": ["name", "age", "tags", "home"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["zip"],
            "additionalProperties": False,
        }
    },
}


def is_person(value):
    home = value["home"]
    return (
        set(value) == {"name", "age", "tags", "home"}
        and isinstance(value["name"], str)
        and len(value["name"]) <= 8
        and type(value["age"]) is int
        and 0 <= value["age"] <= 130
        and len(value["tags"]) <= 3
        and set(value["tags"]) <= {"a", "bé", "🙂"}
        and (
            home is None
            or (set(home) == {"zip"} and len(home["zip"]) == 5 and home["zip"].isdigit())
        )
    )


def generate(compiler, tokenizer, specs, limit=300, seed=0):
    """Random logits, leaning towards closing what is open, under each row's grammar."""
    sampler = Sampler(VOCAB, torch.device("cpu"), frozenset({EOS}))
    rows = [
        Sequence(
            id=i, request_id="r", index=0, tenant=TenantId("t"), adapter=None, arrival=0.0,
            params=SamplingParams(max_tokens=limit, seed=seed + i), prompt_len=0, token_ids=[],
        )
        for i in range(len(specs))
    ]  # fmt: skip
    matchers = {i: compiler.compile(spec).matcher() for i, spec in enumerate(specs)}
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(64, VOCAB, generator=generator) * 2
    noise[:, [EOS, *(ids_of(tokenizer, c)[0] for c in '"}],:')]] += 9.0
    open_rows = list(rows)
    while open_rows and open_rows[0].output_len < limit:
        masks, errors = compiler.masks({at: matchers[s.id] for at, s in enumerate(open_rows)})
        assert not errors
        raw = noise[torch.randint(64, (len(open_rows),), generator=generator)]
        for s, result in zip(open_rows, sampler.sample(raw, open_rows, masks), strict=True):
            s.token_ids.append(result.token_id)
            matchers[s.id].accept(result.token_id)
        open_rows = [s for s in open_rows if s.token_ids[-1] != EOS]
    assert all(matchers[s.id].is_finished for s in rows if s not in open_rows)
    return [(s.token_ids[:-1], s not in open_rows) for s in rows]


def test_random_logits_become_json_that_fits_the_schema(compiler, smollm2):
    found = generate(compiler, smollm2, [schema(PERSON)] * 8)
    assert all(ended for _, ended in found)
    values = [json.loads(smollm2.decode(ids, skip_special_tokens=False)) for ids, _ in found]
    assert all(map(is_person, values))
    assert len({json.dumps(v) for v in values}) > 4


def test_random_logits_become_json_objects(compiler, smollm2):
    found = generate(compiler, smollm2, [OBJECT] * 6, seed=3)
    ended = [ids for ids, done in found if done]
    assert len(ended) >= 3
    for ids in ended:
        assert isinstance(json.loads(smollm2.decode(ids, skip_special_tokens=False)), dict)


def test_every_json_object_is_allowed(compiler, smollm2):
    text = json.dumps({"a": [1, -2.5e3, {"b": None}], "é🙂": 'x\ny"', "": [True, {}]}, indent=2)
    raw = json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))
    for written in (text, raw):
        matcher = compiler.compile(OBJECT).matcher()
        for token in ids_of(smollm2, written):
            assert not matcher.is_finished
            assert token in allowed(matcher)
            matcher.accept(token)
        assert matcher.is_finished


def test_half_of_an_escaped_character_is_not_allowed(compiler, smollm2):
    matcher = compiler.compile(OBJECT).matcher()
    matcher.replay(ids_of(smollm2, '{"\\ud800'))
    assert ids_of(smollm2, '"')[0] not in allowed(matcher)


def test_a_complete_grammar_allows_end_of_sequence_alone(compiler, smollm2):
    matcher = compiler.compile(schema({"const": {"a": 1}})).matcher()
    assert EOS not in allowed(matcher)
    matcher.replay(ids_of(smollm2, '{"a":1}'))
    assert allowed(matcher) == {EOS}
    assert matcher.is_finished
    matcher.accept(EOS)
    matcher.accept(EOS)
    assert allowed(matcher) == {EOS}
    with pytest.raises(EngineFailedError, match="token 100"):
        matcher.accept(100)


def test_where_the_output_may_end_or_go_on_both_are_allowed(compiler, smollm2):
    matcher = compiler.compile(schema({"type": "integer"})).matcher()
    one = ids_of(smollm2, "1")[0]
    matcher.accept(one)
    assert {EOS, one} <= allowed(matcher)
    assert not matcher.is_finished
    matcher.accept(EOS)
    assert matcher.is_finished


def test_several_end_tokens_end_it(smollm2):
    two = GrammarCompiler(smollm2, VOCAB, frozenset({0, EOS}))
    matcher = two.compile(schema({"const": 1})).matcher()
    matcher.replay(ids_of(smollm2, "1"))
    assert allowed(matcher) == {0, EOS}
    matcher.accept(0)
    assert matcher.is_finished


def test_special_tokens_and_ids_beyond_the_tokenizer_are_never_allowed(compiler, smollm2):
    matcher = compiler.compile(OBJECT).matcher()
    matcher.replay(ids_of(smollm2, '{"key": "in a string'))
    inside = allowed(matcher)
    special = {t for t, token in smollm2.get_added_tokens_decoder().items() if token.special}
    assert len(inside) > 10_000
    assert not inside & special
    assert max(inside) < smollm2.get_vocab_size()


def test_a_token_that_does_not_fit_is_an_error_of_its_own_sequence(compiler, smollm2):
    grammar = compiler.compile(OBJECT)
    bad, good = grammar.matcher(), grammar.matcher()
    with pytest.raises(EngineFailedError, match="response_format"):
        bad.accept(ids_of(smollm2, "hello")[0])
    masks, errors = compiler.masks({3: bad, 5: good})
    assert masks.rows == (3, 5)
    assert list(errors) == [3]
    assert isinstance(errors[3], RequestError)
    assert allowed(good) == allowed(grammar.matcher())
    assert compiler.masks({}) == (None, {})


def test_replay_brings_a_new_matcher_to_the_same_place(compiler, smollm2):
    grammar = compiler.compile(schema(PERSON))
    ids = ids_of(smollm2, '{"name": "Zoé", "age": 12, "tags": ["bé", "🙂"], "home": {"zip": "12')
    old = grammar.matcher()
    for n, token in enumerate(ids):
        old.accept(token)
        new = grammar.matcher()
        new.replay(ids[: n + 1])
        assert allowed(new) == allowed(old)


def nested(levels):
    value = {"type": "string"}
    for _ in range(levels):
        value = {"items": value, "type": "array"}
    return value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not valid JSON"),
        ('{"minimum": NaN}', "NaN is not a JSON value"),
        ("[1]", "must be a JSON object"),
        ("true", "must be a JSON object"),
        (json.dumps({"type": "nope"}), "nope"),
        (json.dumps({"type": "string", "pattern": "("}), "cannot be served"),
        (json.dumps({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (json.dumps({"$ref": "#/$defs/missing"}), "missing"),
        (json.dumps({"$ref": "https://example.com/s.json"}), "points outside the schema"),
        (json.dumps({"items": {"$ref": "file:///etc/passwd"}}), "points outside the schema"),
        (json.dumps({"properties": {"const": {"$ref": "other.json#/a"}}}), "points outside"),
        (json.dumps({"x-guidance": {"lenient": True}}), "x-guidance"),
        (json.dumps({"enum": []}), "Unsatisfiable"),
        (json.dumps({"$ref": "#"}), "no value satisfies"),
        (json.dumps({"type": "integer", "minimum": 5, "maximum": 3}), "Unsatisfiable"),
        (json.dumps({"description": "é" * MAX_SCHEMA_BYTES}), f"the bound is {MAX_SCHEMA_BYTES}"),
        (json.dumps(nested(MAX_SCHEMA_DEPTH)), f"the bound is {MAX_SCHEMA_DEPTH}"),
        ("[" * 60_000, f"the bound is {MAX_SCHEMA_DEPTH}"),
        (json.dumps({"enum": [f"{i:09}" for i in range(4000)]}), None),
        (json.dumps(nested(MAX_SCHEMA_DEPTH - 1)), None),
        (json.dumps({"const": {"$ref": "https://example.com"}}), None),
        (json.dumps({"properties": {"$ref": {"type": "string"}, "x-guidance": {}}}), None),
    ],
)
def test_what_a_schema_may_be(compiler, text, says):
    spec = GrammarSpec(GrammarKind.JSON_SCHEMA, text)
    if says is None:
        assert compiler.compile(spec)
        return
    with pytest.raises(RequestError) as caught:
        compiler.compile(spec)
    assert caught.value.param == "response_format"
    assert says in caught.value.message
    assert len(caught.value.message) < 1000


def test_a_schema_without_text_is_refused(compiler):
    with pytest.raises(RequestError, match="needs a schema"):
        compiler.compile(GrammarSpec(GrammarKind.JSON_SCHEMA))


def test_white_space_is_bounded(compiler, smollm2):
    matcher = compiler.compile(OBJECT).matcher()
    matcher.replay(ids_of(smollm2, "{"))
    space = ids_of(smollm2, " ")[0]
    for _ in range(32):
        assert space in allowed(matcher)
        matcher.accept(space)
    assert space not in allowed(matcher)


def test_the_cache_is_bounded_and_the_oldest_goes(smollm2):
    small = GrammarCompiler(smollm2, VOCAB, frozenset({EOS}), cache_size=3)
    specs = [schema({"const": i}) for i in range(4)]
    first = [small.compile(spec) for spec in specs[:3]]
    assert small.compile(specs[0]) is first[0]
    small.compile(specs[3])
    assert small.cached == 3
    assert small.compile(specs[0]) is first[0]
    assert small.compile(specs[1]) is not first[1]


def test_compiling_from_several_threads(smollm2):
    shared = GrammarCompiler(smollm2, VOCAB, frozenset({EOS}), cache_size=4)
    failed = []

    def work(n):
        try:
            for i in range(12):
                matcher = shared.compile(schema({"const": (n + i) % 6})).matcher()
                matcher.replay(ids_of(smollm2, str((n + i) % 6)))
                assert allowed(matcher) == {EOS}
        except Exception as error:  # noqa: BLE001  (reported in the test's own thread)
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert shared.cached == 4


def test_a_model_without_an_end_cannot_be_constrained(smollm2):
    with pytest.raises(ValueError, match="end-of-sequence"):
        GrammarCompiler(smollm2, VOCAB, frozenset())
