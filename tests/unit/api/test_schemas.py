"""The schemas of the API agree with the domain types that they describe."""

from app.api.schemas import Payment, Problem
from app.errors import PROBLEMS
from app.ledger.outcomes import Debited


def test_a_payment_has_the_first_members_of_a_debit_in_their_order() -> None:
    published = list(Payment.model_fields)
    assert list(Debited.model_fields)[: len(published)] == published


def test_a_problem_documents_the_members_of_every_code() -> None:
    for problem in PROBLEMS.values():
        if problem.extension:
            assert problem.extension.model_fields.keys() <= Problem.model_fields.keys()
            for field in problem.extension.model_fields.values():
                assert field.description
                assert field.examples
