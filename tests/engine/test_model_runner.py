"""What a runner needs of its process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from modules.settings import PROJECT_ROOT

CODE = """
import copy, threading
from modules.engine.engine import Engine, EngineConfig
from modules.engine.fused_layers import quantize_model
from tests.engine.conftest import build_model, request, run, token_ids

model = build_model("llama")
assert quantize_model(model)
said = []

def say():
    config = EngineConfig(max_model_len=512, num_cache_tokens=512)
    engine = Engine(copy.deepcopy(model), config)
    engine.add(request("x", list(range(5, 60)), max_tokens=40))
    said.append(token_ids(run(engine)["x"]))

threads = [threading.Thread(target=say) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(said) == 2 and said[0] == said[1]
print("fine")
"""


@pytest.mark.parametrize(
    "variable", [("NUMBA_THREADING_LAYER", "workqueue"), ("NUMBA_NUM_THREADS", "1")]
)
def test_two_threads_may_compute_with_any_threading(variable, monkeypatch) -> None:
    monkeypatch.setenv(*variable)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT_ROOT))
    result = subprocess.run(
        [sys.executable, "-c", CODE], cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.stdout.strip() == "fine", result.stderr[-2000:]
