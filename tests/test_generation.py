"""Sampling: what a text depends on and what it does not, against transformers where it knows the answer."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tiny import byte_tokenizer, tiny_config
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, LlamaForSequenceClassification
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from prlhf.core.comparisons import User
from prlhf.core.generation import (
    Candidate,
    GenerateRequest,
    LocalGenerator,
    Sampling,
    draw,
    whole_sentences,
)
from prlhf.core.pretrained import find_model, load_causal_model
from prlhf.core.sample import sample
from prlhf.core.store import JsonlStore
from prlhf.core.tokenize import RowTokenizer, TextLayout

pytestmark = pytest.mark.usefixtures("one_thread")
END = 257
ENDING = [END, *range(200, 220)]  # so many that a fair share of the responses ends before its limit
PROMPTS = ("a", "Why?", "Tell me of tides.", "Tell me of the moon and of what it does to the sea.")


def causal_model(**changes: Any) -> LlamaForCausalLM:
    """Random weights large enough that attention matters and that some tokens are likelier than others."""
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(vocab_size=258, initializer_range=0.3, eos_token_id=END, **changes)).eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    made = causal_model()
    made.generation_config.eos_token_id = ENDING
    return made


@pytest.fixture(scope="module")
def spelled() -> RowTokenizer:
    """A tokenizer that reads text and writes token ids, so that two texts are equal where all tokens are."""
    tokenizer = byte_tokenizer()
    tokenizer.decode = lambda ids, **_: " ".join(map(str, ids))
    return RowTokenizer(tokenizer, TextLayout())


@pytest.fixture
def generator(model: LlamaForCausalLM, spelled: RowTokenizer) -> LocalGenerator:
    return LocalGenerator(model, spelled)


def requests_of(n: int = 3, prompts: Sequence[str] = PROMPTS, seed: int = 0, **sampling: Any) -> list[GenerateRequest]:
    return [GenerateRequest(p, n, sampling=Sampling(**{"max_new_tokens": 12, **sampling}), seed=seed) for p in prompts]


def drawn(generator: LocalGenerator, requests: Sequence[GenerateRequest]) -> dict[tuple[str, int], Candidate]:
    return {(c.request.prompt, c.index): c for c in generator.generate(requests)}


def ids_of(candidate: Candidate) -> list[int]:
    return [int(token) for token in candidate.text.split()]


@pytest.fixture
def calls(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The token ids (R, T) of every forward pass."""
    seen: list[Tensor] = []
    real = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["input_ids"].clone())
        return real(*args, **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    return seen


@pytest.mark.parametrize("sequences", [1, 3, 64])
def test_a_text_depends_on_nothing_beside_it(model: LlamaForCausalLM, spelled: RowTokenizer, sequences: int) -> None:
    """Not on the size of a batch, the order of the requests, the padding, nor on how many are asked for."""
    requests = requests_of()
    alone = {}
    for request in requests:
        alone |= drawn(LocalGenerator(model, spelled), [request])
    found = drawn(LocalGenerator(model, spelled, sequences), requests[::-1])
    assert found == alone
    assert len(found) == 12
    more = drawn(LocalGenerator(model, spelled, sequences), requests_of(n=5))
    assert {key: more[key].text for key in alone} == {key: alone[key].text for key in alone}
    assert len({c.text for c in more.values()}) > 10


def test_requests_of_several_samplings_keep_apart(generator: LocalGenerator) -> None:
    one, two = requests_of(prompts=PROMPTS[:2]), requests_of(prompts=PROMPTS[:2], max_new_tokens=5)
    mixed = list(generator.generate([one[0], two[0], one[1], two[1]]))
    assert len(mixed) == 12
    expected = [*generator.generate(one), *generator.generate(two)]
    assert sorted(mixed, key=repr) == sorted(expected, key=repr)


def test_temperature_0_is_the_greedy_search_of_transformers(
    model: LlamaForCausalLM, generator: LocalGenerator, calls: list[Tensor]
) -> None:
    limit = 16
    found = drawn(generator, requests_of(n=1, temperature=0, max_new_tokens=limit))
    prompts, *_ = calls
    assert prompts.shape[0] == 4  # of different lengths, so three of them are padded
    assert len({len(generator.tokenizer.prompt_ids(p)) for p in PROMPTS}) == 4
    for prompt in PROMPTS:
        ids = torch.tensor([generator.tokenizer.prompt_ids(prompt)])
        whole = model.generate(ids, do_sample=False, max_new_tokens=limit, pad_token_id=0)[0, ids.shape[1] :].tolist()
        candidate = found[prompt, 0]
        assert ids_of(candidate) == (whole[:-1] if candidate.ended else whole)
        assert (candidate.tokens, candidate.ended) == (len(whole), whole[-1] in ENDING)
    assert {c.ended for c in found.values()} == {True, False}


def test_models_that_count_positions_from_the_start(spelled: RowTokenizer) -> None:
    """In Llama only distances count; here a padded prompt must begin at position 0 as an unpadded one does."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=258, n_positions=128, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    made = GPT2LMHeadModel(config).eval()
    made.generation_config.eos_token_id = END
    found = drawn(LocalGenerator(made, spelled), requests_of(n=1, temperature=0))
    for prompt in PROMPTS:
        ids = torch.tensor([spelled.prompt_ids(prompt)])
        whole = made.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=0)[0, ids.shape[1] :].tolist()
        candidate = found[prompt, 0]
        assert ids_of(candidate) == (whole[:-1] if candidate.ended else whole)


def test_responses_to_one_prompt_share_its_forward_pass(generator: LocalGenerator, calls: list[Tensor]) -> None:
    requests = [*requests_of(n=6), *requests_of(n=2, prompts=PROMPTS[:1], seed=1)]
    assert len(list(generator.generate(requests))) == 26
    first, *steps = calls
    assert first.shape[0] == 4
    expected = {generator.tokenizer.prompt_ids(prompt) for prompt in PROMPTS}
    assert {tuple(row[len(row) - n :].tolist()) for row in first for n in map(len, expected)} >= expected
    assert {step.shape[1] for step in steps} == {1}


def test_a_response_costs_one_row_for_each_token_after_the_first(
    generator: LocalGenerator, calls: list[Tensor]
) -> None:
    """So those that have ended are dropped, and nothing is computed beyond the last token."""
    found = list(generator.generate(requests_of(n=8)))
    _, *steps = calls
    sizes = [step.shape[0] for step in steps]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0] <= 32
    assert sum(sizes) == sum(c.tokens - 1 for c in found)


def test_ended_and_tokens(generator: LocalGenerator) -> None:
    found = list(generator.generate(requests_of(n=8)))
    assert {c.ended for c in found} == {True, False}
    for candidate in found:
        ids = ids_of(candidate)
        assert not set(ids) & set(ENDING)
        assert candidate.tokens == len(ids) + candidate.ended
        assert candidate.tokens <= 12
        assert candidate.ended or candidate.tokens == 12


def test_one_new_token_needs_no_further_pass(generator: LocalGenerator, calls: list[Tensor]) -> None:
    found = list(generator.generate(requests_of(max_new_tokens=1)))
    assert {c.tokens for c in found} == {1}
    assert len(calls) == 1


def test_texts_are_decoded_and_hold_no_control_token(model: LlamaForCausalLM) -> None:
    tokenizer = RowTokenizer(byte_tokenizer(), TextLayout())
    text, control = tokenizer.response_ids(["yes, 42 "])[0], tokenizer.tokenizer.bos_token_id
    script = iter([control, *text, END])

    class Scripted(torch.nn.Module):
        """Says what it is told, one token after the other."""

        generation_config = None

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = model, model.config

        def forward(self, **kwargs: Any) -> Any:
            out = self.inner(**kwargs)
            out.logits = torch.full_like(out.logits, -5.0).index_fill(-1, torch.tensor([next(script)]), 5.0)
            return out

    (found,) = LocalGenerator(Scripted(), tokenizer).generate(requests_of(n=1, prompts=["Hi"], temperature=0))
    assert (found.text, found.tokens, found.ended) == ("yes, 42", len(text) + 2, True)


def test_every_response_has_random_numbers_of_its_own(generator: LocalGenerator) -> None:
    """Where all tokens are as likely, nothing but the numbers makes a difference."""
    generator.end_ids = frozenset()
    requests = [
        GenerateRequest(prompt, 3, 0, User(user), Sampling(8, temperature=1e9), seed)
        for prompt in (*PROMPTS, [{"role": "user", "content": "Hm."}])
        for user in (None, "ann")
        for seed in (0, 1)
    ]
    found = [candidate.text for candidate in generator.generate(requests)]
    assert len(set(found)) == len(found) == 60


def test_seeds(generator: LocalGenerator) -> None:
    first, again = drawn(generator, requests_of()), drawn(generator, requests_of())
    other = drawn(generator, requests_of(seed=1))
    assert first == again
    assert sum(first[key].text != other[key].text for key in first) > 8


def test_candidates_of_a_batch_come_before_the_next_begins(
    model: LlamaForCausalLM, spelled: RowTokenizer, calls: list[Tensor]
) -> None:
    stream: Iterator[Candidate] = LocalGenerator(model, spelled, 3).generate(requests_of(max_new_tokens=2))
    assert not calls
    next(stream)
    begun = len(calls)
    assert begun <= 2
    assert not torch.is_inference_mode_enabled()  # whoever reads the stream is left alone
    assert len(list(stream)) == 11
    assert len(calls) > begun


def test_the_users_text_is_part_of_the_input(generator: LocalGenerator, calls: list[Tensor]) -> None:
    sampling = Sampling(12, temperature=0)
    turns = [{"role": "system", "content": "I like lists."}, {"role": "user", "content": "Why?"}]
    told, written, without = (
        next(generator.generate([GenerateRequest(prompt, user=User(None, text), sampling=sampling)]))
        for prompt, text in (("Why?", "I like lists."), (turns, ""), ("Why?", ""))
    )
    assert told.text == written.text != without.text
    assert tuple(calls[0][0].tolist()) == generator.tokenizer.prompt_ids(turns)


def test_first_tokens_follow_the_models_distribution(model: LlamaForCausalLM, generator: LocalGenerator) -> None:
    """The streams of a request's responses together are as good as one stream of random numbers."""
    generator.sequences = 2000
    sampling = {"max_new_tokens": 1, "temperature": 0.7, "top_k": 20}
    (request,) = requests_of(n=2000, prompts=["Why?"], **sampling)
    generator.end_ids = frozenset()
    counts = np.bincount([ids_of(c)[0] for c in generator.generate([request])], minlength=258)
    ids = torch.tensor([generator.tokenizer.prompt_ids("Why?")])
    with torch.no_grad():
        logits = model(ids).logits[:, -1].double()
    expected = warped(logits, Sampling(**sampling))[0].numpy() * 2000
    assert counts[expected == 0].sum() == 0
    assert chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-3


def warped(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities (R, V) that transformers samples from."""
    scores = TemperatureLogitsWarper(float(sampling.temperature))(None, logits)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return scores.softmax(-1)


def shares(logits: Tensor, sampling: Sampling, points: int) -> Tensor:
    """Share (R, V) of each token among draws at evenly spaced numbers; within 1 / points of its probability."""
    rows, size = logits.shape
    grid = ((np.arange(points) + 0.5) / points).tolist()
    tokens = draw(logits.repeat_interleave(points, 0), sampling, grid * rows).reshape(rows, points)
    return torch.stack([torch.bincount(row, minlength=size) for row in tokens]) / points


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    ("top_p", "top_k"), [(1.0, 0), (0.9, 0), (0.5, 0), (1e-6, 0), (1.0, 3), (1.0, 1), (1.0, 50), (0.7, 5), (0.8, 12)]
)
def test_draws_follow_what_transformers_samples_from(temperature: float, top_p: float, top_k: int) -> None:
    logits = 1.5 * torch.randn(6, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sampling = Sampling(1, temperature, top_p, top_k)
    expected = warped(logits, sampling)
    found = shares(logits, sampling, 4000)
    assert (found - expected).abs().max() < 1 / 4000
    assert found[expected == 0].sum() == 0
    assert (found[expected > 1 / 4000] > 0).all()


@pytest.mark.parametrize(("size", "top_p", "kept"), [(1500, 0.3, 1024), (600, 0.95, 600), (1500, 0.1, 256)])
def test_top_p_of_flat_distributions_needs_more_than_a_few_tokens(size: int, top_p: float, kept: int) -> None:
    """A steep row beside flat ones; where 256 tokens do not hold `top_p`, more are looked at."""
    noise = torch.randn(3, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    logits = noise * torch.tensor([[0.01], [8.0], [0.3]], dtype=torch.float64)
    sampling, points = Sampling(1, top_p=top_p), 2500
    expected = warped(logits, sampling)
    found = shares(logits, sampling, points)
    assert (found - expected).abs().max() < 1 / points
    assert ((found > 0) == (expected > 0))[expected > 1 / points].all()
    assert found[expected == 0].sum() == 0
    assert kept // 4 < int((found[0] > 0).sum()) <= kept


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.99), Sampling(top_k=5), Sampling(top_p=0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_number_gives_a_token_of_probability_0(sampling: Sampling, dtype: torch.dtype) -> None:
    logits = torch.randn(8, 3000, generator=torch.Generator().manual_seed(3)).to(dtype)
    logits[:, [0, 1, 7, 2998, 2999]] = float("-inf")
    logits[4:, 10:] = -1e5  # of probability 0 once it is rounded
    for number in (0.0, 5e-324, 0.5, 1 - 2**-24, 1 - 2**-53):
        tokens = draw(logits, sampling, [number] * 8)
        assert (logits.softmax(-1).gather(1, tokens[:, None]) > 0).all()
    only = torch.full((1, 9), float("-inf")).index_fill(1, torch.tensor([4]), 0.0)
    assert [draw(only, sampling, [number]).item() for number in (0.0, 1 - 2**-53)] == [4, 4]


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_refused(bad: float, temperature: float) -> None:
    logits = torch.zeros(3, 5)
    assert draw(logits, Sampling(temperature=temperature), [0.5] * 3).shape == (3,)
    logits[1, 2] = bad
    with pytest.raises(ValueError, match="not numbers"):
        draw(logits, Sampling(temperature=temperature), [0.5] * 3)


def test_a_tiny_temperature_takes_the_likeliest_token() -> None:
    logits = torch.tensor([[1.0, 90.0, 89.0], [-3.0, -5.0, -4.0]])
    assert draw(logits, Sampling(temperature=1e-45), [0.999, 0.999]).tolist() == [1, 0]


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"top_k": -1},
    ],
)
def test_bad_sampling_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)  # type: ignore[arg-type]


def test_only_control_tokens_of_the_template_end_a_response() -> None:
    """Some templates write a space or a line break before the token that closes a turn."""
    spaced = "{% for m in messages %}{{ m['content'] }}\n <|im_end|>{% endfor %}"
    made = causal_model()
    assert LocalGenerator(made, RowTokenizer(byte_tokenizer(spaced), TextLayout())).end_ids == {END}
    assert LocalGenerator(made, RowTokenizer(byte_tokenizer(None), TextLayout())).end_ids == {END}
    made.generation_config.eos_token_id = [3, 4]
    assert LocalGenerator(made, RowTokenizer(byte_tokenizer(), TextLayout())).end_ids == {3, 4, END}


def test_generator_from_a_saved_model(model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = LocalGenerator.from_source(find_model(str(tmp_path)), "float32", "cpu")
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    here = LocalGenerator(model, RowTokenizer(byte_tokenizer(), TextLayout()))
    assert drawn(loaded, requests_of()) == drawn(here, requests_of())


def test_reward_model_is_refused_by_name(tmp_path: Path) -> None:
    LlamaForSequenceClassification(tiny_config(num_labels=1)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"LlamaForSequenceClassification.* writes no text") as refused:
        load_causal_model(find_model(str(tmp_path)))
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("It rains. Take an", "It rains."),
        ("It rains.", "It rains."),
        ("It rains.  \n", "It rains."),
        ("It costs 3.5 euros. And", "It costs 3.5 euros."),
        ("It costs 3.5", ""),
        ("1. Foo", ""),
        ("1. Foo\n2. Bar", ""),
        ("1. Wash it.\n2. Dry", "1. Wash it."),
        ("There are two: 1. Foo 2. Bar", ""),
        ('He said "yes." Then', 'He said "yes."'),
        ("“Go!” she cried and", "“Go!”"),
        ("**Bold.** And *this", "**Bold.**"),
        ("(Really.) And", "(Really.)"),
        ("Well... maybe", "Well..."),
        ("Hm… maybe", "Hm…"),
        ("What?! No", "What?!"),
        ("Is it 42? Or 43! Or", "Is it 42? Or 43!"),
        ("See www.example.com for", ""),
        ("- One.\n- Two.\n- Thr", "- One.\n- Two."),
        ("nothing whole", ""),
        ("", ""),
    ],
)
def test_whole_sentences(text: str, whole: str) -> None:
    assert whole_sentences(text) == whole
    assert whole_sentences(whole) == whole


def test_a_request_is_not_divided_between_batches(
    model: LlamaForCausalLM, spelled: RowTokenizer, calls: list[Tensor]
) -> None:
    list(LocalGenerator(model, spelled, 4).generate(requests_of(n=3)))
    assert [call.shape[0] for call in calls if call.shape[1] > 1] == [1] * len(PROMPTS)


@pytest.mark.parametrize("sequences", [0, -1])
def test_no_sequences_are_refused(model: LlamaForCausalLM, spelled: RowTokenizer, sequences: int) -> None:
    with pytest.raises(ValueError, match="sequences must be at least 1"):
        LocalGenerator(model, spelled, sequences)


def test_no_responses_are_refused() -> None:
    with pytest.raises(ValueError, match="n must be at least 1 and first at least 0, found 0 and 0"):
        GenerateRequest("a", 0)


def test_a_text_depends_on_its_index_and_not_on_where_the_request_begins(generator: LocalGenerator) -> None:
    whole = {c.index: c.text for c in generator.generate(requests_of(n=5, prompts=PROMPTS[:1]))}
    (later,) = requests_of(n=2, prompts=PROMPTS[:1])
    assert {c.index: c.text for c in generator.generate([replace(later, first=3)])} == {i: whole[i] for i in (3, 4)}


def test_sample_draws_only_what_is_missing_and_nothing_twice(generator: LocalGenerator, tmp_path: Path) -> None:
    (request,) = requests_of(n=6, prompts=PROMPTS[:1])
    store = JsonlStore(tmp_path / "drawn.jsonl")
    (first,) = sample(generator, [replace(request, n=4)], store, "m")
    asked: list[GenerateRequest] = []

    class Counting:
        def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[Candidate]:
            asked.extend(requests)
            return generator.generate(requests)

    both = sample(Counting(), [request, request], store, "m")
    assert [single.indices for single in asked] == [range(4, 5), range(5, 6)]
    assert both == [[c.text for c in sorted(generator.generate([request]), key=lambda c: c.index)]] * 2
    assert both[0][:4] == first
    sample(Counting(), [request], store, "another model")
    assert len(asked) == 2 + 6


def test_more_than_the_model_can_hold_is_refused_before_anything_is_run(
    generator: LocalGenerator, calls: list[Tensor]
) -> None:
    with pytest.raises(ValueError, match=r"a prompt of \d+ tokens and 500 new ones are more than the model's 512: 'a'"):
        list(generator.generate(requests_of(max_new_tokens=500)))
    assert not calls
