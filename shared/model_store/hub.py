"""Models from the Hugging Face hub: configuration, tokenizer and safetensors only."""

from __future__ import annotations

from pathlib import Path

from phloem.shared.errors import PhloemError
from phloem.shared.model_store.progress import Progress

ALLOWED_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt"]


def fetch_from_hub(hub_id: str, cache_dir: Path, progress: Progress) -> Path:
    """The directory of `hub_id` in the cache; without network, the copy fetched before.

    Raises PhloemError `model_not_found` when the hub does not have it or cannot be reached.
    """
    # Imported here: it takes a quarter of a second, and most models are paths.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    progress(f"fetching {hub_id} from the hub", 0, 0)
    try:
        directory = snapshot_download(hub_id, cache_dir=cache_dir / "hub", allow_patterns=ALLOWED_FILES)
    except LocalEntryNotFoundError as error:
        raise _not_fetched(hub_id, "the hub cannot be reached and the cache has no copy") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _not_fetched(hub_id, str(error).strip().partition("\n")[0]) from error
    return Path(directory)


def _not_fetched(hub_id: str, reason: str) -> PhloemError:
    message = (
        f"{hub_id!r} is not an existing path, and as a hub id it could not be fetched: {reason}. Check the "
        "spelling and the network, or give --model-path a local directory or GGUF file"
    )
    return PhloemError("model_not_found", message, retryable=True, param="model_path")
