"""What pytest is not to import where it cannot be."""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["lightning_gradhist/kernels/*"]
