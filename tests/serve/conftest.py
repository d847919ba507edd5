"""What needs vLLM, which has an environment of its own: `make serve-test`. Elsewhere nothing here is collected."""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]
