"""The device's memory: on a CPU the machine's, as Linux tells it."""

import os

import torch

from manyhats.engine import device_memory


def test_without_a_gpu_it_is_the_machines(tmp_path):
    used, total = device_memory.device_memory(torch.device("cpu"))
    assert total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < used < total
    told = tmp_path / "meminfo"
    told.write_text("MemTotal: 100 kB\nMemAvailable:   42 kB\n")
    assert device_memory._available(told) == 42 * 1024
    assert 0 < device_memory._available(tmp_path / "none") < total
