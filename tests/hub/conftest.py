from tests.hub.fixtures import hub  # noqa: F401
