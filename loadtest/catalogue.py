"""All scenarios, in the order to run them."""

from loadtest import catchup, crowds, direct, faults, latency, masses, nodes, paper, soak, startup
from loadtest.scenario import Scenario


def catalogue(*, quick: bool = False) -> dict[str, Scenario]:
    """By name. `quick`: sizes and times that show whether it works, not how well; all of it within five minutes."""
    modules = (paper, crowds, latency, direct, catchup, startup, faults, nodes, masses, soak)
    scenarios = [scenario for module in modules for scenario in module.scenarios(quick=quick)]
    return {scenario.name: scenario for scenario in scenarios}
