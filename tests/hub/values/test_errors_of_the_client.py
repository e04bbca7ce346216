"""What the Hub's client raises, in our words: each kind with its exit code, whether it may pass, and no secret in it."""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub import errors
from huggingface_hub.errors import HfHubHTTPError

from ds4convert.errors import Ds4Error, EnvironmentFault, InputError, UsageError
from ds4convert.hub.errors import AGAIN, CHECK, UNREACHABLE, hub_errors, is_passing, translate

SECRET = "https://cdn.example/x?X-Amz-Signature=SECRET"


class _Request:
    def __init__(self, headers: dict[str, str]) -> None:
        self.headers, self.url, self.method = headers, SECRET, "GET"


class _Response:
    def __init__(self, status: int, token: bool, **headers: str) -> None:
        self.status_code, self.text, self.url = status, SECRET, SECRET
        self.headers = {k.replace("_", "-"): v for k, v in headers.items()}
        self.request = _Request({"authorization": "Bearer SECRET"} if token else {})


def http(kind: type[Any], status: int, token: bool = True, **headers: str) -> HfHubHTTPError:
    made = kind.__new__(kind)
    Exception.__init__(made, f"{status} for {SECRET}")
    made.response, made.server_message, made.request_id = _Response(status, token, **headers), SECRET, "id"
    return made  # type: ignore[no-any-return]


SAID = [
    (http(errors.GatedRepoError, 403),
     "me/m: the repo is gated: ask for access on its page, then log in with `hf auth login` or give --token"),
    (http(errors.RevisionNotFoundError, 404), "me/m: has no such revision; check the name after @ or --revision"),
    (http(errors.RepositoryNotFoundError, 401),
     "me/m: no such repo on the Hub (nor a local folder of that name), or it is private and no token that may read it "
     "was given (`hf auth login`, HF_TOKEN, --token)"),
    (http(errors.RemoteEntryNotFoundError, 404), "me/m: a file of the repo is not there; the repo has been changed"),
    (errors.LocalTokenNotFoundError("x"), "me/m: needs a token: `hf auth login`, HF_TOKEN or --token"),
    (errors.OfflineModeIsEnabled("x"),
     "me/m: offline mode is on (HF_HUB_OFFLINE); unset it, or name a local folder"),
    (http(HfHubHTTPError, 401), "me/m: the Hub refused the token (HTTP 401); give one that may read it"),
    (http(HfHubHTTPError, 403), "me/m: the Hub refused the token (HTTP 403); give one that may read it"),
    (http(HfHubHTTPError, 403, token=False), f"me/m: the address of a file had expired (HTTP 403). {AGAIN}"),
    (http(HfHubHTTPError, 500), f"me/m: the Hub answered HTTP 500. {AGAIN}"),
    (http(HfHubHTTPError, 418, token=False), f"me/m: the Hub answered HTTP 418. {AGAIN}"),
    (errors.FileMetadataError("x"), f"me/m: {UNREACHABLE}"),
    (errors.LocalEntryNotFoundError("x"), f"me/m: {UNREACHABLE}"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "said"), SAID, ids=lambda x: x if isinstance(x, str) else type(x).__name__)
def test_every_failure_of_the_client_is_a_fault_of_the_environment_in_a_sentence(error: Exception, said: str) -> None:
    found = translate(error, "me/m")
    assert type(found) is EnvironmentFault and str(found) == said
    assert "SECRET" not in str(found)


def test_a_name_that_the_client_refuses_is_wrong_usage() -> None:
    found = translate(errors.HFValidationError("x"), "a b")
    assert type(found) is UsageError and str(found) == "a b: is not a repo name; expected owner/name"


def test_a_lost_connection_is_told_by_what_it_hides() -> None:
    lost = errors.LocalEntryNotFoundError("x")
    lost.__cause__ = http(HfHubHTTPError, 500)
    assert str(translate(lost, "me/m")) == f"me/m: the Hub answered HTTP 500. {AGAIN}"
    lost.__cause__ = ValueError("not of the client")
    assert str(translate(lost, "me/m")) == f"me/m: {UNREACHABLE}"


def test_what_the_client_wraps_into_a_runtime_error_is_unwrapped_and_a_plain_one_is_not_ours() -> None:
    wrapped = RuntimeError("while uploading")
    wrapped.__cause__ = http(HfHubHTTPError, 503, retry_after="7")
    assert str(translate(wrapped, "me/m")) == f"me/m: the Hub answered HTTP 503. {AGAIN}"
    assert is_passing(wrapped) == 7.0
    assert translate(RuntimeError("x"), "me/m") is None and is_passing(RuntimeError("x")) is None


def transport(name: str) -> Exception:
    kind = type(name, (errors.HTTPError,), {"__init__": lambda self: None})  # type: ignore[attr-defined]
    made: Exception = kind()
    return made


def test_a_failure_of_the_connection_names_its_kind_and_what_to_look_at() -> None:
    found = translate(transport("ConnectTimeout"), "me/m")
    assert str(found) == f"me/m: the Hub cannot be reached (ConnectTimeout). {CHECK} {AGAIN}"


@pytest.mark.parametrize("kind", [TypeError, KeyError, ValueError, AttributeError])
def test_a_stumble_of_the_client_over_an_answer_is_a_hub_that_is_none(kind: type[Exception]) -> None:
    code = compile("def parse():\n    raise kind('x')", "client", "exec")
    space: dict[str, Any] = {"__name__": "huggingface_hub.hf_api", "kind": kind}
    exec(code, space)
    with pytest.raises(EnvironmentFault) as found, hub_errors("me/m"):
        space["parse"]()
    assert str(found.value) == "me/m: the Hub's answer is of another form than the Hub gives; is HF_ENDPOINT a Hub?"
    with pytest.raises(kind), hub_errors("me/m"):
        raise kind("a fault of ours")


def test_errors_of_ours_pass_as_they_are_and_what_is_translated_keeps_its_cause() -> None:
    with pytest.raises(InputError, match=r"^mine$"), hub_errors("me/m"):
        raise InputError("mine")
    cause = errors.OfflineModeIsEnabled("x")
    with pytest.raises(Ds4Error) as found, hub_errors("me/m"):
        raise cause
    assert found.value.__cause__ is cause


@pytest.mark.parametrize(
    ("error", "wait"),
    [
        (http(HfHubHTTPError, 429, retry_after="12"), 12.0),
        (http(HfHubHTTPError, 429, ratelimit='"api";r=0;t=55'), 56.0),
        (http(HfHubHTTPError, 503), 0.0),
        (http(HfHubHTTPError, 409), 0.0),  # somebody else committed meanwhile
        (http(HfHubHTTPError, 412), 0.0),
        (http(HfHubHTTPError, 403, token=False), 0.0),  # an address that expired
        (http(HfHubHTTPError, 403), None),
        (http(HfHubHTTPError, 401, token=False), None),
        (http(HfHubHTTPError, 404), None),
        (http(HfHubHTTPError, 501), None),
        (errors.OfflineModeIsEnabled("x"), None),
        (transport("ReadTimeout"), 0.0),
        (ValueError("x"), None),
    ],
    ids=lambda x: str(x)[:12] if isinstance(x, Exception) else "",
)
def test_which_failures_may_pass_and_how_long_the_hub_asks_to_wait(error: Exception, wait: float | None) -> None:
    assert is_passing(error) == wait
