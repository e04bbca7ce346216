from tests.local_hub.fixtures import hub  # noqa: F401
