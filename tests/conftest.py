"""How hypothesis looks for counter-examples: the same ones on every machine, and never by the clock."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "mrcnn_edu",
    max_examples=40,
    deadline=None,  # a busy machine is not a fault
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("mrcnn_edu")
