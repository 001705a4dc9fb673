"""What leaves a run for the hub: row 0 alone, unless users' data are asked for."""

import copy
import tempfile
from dataclasses import replace
from pathlib import Path

from .personal import PersonalizedModel
from .users import UserIndex, UserModel


def without_users(model: PersonalizedModel) -> PersonalizedModel:
    """The same model with row 0 alone: no vectors, ids or facts of users, and no paths of this machine."""
    users: UserModel = copy.deepcopy(model.user_model).cpu()
    users.keep_rows(1)
    settings = copy.deepcopy(model.settings)
    if settings["model"]["path"]:  # a folder of this machine, and not a name of the hub
        settings["model"] |= {"path": "", "name": settings["model"]["label"]}
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
