"""How many cases the property tests try: few in every run, many and new ones with ``--hypothesis-profile nightly``."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "suite",
    max_examples=65,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.register_profile(
    "nightly", settings.get_profile("suite"), max_examples=1500, derandomize=False, print_blob=True
)
settings.load_profile("suite")
