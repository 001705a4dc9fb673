"""What leaves a run: a copy for the hub, row 0 alone unless asked for more, and plain weights for other readers."""

import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from .artefact import ArtefactError
from .backbone import keep_apart, unwrapped
from .personal import PersonalizedModel
from .tuned import without_place
from .users import UserIndex, UserModel

TABLE = "user_model.safetensors"


def without_users(model: PersonalizedModel) -> PersonalizedModel:
    """The same model with row 0 alone: no vectors, ids or facts of users, and no paths of this machine."""
    users: UserModel = copy.deepcopy(model.user_model).cpu()
    users.keep_rows(1)
    settings = copy.deepcopy(model.settings)
    for made in (settings["model"], settings.get("reference")):
        if made and made["path"]:  # a folder of this machine, and not a name of the hub
            made |= {"path": "", "name": made["label"]}
    settings["data"]["source"] = Path(str(settings["data"]["source"])).name
    return replace(model, users=UserIndex(), user_model=users, settings=settings, **model.parts_without_users())


def push_to_hub(
    model: PersonalizedModel,
    repo_id: str,
    with_users: bool = False,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Publishes a run, and gives its address.

    Args:
        with_users: also ids, vectors and facts of the users, which are personal data; paths of this machine never. The
            centres of clusters are published in either case; where there are hardly fewer of them than users, they say
            as much as vectors would.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    if model.tuning != "frozen":
        _ = model.module  # is found by what the settings say now, and its weights are written below
    with tempfile.TemporaryDirectory(prefix="prlhf-") as work:
        folder = Path(work) / "run"
        public = without_users(model)
        if with_users:
            public = replace(model, settings=public.settings)
        replace(public, folder=None).save_pretrained(folder)
        (folder / ".lock").unlink(missing_ok=True)
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=str(folder), commit_message=f"prlhf {model.kind}")
    return str(address)


def free_folder(folder: str | Path) -> Path:
    """The folder to write to.

    Raises:
        ArtefactError: it is there and not empty.
    """
    if Path(folder).exists() and any(Path(folder).iterdir()):
        raise ArtefactError(f"{folder}: is there already; give another folder")
    return Path(folder)


def plain_module(model: PersonalizedModel, folder: Path, merged: bool) -> Any:
    """A copy of the trained module without peft's wrapper.

    Args:
        merged: LoRA weights are added to the base model; else its weights are as they were, and the adapter is written
            to `adapter/` in the folder.
    """
    plain = copy.deepcopy(model.module)
    if model.tuning == "lora":
        if not merged:
            plain.save_pretrained(folder / "adapter")
            (folder / "adapter" / "README.md").unlink(missing_ok=True)
            without_place(folder / "adapter" / "adapter_config.json")
        plain = plain.merge_and_unload() if merged else plain.unload()
    return unwrapped(plain)


def write_plain(plain: Any, model: PersonalizedModel, folder: Path) -> None:
    """Writes a module, its tokenizer, and the users' vectors (U, D) or (U, K, D), row 0 first, with their ids."""
    keep_apart(plain)
    plain.save_pretrained(folder)
    model.backbone.tokenizer.save_pretrained(folder)
    vectors = model.user_model.vectors().reshape(-1, *model.user_model.shape)
    place = {"user_place": model.settings["user_place"]} if "user_place" in model.settings else None
    save_file({"vectors": vectors.contiguous()}, folder / TABLE, place)
    model.users.save(folder / "users.json")
