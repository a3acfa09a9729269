"""The series: values, the cap on labels, the gateway's gauges, the table of the docstring."""

import re
import threading
from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from support.fake_engine import FakeEngine

from manyhats.engine.interface import EngineObserver, EngineStats
from manyhats.metrics import LabelCap, Metrics
from manyhats.metrics.labels import EPOCH_S, LOOK
from manyhats.types import FinishReason


def samples(metrics: Metrics) -> dict[str, float]:
    lines = metrics.render()[0].decode().splitlines()
    return {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))
    }


def full(max_labels: int = 10) -> Metrics:
    """Metrics that have seen everything once."""
    metrics = Metrics(max_labels, clock=lambda: 1234.5)
    observer: EngineObserver = metrics
    for adapter in (None, "pirate"):
        observer.queued(adapter, 0.5)
        observer.first_token(adapter, 0.2)
        observer.inter_token(adapter, 0.004)
        observer.inter_token(adapter, 0.006)
        observer.finished(adapter, FinishReason.STOP, 10, 4, 3, 1.5)
    observer.step(0.03, 100, 7, 9)
    observer.preempted()
    observer.adapter_loaded("pirate", "host", 0.1)
    observer.adapter_loaded("pirate", "device", 0.01)
    observer.adapter_evicted("pirate", "device")
    observer.adapter_load_failed("broken")
    metrics.http("/v1/models", "GET", 200)
    metrics.used("acme", 10, 3)
    metrics.refused("acme", "max_tokens")
    metrics.shadow.ran("pirate", 3, 0.5, 0.75, 1.25)
    metrics.lifecycle.evaluated("pirate", {"general_divergence": 0.5}, True)
    metrics.lifecycle.occupied("pirate", 5)
    metrics.lifecycle.sized({"pirate": 1000})
    metrics.kernels("native")
    metrics.watch(FakeEngine().stats)
    metrics.watch_device(lambda: (3 << 30, 8 << 30))
    metrics.drift.scored("pirate", "kl", 0.5)
    metrics.drift.compared("pirate", "kl", psi=0.1, ks=0.2)
    metrics.drift.e_value("pirate", "kl", 1.0)
    metrics.drift.against_base("pirate", kl=0.3, agreement=0.9)
    metrics.drift.reference("pirate", 300)
    metrics.drift.stale("pirate", False)
    metrics.drift.sampled("pirate", "finished")
    metrics.drift.dropped("queue")
    metrics.drift.alarm("pirate", "kl")
    metrics.drift.action("pirate", "rollback")
    metrics.drift.feedback("pirate", "positive")
    return metrics


def test_values_by_adapter():
    seen = samples(full())
    for adapter in ("base", "pirate"):
        label = f'adapter="{adapter}"'
        assert seen[f'manyhats_requests_total{{{label},outcome="stop"}}'] == 1
        assert seen[f'manyhats_requests_total{{{label},outcome="error"}}'] == 0
        assert seen[f"manyhats_prompt_tokens_total{{{label}}}"] == 10
        assert seen[f"manyhats_cached_prompt_tokens_total{{{label}}}"] == 4
        assert seen[f"manyhats_generation_tokens_total{{{label}}}"] == 3
        assert seen[f"manyhats_time_to_first_token_seconds_sum{{{label}}}"] == 0.2
        assert seen[f"manyhats_inter_token_seconds_count{{{label}}}"] == 2
        assert seen[f'manyhats_inter_token_seconds_bucket{{{label},le="0.005"}}'] == 1
        assert seen[f"manyhats_queue_seconds_sum{{{label}}}"] == 0.5
        assert seen[f"manyhats_request_seconds_sum{{{label}}}"] == 1.5
    assert seen["manyhats_step_seconds_count"] == 1
    assert seen['manyhats_step_tokens_total{kind="prefill"}'] == 100
    assert seen['manyhats_step_tokens_total{kind="decode"}'] == 7
    assert seen["manyhats_step_batch_tokens_sum"] == 107
    assert seen["manyhats_step_batch_sequences_sum"] == 9
    assert seen["manyhats_preemptions_total"] == 1
    for tier in ("host", "device"):
        assert seen[f'manyhats_adapter_loads_total{{adapter="pirate",tier="{tier}"}}'] == 1
    assert seen['manyhats_adapter_load_seconds_sum{tier="host"}'] == 0.1
    assert seen['manyhats_adapter_evictions_total{adapter="pirate",tier="device"}'] == 1
    assert seen['manyhats_adapter_load_failures_total{adapter="broken"}'] == 1
    assert seen['manyhats_http_requests_total{method="GET",route="/v1/models",status="200"}'] == 1


def test_the_snapshot_and_the_gateways_gauges():
    seen = samples(full())
    expected = {
        "manyhats_running": 3, "manyhats_waiting": 4, "manyhats_kv_blocks": 100,
        "manyhats_kv_blocks_used": 25, "manyhats_slots": 8, "manyhats_slots_used": 2,
        "manyhats_rows": 128, "manyhats_rows_used": 32, "manyhats_host_bytes": 5000,
        "manyhats_host_bytes_used": 1000, "manyhats_leases": 2, "manyhats_steps_total": 11,
        "manyhats_device_memory_bytes": 8 << 30, "manyhats_device_memory_used_bytes": 3 << 30,
        "manyhats_failed_steps_total": 1, 'manyhats_adapter_leases{adapter="pirate"}': 2,
        'manyhats_adapter_leases{adapter="haiku"}': 0, "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 4, "vllm:kv_cache_usage_perc": 0.25,
        'vllm:cache_config_info{block_size="16",num_gpu_blocks="100"}': 1,
    }  # fmt: skip
    assert {name: seen[name] for name in expected} == expected
    info = {name: value for name, value in seen.items() if "lora_requests_info" in name}
    assert info == {
        'vllm:lora_requests_info{max_lora="8",running_lora_adapters="haiku,pirate",'
        'waiting_lora_adapters="formal,pirate"}': 1234.5
    }


def test_the_kernels_in_use_are_one_series():
    seen = {name: value for name, value in samples(full()).items() if "kernels_info" in name}
    assert seen == {'manyhats_kernels_info{backend="native"}': 1}


def test_only_the_current_residency_is_exposed():
    engine = FakeEngine()
    current: list[EngineStats] = [engine.stats()]
    metrics = Metrics(10, clock=lambda: 1.0)
    metrics.watch(lambda: current[0])
    samples(metrics)
    current[0] = replace(current[0], resident=(), waiting_adapters=(), kv_blocks_total=0)
    seen = samples(metrics)
    assert [name for name in seen if "lora_requests_info" in name] == [
        'vllm:lora_requests_info{max_lora="8",running_lora_adapters="",waiting_lora_adapters=""}'
    ]
    assert not any("manyhats_adapter_leases" in name for name in seen)
    assert seen["vllm:kv_cache_usage_perc"] == 0


def test_before_there_is_an_engine_there_are_no_gauges():
    assert not any(name.startswith("vllm:") for name in samples(Metrics(10)))


def test_the_label_is_capped_in_order_of_arrival_and_in_memory():
    cap = LabelCap(3)
    assert [cap.label(f"a{i}") for i in range(5)] == ["a0", "a1", "a2", "other", "other"]
    assert [cap.label(f"a{i}") for i in (4, 2, 0)] == ["other", "a2", "a0"]
    assert cap.label(None) == "base"
    for i in range(10_000):
        cap.label(f"b{i}")
    assert len(cap._labels) == 3


def test_an_adapter_that_is_called_base_is_not_the_base():
    cap = LabelCap(3)
    assert cap.label("base") == "adapter:base"
    assert cap.label("other") == "adapter:other"


def test_the_cap_holds_in_every_series():
    metrics = full(max_labels=2)
    before = len(samples(metrics))
    for i in range(50):
        name = f"flood{i}"
        metrics.finished(name, FinishReason.LENGTH, 1, 0, 1, 0.1)
        metrics.adapter_loaded(name, "host", 0.1)
        metrics.adapter_evicted(name, "host")
        metrics.adapter_load_failed(name)
    seen = samples(metrics)
    labels = {m for name in seen for m in re.findall(r'adapter="([^"]*)"', name)}
    assert labels == {"base", "pirate", "broken", "other"}
    assert seen['manyhats_prompt_tokens_total{adapter="other"}'] == 50
    after = len(samples(metrics))
    metrics.finished("another", FinishReason.STOP, 1, 0, 1, 0.1)
    assert len(samples(metrics)) == after < 2 * before


def finish(metrics: Metrics, name: str, times: int) -> None:
    for _ in range(times):
        metrics.finished(name, FinishReason.STOP, 1, 0, 1, 0.1)


def test_the_busiest_names_have_the_labels():
    metrics = Metrics(2)
    for name in ("early", "steady", "late"):
        finish(metrics, name, 1)
    metrics.drift.scored("early", "kl", 0.5)
    finish(metrics, "steady", 300)
    finish(metrics, "late", 600)
    metrics.drift.scored("late", "kl", 0.25)
    seen = samples(metrics)
    labels = {m for name in seen for m in re.findall(r'adapter="([^"]*)"', name)}
    assert labels == {"base", "steady", "late", "other"}
    assert seen['manyhats_drift_score{adapter="late",signal="kl"}'] == 0.25
    own, rest = (f'manyhats_prompt_tokens_total{{adapter="{n}"}}' for n in ("late", "other"))
    assert seen[own] > 256
    assert seen[own] + seen[rest] == 601


@given(st.lists(st.integers(0, 7), min_size=LOOK, max_size=4 * LOOK), st.integers(1, 4))
def test_labels_are_never_more_and_a_name_twice_as_busy_as_another_has_one(names, most):
    gone = []
    cap = LabelCap(most, dropped=gone.append, clock=lambda: 0.0)
    for name in names:
        cap.label(f"a{name}")
        cap.counted(f"a{name}")
    own = {f"a{i}" for i in range(8) if cap.label(f"a{i}") != "other"}
    assert len(own) <= most
    counts = Counter(f"a{n}" for n in names[: len(names) // LOOK * LOOK])  # at the last look
    if len(counts) >= most:
        least = min(counts[name] for name in own)
        assert all(counts[name] <= 2 * (least + 4) for name in counts.keys() - own)
    assert set(gone) <= set(counts)


def test_memory_does_not_grow_with_the_names():
    cap = LabelCap(2, clock=lambda: 0.0)
    for i in range(20 * LOOK):
        cap.counted(f"a{i}")
        cap.counted("busy")
    assert cap.label("busy") == "busy"
    assert len(cap._now.counts) == 16
    assert len(cap._now._others) <= 16


def test_old_traffic_counts_no_more():
    now = 0.0
    cap = LabelCap(1, clock=lambda: now)
    for _ in range(2 * LOOK):
        cap.counted("old")
    assert cap.label("old") == "old"
    for _ in range(2):
        now += EPOCH_S
        cap.counted("new")
    for _ in range(LOOK):
        cap.counted("new")
    assert (cap.label("new"), cap.label("old")) == ("new", "other")


def test_exemplars_name_a_request_where_openmetrics_is_accepted():
    metrics = Metrics(4)
    metrics.first_token("pirate", 0.2, "cmpl-1")
    metrics.finished("pirate", FinishReason.STOP, 1, 0, 1, 1.5, "cmpl-" + 200 * "x")
    metrics.drift.alarm("pirate", "kl", "cmpl-3")
    metrics.watch(FakeEngine().stats)
    text, kind = metrics.render("application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
    assert kind.startswith("application/openmetrics-text")
    assert b"\nvllm:num_requests_running 3.0\n" in text, "the gateway's colon stays"
    families = text_string_to_metric_families(text.decode())
    found = {s.name: s.exemplar.labels for f in families for s in f.samples if s.exemplar}
    assert found == {
        "manyhats_time_to_first_token_seconds_bucket": {"request_id": "cmpl-1"},
        "manyhats_request_seconds_bucket": {"request_id": ("cmpl-" + 200 * "x")[:100]},
        "manyhats_drift_alarms_total": {"request_id": "cmpl-3"},
    }
    plain, kind = metrics.render("*/*")
    assert (kind, b"cmpl-" in plain) == ("text/plain; version=0.0.4; charset=utf-8", False)


def test_the_observer_is_safe_for_threads():
    metrics = Metrics(4)
    gate = threading.Barrier(4)

    def work(k: int) -> None:
        gate.wait(30)
        for i in range(500):
            metrics.finished(f"a{i % 8}", FinishReason.STOP, 1, 0, 2, 0.1)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    seen = samples(metrics)
    ended = [v for n, v in seen.items() if n.startswith("manyhats_requests_total") and "stop" in n]
    assert sum(ended) == 2000, "all are alike busy: none gives its label to another"
    assert len(ended) == 6  # four of their own, `other`, and `base`, which starts at zero


def test_no_creation_times():
    assert not any(re.search(r"_created(\{|$)", name) for name in samples(full()))


ROW = re.compile(r"^\| `([^`]+)` \| (\w+) \| ([^|]*)\| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)


def test_the_page_of_metrics_is_the_truth(repository):
    """docs/metrics.md and the registry, both ways: names, types, labels; a unit and a meaning."""
    rows = ROW.findall((repository / "docs" / "metrics.md").read_text("utf-8"))
    described = {
        name: (kind, set(re.findall("`(.*?)`", labels))) for name, kind, labels, *_ in rows
    }
    assert len(described) == len(rows)
    assert all(unit.strip() and meaning.strip() for *_, unit, meaning in rows)
    metrics = full()
    metrics.watch_server("1", lambda: True, lambda: {"tenants": True})
    real = {}
    for family in metrics.registry.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {k for sample in family.samples for k in sample.labels if k != "le"}
        real[name] = (family.type, labels)
    assert described == real
