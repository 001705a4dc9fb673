"""What a personalized policy writes: against plain forward passes behind a user's vectors, and the command."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from policies import Trained, fit_policy, language_model
from tiny import byte_tokenizer
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from prlhf.core.backbone import unwrapped
from prlhf.core.comparisons import User
from prlhf.core.generation import Candidate, GenerateRequest, LocalGenerator
from prlhf.core.pretrained import find_model
from prlhf.core.sample import sample
from prlhf.core.sampling import Sampling
from prlhf.core.store import JsonlStore
from prlhf.policy.policy import PersonalizedPolicy

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ("a", "Why?", "Tell me of tides.", "Tell me of the moon and of what it does to the sea.")
USERS = [User("u0"), User("u1"), User("u3"), User("stranger"), User(None), User("u2", "Likes it calm.")]
GREEDY = Sampling(max_new_tokens=10, temperature=0)
NextLogits = Callable[[Sequence[int], int], Tensor]

places = pytest.mark.parametrize("place", ["prepend", "after_bos"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights so large that texts do not go round in circles."""
    folder = tmp_path_factory.mktemp("base")
    return language_model(folder, initializer_range=0.3, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(base, tmp_path_factory.mktemp("runs"))


def spelling(policy: PersonalizedPolicy) -> PersonalizedPolicy:
    """The policy with texts of token ids, so that two texts are equal where all tokens are."""
    policy.backbone.tokenizer.decode = lambda ids, **_: " ".join(map(str, ids))
    return policy


@pytest.fixture(scope="module")
def policies(trained: Trained) -> Callable[[str], PersonalizedPolicy]:
    made: dict[str, PersonalizedPolicy] = {}

    def of(place: str) -> PersonalizedPolicy:
        if place not in made:
            made[place] = spelling(
                PersonalizedPolicy.from_pretrained(
                    trained("lora", user_place=place, max_steps=8, user_learning_rate=0.3)[1]
                )
            )
        return made[place]

    return of


@pytest.fixture
def policy(policies: Callable[[str], PersonalizedPolicy]) -> PersonalizedPolicy:
    return policies("prepend")


def requests_of(sampling: Sampling = GREEDY, n: int = 1) -> list[GenerateRequest]:
    return [GenerateRequest(prompt, n, user=user, sampling=sampling) for prompt in PROMPTS for user in USERS]


def drawn(generator: LocalGenerator, requests: Sequence[GenerateRequest]) -> dict[tuple[str, User, int], Candidate]:
    return {(str(c.request.prompt), c.request.user, c.index): c for c in generator.generate(requests)}


def texts(generator: LocalGenerator, requests: Sequence[GenerateRequest]) -> dict[Any, str]:
    return {key: candidate.text for key, candidate in drawn(generator, requests).items()}


def plain_logits(policy: PersonalizedPolicy) -> NextLogits:
    """Token ids and a user's row -> logits (V,) of the next, by a plain forward pass over embeddings."""
    model, place = unwrapped(policy.module), policy.settings["user_place"]
    table = policy.user_model.vectors().reshape(-1, *policy.user_model.shape)

    @torch.no_grad()
    def logits(ids: Sequence[int], row: int) -> Tensor:
        text, before = model.get_input_embeddings()(torch.tensor(ids)), int(place == "after_bos")
        embeds = torch.cat([text[:before], table[row], text[before:]])
        return model(inputs_embeds=embeds[None]).logits[0, -1]

    return logits


def greedy(logits: NextLogits, ids: Sequence[int], row: int, end_ids: frozenset[int]) -> str:
    """Token ids that a policy should write, each the likeliest by a forward pass over the whole text."""
    found: list[int] = []
    while len(found) < GREEDY.max_new_tokens:
        token = int(logits([*ids, *found], row).argmax())
        if token in end_ids:
            break
        found.append(token)
    return " ".join(map(str, found))


def wanted_texts(policy: PersonalizedPolicy, logits: NextLogits) -> dict[Any, str]:
    generator = policy.generator()
    return {
        (prompt, user, 0): greedy(
            logits, generator.tokenizer.prompt_ids(prompt, user.text), policy.row_of(user), generator.end_ids
        )
        for prompt in PROMPTS
        for user in USERS
    }


@places
def test_texts_are_those_of_plain_forward_passes(policies: Callable[[str], PersonalizedPolicy], place: str) -> None:
    """Users and prompts of different lengths in one batch, in several, or each alone."""
    policy = policies(place)
    wanted = wanted_texts(policy, plain_logits(policy))
    assert len(set(wanted.values())) > 12
    assert len({wanted[PROMPTS[2], user, 0] for user in USERS}) >= 4  # who is asked for matters
    for sequences in (64, 5, 1):
        assert texts(policy.generator(sequences=sequences), requests_of()) == wanted


@places
def test_texts_are_those_of_transformers_generate(policies: Callable[[str], PersonalizedPolicy], place: str) -> None:
    policy = policies(place)
    generator = policy.generator()
    found = texts(generator, requests_of())
    encoded = [generator.tokenizer.prompt_ids(prompt, user.text) for prompt in PROMPTS for user in USERS]
    longest = max(map(len, encoded))
    out = generator.model.generate(
        input_ids=torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in encoded]),
        attention_mask=torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in encoded]),
        user_ids=torch.tensor([policy.row_of(user) for _ in PROMPTS for user in USERS]),
        do_sample=False,
        max_new_tokens=GREEDY.max_new_tokens,
        eos_token_id=sorted(generator.end_ids),
        pad_token_id=257,
    )
    new = [row[longest:].tolist() for row in out]
    ends = [next((i for i, token in enumerate(row) if token in generator.end_ids), len(row)) for row in new]
    written = [" ".join(map(str, row[:end])) for row, end in zip(new, ends, strict=True)]
    assert written == [found[prompt, user, 0] for prompt in PROMPTS for user in USERS]


def test_random_draws_do_not_depend_on_the_batch(policy: PersonalizedPolicy) -> None:
    requests = requests_of(Sampling(8), n=2)
    alone = drawn(policy.generator(sequences=1), requests)
    assert drawn(policy.generator(), requests[::-1]) == alone
    assert len({candidate.text for candidate in alone.values()}) > 40
    stronger = drawn(policy.generator(2.0, sequences=1), requests)
    assert drawn(policy.generator(2.0, sequences=7), requests[::-1]) == stronger


@places
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 2.0])
def test_strength_mixes_logits(policies: Callable[[str], PersonalizedPolicy], place: str, strength: float) -> None:
    """`row0 + strength (user - row0)`, at the prompt, at a step, and after some rows are left behind."""
    policy = policies(place)
    plain, generator = plain_logits(policy), policy.generator(strength)

    def mixed(ids: Sequence[int], row: int) -> Tensor:
        own, row0 = plain(ids, row), plain(ids, 0)
        return row0 + strength * (own - row0)

    some = [GenerateRequest(prompt, user=user) for prompt in PROMPTS for user in (USERS[0], USERS[1], USERS[3])]
    inputs = [(generator._prompt_ids(request), policy.row_of(request.user)) for request in some]
    given = [(generator._prompt_ids(request), generator._row(request)) for request in some]
    with torch.inference_mode():
        logits, decoding = generator._prefill(given)
        assert torch.allclose(logits, torch.stack([mixed(*one) for one in inputs]), atol=1e-3)
        kept = [7, 0, 10, 0]
        tokens = logits.argmax(1)[kept]
        after = decoding.take(kept).step(generator.model, tokens)
    longer = [([*inputs[i][0], int(token)], inputs[i][1]) for i, token in zip(kept, tokens, strict=True)]
    assert torch.allclose(after, torch.stack([mixed(*one) for one in longer]), atol=1e-3)
    assert texts(generator, requests_of()) == wanted_texts(policy, mixed)


def test_strengths_that_run_each_text_once(policy: PersonalizedPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """0 is the unknown user and 1 the policy as it is, each for the price of one."""
    passes: list[int] = []
    model = unwrapped(policy.module)
    real = model.forward

    def forward(**given: Any) -> Any:
        passes.append(len(given["input_ids"]))
        return real(**given)

    monkeypatch.setattr(model, "forward", forward)
    requests = [GenerateRequest("a", user=user, sampling=replace(GREEDY, max_new_tokens=1)) for user in USERS[:2]]
    rows = {}
    for strength in (0.0, 1.0, 2.0):
        passes.clear()
        list(policy.generator(strength).generate(requests))
        rows[strength] = list(passes)
    assert rows == {0.0: [1], 1.0: [2], 2.0: [4]}
    unknown = texts(policy.generator(), [replace(r, user=User(None, r.user.text)) for r in requests_of()])
    nobodys = texts(policy.generator(0.0), requests_of())
    assert nobodys == {(p, u, 0): unknown[p, User(None, u.text), 0] for p in PROMPTS for u in USERS}


@pytest.mark.parametrize("strength", [-0.5, float("nan"), float("inf")])
def test_strengths_that_make_no_sense_are_refused(policy: PersonalizedPolicy, strength: float) -> None:
    with pytest.raises(ValueError, match="strength must be at least 0"):
        policy.generator(strength)


def test_a_model_without_users_has_no_strength(base: Path, policy: PersonalizedPolicy) -> None:
    plain = LocalGenerator.from_source(find_model(str(base)), "float32", "cpu")
    with pytest.raises(ValueError, match="strength 2: this model knows no users"):
        LocalGenerator(plain.model, plain.tokenizer, strength=2.0)


def test_unknown_users_are_told(policy: PersonalizedPolicy, base: Path, tmp_path: Path) -> None:
    """They get row 0's text, which says so in the candidate and in the record; a plain model says nothing."""
    requests = [GenerateRequest("a", user=user, sampling=GREEDY) for user in USERS[:5]]
    found = drawn(policy.generator(), requests)
    assert [found["a", user, 0].user_known for user in USERS[:5]] == [True, True, True, False, False]
    assert found["a", USERS[3], 0].text == found["a", USERS[4], 0].text
    sample(policy.generator(), requests, store := JsonlStore(tmp_path / "own.jsonl"), "own")
    assert {r["user_id"]: r["user_known"] for r in store.values()} == {
        **dict.fromkeys(("u0", "u1", "u3"), True),
        **dict.fromkeys(("stranger", None), False),
    }
    plain = LocalGenerator.from_source(find_model(str(base)), "float32", "cpu")
    assert {candidate.user_known for candidate in plain.generate(requests)} == {None}
    sample(plain, requests, store := JsonlStore(tmp_path / "plain.jsonl"), "plain")
    assert not [record for record in store.values() if "user_known" in record]


def test_learned_positions_hold_the_vectors_too(tmp_path: Path) -> None:
    """What does not fit behind the vectors is refused with a message, and not by an index error."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    GPT2LMHeadModel(GPT2Config(vocab_size=260, **shape)).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    policy = fit_policy(tmp_path / "base", tmp_path / "run", "frozen", max_steps=1)
    room = 128 - len(policy.generator().tokenizer.prompt_ids("a"))
    with pytest.raises(ValueError, match="more than the model's"):
        list(policy.generator().generate([GenerateRequest("a", user=User("u0"), sampling=Sampling(room))]))
