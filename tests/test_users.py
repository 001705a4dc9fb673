"""The contract of every user model, as soft prompt and as head."""

from pathlib import Path

import pytest
import torch

from prlhf.core.pretrained import Backbone
from prlhf.core.users import USER_MODELS, UserIndex, make_user_model, neutral_prompt

START = {"head": torch.linspace(-1, 1, 6), "soft_prompt": torch.linspace(-1, 1, 12).reshape(2, 6)}
MEMBERS = [(name, {}) for name in USER_MODELS] + [("individualized", {"shared": False}), ("cluster", {"clusters": 1})]


@pytest.mark.parametrize("kind", START)
@pytest.mark.parametrize(("name", "options"), MEMBERS)
def test_contract(name: str, options: dict, kind: str, tmp_path: Path) -> None:
    model = make_user_model(name, 5, START[kind], **options)
    ids = torch.tensor([0, 3, 3])
    out = model(ids)
    assert out.shape == (3, *START[kind].shape)
    assert torch.allclose(out[1], out[2])
    out[1].sum().backward()
    for parameter in model.parameters():  # absent users get no gradient at all
        if parameter.grad is not None and parameter.shape[0] == 5 and parameter.ndim == 2 and name != "uniform":
            assert parameter.grad[[1, 2, 4]].abs().max() == 0
    again = make_user_model(name, 5, torch.zeros_like(START[kind]), **model.options())
    again.load_state_dict(model.state_dict())
    assert torch.allclose(again(ids), model(ids))


def test_individualized_starts_at_e0_and_row_0_stays() -> None:
    model = make_user_model("individualized", 4, START["head"])
    assert torch.equal(model(torch.arange(4)), START["head"].expand(4, -1))
    model(torch.tensor([0, 1])).square().sum().backward()
    assert model.offsets.weight.grad[0].abs().max() == 0
    assert model.offsets.weight.grad[1].abs().max() > 0


def test_without_e0_every_row_is_a_copy_of_the_start_and_learns_alone() -> None:
    model = make_user_model("individualized", 4, START["head"], shared=False)
    assert torch.equal(model(torch.arange(4)), START["head"].expand(4, -1))
    model(torch.tensor([0])).sum().backward()
    assert model.offsets.weight.grad[0].abs().min() == 1
    assert "base" not in dict(model.named_parameters())


def test_clusters_start_apart() -> None:
    model = make_user_model("cluster", 4, START["head"], clusters=3)
    assert torch.pdist(model.centres.detach()).min() > 0
    assert torch.pdist(model.logits.weight.detach()).min() > 0


def test_one_cluster_is_uniform() -> None:
    model = make_user_model("cluster", 4, START["head"], clusters=1)
    assert torch.allclose(model(torch.arange(4)), model.centres.expand(4, -1))


def test_uniform_may_be_empty() -> None:
    assert make_user_model("uniform", 3, torch.zeros(0, 6))(torch.tensor([0, 2])).shape == (2, 0, 6)


@pytest.mark.parametrize(("name", "options"), MEMBERS[1:])
def test_a_row_can_be_added_and_replaced(name: str, options: dict) -> None:
    model = make_user_model(name, 3, START["head"], **options)
    before = model(torch.arange(3)).clone()
    own = torch.arange(float(options.get("clusters", 10) if name == "cluster" else 6))
    model.put_row(3, own)
    assert model.users == 4
    assert torch.allclose(model(torch.arange(3)), before)
    if name == "individualized":
        assert torch.allclose(model(torch.tensor([3]))[0], before[0] + own)
    model.put_row(1, own)
    assert torch.allclose(model(torch.tensor([1])), model(torch.tensor([3])))


def test_uniform_takes_no_new_user() -> None:
    with pytest.raises(ValueError, match="no user can be added"):
        make_user_model("uniform", 3, START["head"]).put_row(3, START["head"])


def test_index_round_trip_keeps_strange_ids(tmp_path: Path) -> None:
    index = UserIndex.seen_in(["../../x", "1", "=HYPERLINK()", None, "é", "1"])
    index.facts["1"] = {"comparisons": 2}
    index.save(tmp_path / "users.json")
    again = UserIndex.load(tmp_path / "users.json")
    assert again.ids == index.ids == sorted(["../../x", "1", "=HYPERLINK()", "é"])
    assert again.facts == index.facts
    assert again.rows(["1", None, "stranger"]).tolist() == [index.row("1"), 0, 0]


def test_index_refuses_what_is_no_id() -> None:
    with pytest.raises(ValueError, match="non-empty string"):
        UserIndex([1])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="there already"):
        UserIndex(["a", "a"])
    with pytest.raises(ValueError, match="no user model 'x'"):
        make_user_model("x", 2, START["head"])


def test_soft_prompt_starts_at_embeddings_of_a_text(tiny_backbone: Backbone) -> None:
    """Through the embedding module, whatever it does to the weight; repeated or cut to K tokens."""

    class Scaled(torch.nn.Module):
        def __init__(self, table: torch.nn.Module) -> None:
            super().__init__()
            self.table = table

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return 3 * self.table(ids)

    table, tokenizer = tiny_backbone.model.get_input_embeddings(), tiny_backbone.tokenizer
    ids = tokenizer.encode("The response that this person prefers:", add_special_tokens=False)
    for tokens in (0, 1, 10, 2 * len(ids) + 1):
        found = neutral_prompt(Scaled(table), tokenizer, tokens)
        assert found.shape == (tokens, 32)
        expected = [ids[i % len(ids)] for i in range(tokens)]
        assert torch.allclose(found, 3 * table.weight[torch.tensor(expected, dtype=torch.int64)])
    model = make_user_model("individualized", 3, found)
    assert model(torch.tensor([2])).shape == (1, *found.shape)
