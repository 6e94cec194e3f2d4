"""The simulation finds the faults for which it was made."""

import pytest

from simulation.mutations import FORMER_FAULTS, Mutation, find_mistake


@pytest.mark.parametrize("mutation", FORMER_FAULTS, ids=lambda mutation: mutation.name)
def test_a_reintroduced_fault_is_found(mutation: Mutation) -> None:
    assert find_mistake(mutation) is not None
