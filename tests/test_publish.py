"""What leaves a run: plain weights for other readers, and a copy for the hub without users."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import prlhf
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import checkerboard, write_jsonl
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prlhf.core.artefact import ArtefactError
from prlhf.core.comparisons import User
from prlhf.core.pretrained import find_model, load_backbone
from prlhf.core.publish import push_to_hub, without_users
from prlhf.core.scoring import ScoreRequest
from prlhf.core.tokenize import RowTokenizer, TextLayout
from prlhf.prm.fit import fit_reward_model
from prlhf.prm.head_config import HeadConfig
from prlhf.prm.joint import train_reward_model
from prlhf.prm.publish import export
from prlhf.prm.reward_model import PersonalizedRewardModel
from prlhf.prm.trainer import PersonalizedRewardConfig

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = [(aggregator, tuning) for aggregator in ("linear_head", "soft_prompt") for tuning in ("frozen", "lora", "full")]
Make = Callable[[str, str], PersonalizedRewardModel]


@pytest.fixture(scope="module")
def make(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    known: dict[tuple[str, str], PersonalizedRewardModel] = {}

    def made(aggregator: str, tuning: str) -> PersonalizedRewardModel:
        if (aggregator, tuning) not in known:
            known[aggregator, tuning] = _train(aggregator, tuning, tiny_model, tmp_path_factory.mktemp("run"))
        return known[aggregator, tuning]

    return made


def _train(aggregator: str, tuning: str, base: Path, run: Path) -> PersonalizedRewardModel:
    rows, held = checkerboard(10), checkerboard(4, first=40)
    backbone = load_backbone(find_model(str(base)), "float32", "cpu")
    if (aggregator, tuning) == ("linear_head", "frozen"):
        return fit_reward_model(rows, held, backbone, TextLayout(), "last", HeadConfig())
    config = PersonalizedRewardConfig(
        output_dir=str(run), aggregator=aggregator, pooling="last", user_tokens=3, bf16=tuning == "lora",
        gradient_checkpointing=False, learning_rate=3e-3, num_train_epochs=1, disable_tqdm=True,
        load_best_model_at_end=False,  # the first steps leave users at row 0, which is published
    )  # fmt: skip
    adapter = LoraConfig(r=4, target_modules="all-linear") if tuning == "lora" else None
    return train_reward_model(rows, held, backbone, TextLayout(), config, tuning, adapter)


def scores(model: PersonalizedRewardModel, user: str | None) -> torch.Tensor:
    requests = [ScoreRequest(User(user), r.prompt, [r.chosen, r.rejected]) for r in checkerboard(3, users=1, first=80)]
    return torch.cat(model.score(requests))


@pytest.mark.parametrize(("aggregator", "tuning"), [kind for kind in KINDS if kind[0] == "linear_head"])
def test_exported_head_is_the_unknown_users(make: Make, tmp_path: Path, aggregator: str, tuning: str) -> None:
    model = make(aggregator, tuning)
    export(model, tmp_path / "plain")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    tokenizer = RowTokenizer(AutoTokenizer.from_pretrained(tmp_path / "plain"), TextLayout())
    rows = checkerboard(3, users=1, first=80)
    found = []
    with torch.no_grad():
        for row in rows:
            for tokens in tokenizer.rows([row.prompt] * 2, [row.chosen, row.rejected], ["", ""]):
                ids = torch.tensor([tokens.prompt_ids + tokens.response_ids])
                found.append(plain(input_ids=ids).logits[0, 0])
    assert torch.allclose(torch.stack(found), scores(model, None), atol=2e-5)


@pytest.mark.parametrize(("aggregator", "tuning"), KINDS)
def test_exported_table_has_everybody_and_the_weights_no_users(
    make: Make, tmp_path: Path, aggregator: str, tuning: str
) -> None:
    model = make(aggregator, tuning)
    export(model, tmp_path / "plain", merged=False)
    vectors = load_file(tmp_path / "plain" / "user_model.safetensors")["vectors"]
    assert vectors.shape == (5, *model.user_model.shape)
    assert torch.equal(vectors.reshape(5, -1), model.user_model.vectors())
    assert json.loads((tmp_path / "plain" / "users.json").read_text())["ids"] == ["u0", "u1", "u2", "u3"]
    weights = load_file(tmp_path / "plain" / "model.safetensors")
    assert not [name for name in weights if "user_model" in name or "lora" in name]
    assert (tmp_path / "plain" / "adapter" / "adapter_model.safetensors").exists() == (tuning == "lora")
    with pytest.raises(ArtefactError, match="is there already"):
        export(model, tmp_path / "plain")


def test_export_leaves_the_run_as_it_was(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what a run scores in memory, trained in bfloat16, is what it scores when it is loaded."""
    model = make("soft_prompt", "lora")
    before = scores(model, "u1")
    monkeypatch.setenv("PRLHF_CACHE", str(tmp_path / "cache"))
    export(model, tmp_path / "plain")
    model.save_pretrained(tmp_path / "again")
    fresh = PersonalizedRewardModel.from_pretrained(tmp_path / "again")
    assert torch.equal(scores(fresh, "u1"), before)


class Hub:
    """Keeps what would be uploaded."""

    seen: dict[str, bytes]
    asked: dict[str, object]

    def __init__(self, token: str | None = None):
        Hub.asked = {"token": token}

    def create_repo(self, repo_id: str, **options: object) -> str:
        Hub.asked |= {"repo": repo_id, **options}
        return f"https://hub/{repo_id}"

    def upload_folder(self, repo_id: str, folder_path: str, **_: object) -> None:
        root = Path(folder_path)
        Hub.seen = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    return Hub


@pytest.mark.parametrize(("aggregator", "tuning"), KINDS)
def test_nothing_of_users_is_published(
    make: Make, tmp_path: Path, hub: type[Hub], aggregator: str, tuning: str
) -> None:
    model = make(aggregator, tuning)
    push_to_hub(model, "me/run", token="secret-token")
    whole = b"".join(hub.seen.values())
    for word in (b'"u0"', b'"u3"', b"longer_chosen", b"secret-token", str(tmp_path.parent.parent).encode()):
        assert word not in whole, word
    for vector in model.user_model.vectors()[1:]:
        assert vector.numpy().tobytes() not in whole
    folder = tmp_path / "got"
    for name, content in hub.seen.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    place = model.settings["model"]["path"] if tuning != "full" else None
    got = PersonalizedRewardModel.from_pretrained(folder, model=place)
    assert len(got.users) == 1
    assert torch.allclose(scores(got, "u1"), scores(model, None), atol=1e-6)


def test_users_are_published_when_asked_for(make: Make, hub: type[Hub]) -> None:
    model = make("soft_prompt", "lora")
    assert push_to_hub(model, "me/run", with_users=True, private=True) == "https://hub/me/run"
    assert json.loads(hub.seen["users.json"])["ids"] == ["u0", "u1", "u2", "u3"]
    assert hub.asked["private"] is True
    assert len(model.users) == 5  # and the model itself keeps them
    assert len(without_users(model).users) == 1


def test_train_export_and_push_by_the_command(tmp_path: Path, tiny_model: Path, hub: type[Hub]) -> None:
    write_jsonl(tmp_path / "t.jsonl", checkerboard(12))
    write_jsonl(tmp_path / "v.jsonl", checkerboard(4, first=40))
    flags = ("--tuning", "lora", "--lora-r", 4, "--aggregator", "soft_prompt", "--user-tokens", 3, "--bf16", "False")
    data = ("--data", "t.jsonl", "--eval-data", "v.jsonl", "--model", tiny_model, "--dtype", "float32")
    pushed = ("--push-to-hub", "--hub-model-id", "me/tiny", "--hub-token", "secret-token")
    done = prlhf("prm", "train", *data, "--output-dir", "run", *flags, "--max-steps", 4, *pushed, cwd=tmp_path)
    assert "me/tiny: published without its users" in done.stderr
    assert hub.asked["token"] == "secret-token"
    assert b'"u0"' not in b"".join(hub.seen.values())
    everything = b"".join(p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file())
    assert b"secret-token" not in everything
    assert "soft prompts, backbone lora" in " ".join(done.stdout.split())
    listed = json.loads(prlhf("users", "list", "--run", "run", "--json", cwd=tmp_path).stdout)
    assert listed["users"][0]["validation"]["n"] == 4
    prlhf("prm", "export", "run", "--out", "plain", cwd=tmp_path)
    assert (tmp_path / "plain" / "model.safetensors").is_file()
    prlhf("prm", "push", "run", "--repo", "me/other", "--users", cwd=tmp_path)
    assert json.loads(hub.seen["users.json"])["ids"] == ["u0", "u1", "u2", "u3"]
