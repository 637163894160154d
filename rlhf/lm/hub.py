"""Uploading the final model: the login is looked at before a run, and a failed upload loses nothing."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from rlhf.checks import InputError, brief


def check_hub(repository: str | None) -> None:
    """Somebody is logged in and the name can be a repository's; nothing to do for None.

    Raises:
        InputError: it is not so.
    """
    if repository is None:
        return
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(
            f"--push-to-hub {repository}: not a repository's name ({brief(error)}): give owner/name"
        ) from error
    try:
        HfApi().whoami()
    except Exception as error:  # no token, a wrong one, no network: the client's errors, the network's and the system's
        raise InputError(
            f"--push-to-hub {repository}: the hub does not know who is asking ({brief(error)}): log in with `hf auth "
            "login`, or set HF_TOKEN to a token that may write, or leave --push-to-hub out"
        ) from error


def push(folder: Path, repository: str | None) -> None:
    """Upload the model, tokenizer and adapter in the folder, not a critic; says where they are. A new repository is
    private. None: nothing to do."""
    if repository is None:
        return
    try:
        api = HfApi()
        url = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=url.repo_id, ignore_patterns=["critic/*"], commit_message="Trained model"
        )
    except Exception as error:  # as above; the run itself is complete and must not end in an error
        print(
            f"the upload to {repository} failed ({brief(error)}): nothing is lost, the model is in {folder}; try again "
            f"with `hf upload {repository} {folder} . --exclude 'critic/*'`"
        )
    else:
        print(f"uploaded to {url}")
