"""What went wrong on the Hub, in our words: exceptions of huggingface_hub and of HTTP as errors with exit codes.

Messages name the repo and the next step. They never quote a URL, a header or a token: a signed address is a secret.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from ds4convert.errors import Ds4Error, EnvironmentFault, UsageError
from ds4convert.storage.patience import TRANSIENT, asked_wait

AGAIN = "What is finished is safe: run the same command again, it goes on from there"
CHECK = "Is there a network, and is HF_ENDPOINT (or --endpoint), where it is set, the Hub?"
UNREACHABLE = f"the Hub cannot be reached, or did not describe a file. {AGAIN}"


def _table() -> list[tuple[type[BaseException], type[Ds4Error], str]]:
    """Return (exception, error of ours, message), narrow kinds first."""
    from huggingface_hub import errors

    return [
        (errors.OfflineModeIsEnabled, EnvironmentFault,
         "offline mode is on (HF_HUB_OFFLINE); unset it, or name a local folder"),
        (errors.HFValidationError, UsageError, "is not a repo name; expected owner/name"),
        (errors.GatedRepoError, EnvironmentFault,
         "the repo is gated: ask for access on its page, then log in with `hf auth login` or give --token"),
        (errors.RevisionNotFoundError, EnvironmentFault, "has no such revision; check the name after @ or --revision"),
        (errors.RepositoryNotFoundError, EnvironmentFault,
         "no such repo on the Hub (nor a local folder of that name), or it is private and no token that may read it "
         "was given (`hf auth login`, HF_TOKEN, --token)"),
        (errors.EntryNotFoundError, EnvironmentFault, "a file of the repo is not there; the repo has been changed"),
        (errors.LocalTokenNotFoundError, EnvironmentFault, "needs a token: `hf auth login`, HF_TOKEN or --token"),
    ]  # fmt: skip


def translate(error: BaseException, repo: str) -> Ds4Error | None:
    """Return our error for an exception that came from the Hub's client or from HTTP; None where it is neither."""
    from huggingface_hub import errors

    error = _inner(error)
    cause = error.__cause__
    # A lost connection is a LocalEntryNotFoundError, which is an EntryNotFoundError too: it is asked for first.
    if isinstance(error, errors.LocalEntryNotFoundError | errors.FileMetadataError):
        return (translate(cause, repo) if cause else None) or EnvironmentFault(f"{repo}: {UNREACHABLE}")
    for kind, ours, text in _table():
        if isinstance(error, kind):
            return ours(f"{repo}: {text}")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status == 403 and "authorization" not in error.response.request.headers:  # storage, which takes no token
            return EnvironmentFault(f"{repo}: the address of a file had expired (HTTP 403). {AGAIN}")
        if status in {401, 403}:
            return EnvironmentFault(
                f"{repo}: the Hub refused the token (HTTP {status})", hint="give one that may read it"
            )
        return EnvironmentFault(f"{repo}: the Hub answered HTTP {status}. {AGAIN}")
    if isinstance(error, errors.HTTPError):  # type: ignore[attr-defined,unused-ignore]
        return EnvironmentFault(f"{repo}: the Hub cannot be reached ({type(error).__name__}). {CHECK} {AGAIN}")
    if isinstance(error, TypeError | LookupError | ValueError | AttributeError) and _is_of_the_client(error):
        return EnvironmentFault(
            f"{repo}: the Hub's answer is of another form than the Hub gives; is HF_ENDPOINT a Hub?"
        )
    return None


def _is_of_the_client(error: BaseException) -> bool:
    """Return whether the Hub's client itself stumbled, over an answer of other types than it expects."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return any(f.f_globals.get("__name__", "").startswith("huggingface_hub") for f, _ in frames[-3:])


def _inner(error: BaseException) -> BaseException:
    """Return what the client's uploads wrap into a RuntimeError."""
    return error.__cause__ if type(error) is RuntimeError and error.__cause__ is not None else error


def is_passing(error: BaseException) -> float | None:
    """Return the seconds to wait before another try where a failure may pass, None where it will not."""
    from huggingface_hub import errors

    error = _inner(error)
    if isinstance(error, errors.HfHubHTTPError):
        answer = error.response
        expired = answer.status_code == 403 and "authorization" not in answer.request.headers
        if answer.status_code not in TRANSIENT and not expired:
            return None
        return asked_wait(answer.headers)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return None
    return 0.0 if isinstance(error, errors.HTTPError) else None  # type: ignore[attr-defined,unused-ignore]


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn what the Hub's client raises into errors of ours, which name `repo`."""
    try:
        yield
    except Ds4Error:
        raise
    except Exception as e:
        found = translate(e, repo)
        if found is None:
            raise
        raise found from e
