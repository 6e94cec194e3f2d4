"""The schemas of the API match the domain types."""

from app.api.schemas import Problem
from app.errors import PROBLEMS


def test_a_problem_documents_the_members_of_every_code() -> None:
    for problem in PROBLEMS.values():
        if problem.extension:
            assert problem.extension.model_fields.keys() <= Problem.model_fields.keys()
            for field in problem.extension.model_fields.values():
                assert field.description
                assert field.examples
