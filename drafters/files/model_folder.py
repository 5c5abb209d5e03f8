"""Model folders: a folder on this machine, or the snapshot of a Hugging Face name."""

from pathlib import Path

from drafters.files.home import in_home

PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
"""the files of a model that are downloaded and copied"""


def resolve_model(model: str, field: str = "model") -> Path:
    """The local folder of a model: `model` itself, or the snapshot of a Hugging Face name, downloaded if not cached.

    A relative path is relative to the working folder. Raises ValueError, which begins with the configuration's `field`,
    when `model` is neither.
    """
    folder = in_home(Path(model))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{field}: {folder.absolute()} is no checkpoint: it needs config.json and safetensors files"
            )
        return folder
    if folder.exists():
        raise ValueError(f"{field}: {folder.absolute()} is a file; give the checkpoint's folder")
    tried = "" if folder.is_absolute() else f" (relative to {Path.cwd()}: {folder.absolute()})"
    return _snapshot(model, field, f"there is no folder {folder}{tried}")


def _snapshot(name: str, field: str, no_folder: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=PATTERNS))
    except HFValidationError:
        raise ValueError(f"{field}: {no_folder}, and {name} is no Hugging Face name") from None
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{field}: cannot reach the Hugging Face hub to fetch {name}, and it is not in the local cache, "
            f"{HF_HUB_CACHE}; and {no_folder}"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise ValueError(
            f"{field}: the Hugging Face hub answers {status} for {name}: no public model has this name, or its files "
            f"need a token (HF_TOKEN); and {no_folder}"
        ) from error
    except OSError as error:
        raise ValueError(
            f"{field}: cannot keep {name} in {HF_HUB_CACHE}: {error}; set HF_HOME to a folder that can be written"
        ) from error
