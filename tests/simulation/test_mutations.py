"""The simulation finds the past faults that it was written for."""

import pytest

from simulation.mutations import PAST_FAULTS, Mutation, find_mistake


@pytest.mark.parametrize("mutation", PAST_FAULTS, ids=lambda mutation: mutation.name)
def test_a_reintroduced_fault_is_found(mutation: Mutation) -> None:
    assert find_mistake(mutation) is not None
