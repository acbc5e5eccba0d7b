"""How property tests run here: the same examples every time, a bounded number, no deadline on a busy machine."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

MEASURED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]  # folders are written anew by every example


def bounded(examples: int) -> settings:
    return settings(max_examples=examples, derandomize=True, deadline=None, suppress_health_check=MEASURED)
