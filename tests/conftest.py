"""What every test starts from: few threads, no network, caches that vanish, and slow tests left out."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

CACHE = Path(tempfile.mkdtemp(prefix="selfsup-tests-"))

# Set before anything imports torch or datasets; processes that tests start inherit it. The tensors here are
# small, so that a second thread costs more than it gives, and one thread gives the same bits everywhere.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HOME": str(CACHE / "hub"),
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MPLBACKEND": "agg",
    "MPLCONFIGDIR": str(CACHE / "matplotlib"),
    "TOKENIZERS_PARALLELISM": "false",
    "TRITON_CACHE_DIR": str(CACHE / "triton"),
    "TRITON_DEFAULT_FP_FUSION": "1",  # the default of every release so far, without the warning that it will change
}
for name in ("SELFSUP_DISABLE", "SELFSUP_TRACE", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
    os.environ.pop(name, None)


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background of a shell; Ctrl-C is tested
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow: long learning runs")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)
