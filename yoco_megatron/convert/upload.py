"""An exported folder to the Hugging Face hub."""

from pathlib import Path
from typing import TypedDict

from yoco_megatron.utils.errors import require
from yoco_megatron.utils.small_files import read_json

NEEDED = ("config.json", "README.md", "modeling_yoco.py", "configuration_yoco.py")


class _Index(TypedDict):
    weight_map: dict[str, str]


def upload(folder: Path, repo: str, *, public: bool = False, revision: str | None = None) -> str:
    """Upload all files of `folder`, in one commit; the address of the model.

    Raises:
        ValueError: no exported model there, or the hub refuses.
    """
    from huggingface_hub import HfApi

    missing = [name for name in NEEDED if not (folder / name).is_file()]
    weights = [*folder.glob("model*.safetensors")]
    require(
        not missing and bool(weights),
        f"--input {folder} is no exported model: {', '.join(missing) or 'model.safetensors'} is missing there",
    )
    index = read_json(folder / "model.safetensors.index.json", _Index, missing={"weight_map": {}})
    lost = {*index["weight_map"].values()} - {file.name for file in weights}
    require(not lost, f"--input {folder}: {', '.join(sorted(lost))} is missing there: export the model again")
    hub = HfApi()
    try:
        hub.create_repo(repo, private=not public, exist_ok=True)
        if revision is not None:
            hub.create_branch(repo, branch=revision, exist_ok=True)
        hub.upload_folder(repo_id=repo, folder_path=folder, revision=revision, commit_message="Export of yoco-megatron")
    except Exception as error:  # each layer of the network raises its own types
        raise ValueError(f"--repo {repo}: {' '.join(str(error).split())}; log in with `hf auth login`") from error
    return f"{hub.endpoint}/{repo}"
