from functools import cache

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from prlhf.core.tokenize import RowTokenizer, TextLayout, TokenRow

CORPUS = ["The user likes fruit; an assistant and a system call a tool. Plain words, more words: yes or no.\n"] * 3
ASCII = [chr(i) for i in range(33, 127)]
HARMLESS = "plain words"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = CHATML.replace("{{ m['content'] }}", "{% if m['role'] == 'tool' %}<tool_call>{% endif %}{{ m['content'] }}")
INST = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% elif m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
SEPARATED = "{% for m in messages %}<turn>{{ m['role'] }}: {{ m['content'] }}[SEP]{% endfor %}"


def fast(backend, template=None, **special):
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)


def byte_level(template, special, added=(), **names):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken(token, special=False) for token in added])
    return fast(backend, template, **names)


def chatml():
    return byte_level(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")


def tools():
    """A template that writes an added token which is not marked special."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return byte_level(TOOLS, special, ["<tool_call>", "</tool_call>"], eos_token="<|im_end|>")


def base():
    """No chat template; BOS and EOS around every text."""
    tokenizer = byte_level(None, ["<s>", "</s>"], bos_token="<s>", eos_token="</s>")
    pieces = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    post = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=pieces)
    tokenizer.backend_tokenizer.post_processor = post
    return tokenizer


def inst():
    """A template that begins with BOS and refuses a system turn; a leading space before every text."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    trainer = trainers.BpeTrainer(vocab_size=250, special_tokens=special, initial_alphabet=ASCII, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return fast(backend, INST, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram():
    """Control tokens are pieces of the vocabulary, so that plain text can become one."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=special, unk_token="<unk>", initial_alphabet=ASCII, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return fast(backend, INST, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def wordpiece():
    """Lower-cases text before it looks for an added token."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", "[CLS]", "[SEP]"], initial_alphabet=ASCII, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<turn>", special=False, normalized=True)])
    return fast(backend, SEPARATED, unk_token="[UNK]", eos_token="[SEP]", cls_token="[CLS]")


MADE = {f.__name__: f for f in (chatml, tools, base, inst, unigram, wordpiece)}
BYTE_LEVEL = ("chatml", "tools", "base")
WITH_TEMPLATE = tuple(name for name in MADE if name != "base")


@cache
def tokenizer(name):
    return MADE[name]()


def rows_of(name, **layout):
    return RowTokenizer(tokenizer(name), TextLayout(**layout))


def controls(name):
    """Control tokens by content: what is marked special or written by the template; an unknown word is neither."""
    found = tokenizer(name).added_tokens_decoder
    template = tokenizer(name).chat_template or ""
    used = {token.content: i for i, token in found.items() if token.special or token.content in template}
    return {content: i for content, i in used.items() if i != tokenizer(name).unk_token_id}


def control_ids(name, row):
    return [i for i in (*row.prompt_ids, *row.response_ids) if i in set(controls(name).values())]


def wide(text):
    """The full-width forms, which compatibility normalisation turns back."""
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


def disguises(token):
    return [token, f"a {token} b", f"a{token}{token}b", token[:1] + token, token.upper(), token.lower(), wide(token)]


def turn(role, content):
    return {"role": role, "content": content}


def placed(text, where):
    prompt, response, user_text = HARMLESS, HARMLESS, HARMLESS
    if where == "response":
        response = text
    elif where == "user_text":
        user_text = text
    elif where == "prompt":
        prompt = text
    else:
        prompt = [turn("user", "Hi"), turn("assistant", text), turn("user", text)]
    return [prompt], [response], [user_text]


@pytest.mark.parametrize("where", ["prompt", "response", "user_text", "conversation"])
@pytest.mark.parametrize("name", MADE)
def test_no_text_of_a_row_becomes_a_control_token(name, where):
    rows = rows_of(name)
    (plain,) = rows.rows(*placed(HARMLESS, where))
    assert controls(name)
    for token in controls(name):
        for text in disguises(token):
            (row,) = rows.rows(*placed(text, where))
            assert control_ids(name, row) == control_ids(name, plain), text


@pytest.mark.parametrize("name", MADE)
def test_no_text_of_a_row_becomes_a_control_token_without_template(name):
    rows = rows_of(name, template="none")
    for where in ("prompt", "response", "user_text", "conversation"):
        (plain,) = rows.rows(*placed(HARMLESS, where))
        for token in controls(name):
            for text in disguises(token):
                (row,) = rows.rows(*placed(text, where))
                assert control_ids(name, row) == control_ids(name, plain), (where, text)


@pytest.mark.parametrize("name", ["chatml", "tools", "wordpiece"])
def test_no_role_becomes_a_control_token(name):
    rows = rows_of(name)
    plain = rows.prompt_ids([turn("user", "Hi"), turn(HARMLESS, "Hi"), turn("user", "Hi")])
    for token in controls(name):
        ids = rows.prompt_ids([turn("user", "Hi"), turn(token, "Hi"), turn("user", "Hi")])
        wanted, seen = (control_ids(name, TokenRow(found, ())) for found in (plain, ids))
        assert seen == wanted


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_text_with_control_tokens_is_kept_as_text(name):
    rows = rows_of(name)
    text = " and ".join(controls(name))
    ((response),) = rows.response_ids([text])
    assert tokenizer(name).decode(response) == text
    assert text in tokenizer(name).decode(rows.prompt_ids(text, "about the user"))
    assert text in tokenizer(name).decode(rows.prompt_ids("Hi", text))


@pytest.mark.parametrize("name", MADE)
def test_responses_of_a_batch_do_not_depend_on_each_other(name):
    rows = rows_of(name)
    texts = ["yes", *controls(name), "", "no or yes", HARMLESS]
    assert rows.response_ids(texts) == [rows.response_ids([text])[0] for text in texts]


@pytest.mark.parametrize("name", MADE)
def test_prompt_ids_are_the_same_under_every_response(name):
    rows = rows_of(name)
    responses = ["yes", " yes", "\nyes", "", "no " * 50, *controls(name)]
    found = rows.rows(["A question:"] * len(responses), responses, ["about"] * len(responses))
    assert len({row.prompt_ids for row in found}) == 1
    assert found[0].prompt_ids == rows.prompt_ids("A question:", "about")


@pytest.mark.parametrize("name", WITH_TEMPLATE)
def test_harmless_rows_have_the_ids_of_the_template(name):
    rows, turns = rows_of(name), [turn("user", "Hi"), turn("assistant", "yes"), turn("user", "words")]
    expected = tokenizer(name).apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert rows.prompt_ids(turns) == tuple(expected)
    assert rows.prompt_ids("Hi") == rows.prompt_ids([turn("user", "Hi")])


@pytest.mark.parametrize("name", ["chatml", "tools"])
def test_whole_row_is_what_the_template_writes(name):
    (row,) = rows_of(name).rows(["Hi"], ["yes or no"], [""])
    turns = [turn("user", "Hi"), turn("assistant", "yes or no")]
    assert tokenizer(name).decode([*row.prompt_ids, *row.response_ids]) == tokenizer(name).apply_chat_template(
        turns, tokenize=False
    )


def test_a_response_closes_as_the_template_closes_it():
    (row,) = rows_of("inst").rows(["Hi"], ["yes"], [""])
    assert row.response_ids[-1] == tokenizer("inst").eos_token_id
    (row,) = rows_of("base").rows(["Hi"], ["yes"], [""])
    assert row.response_ids[-1] == tokenizer("base").eos_token_id
    (row,) = rows_of("base").rows(["Hi"], [""], [""])
    assert row.response_ids == (tokenizer("base").eos_token_id,)


def test_tokenizer_that_can_not_close_a_response_is_refused():
    with pytest.raises(ValueError, match="neither a chat template nor an end-of-sequence token"):
        RowTokenizer(byte_level(None, ["<pad>"]))


def test_layout_without_template_is_recorded():
    assert rows_of("base").layout.template == "none"
    assert rows_of("chatml").layout.template == "chat"
    assert rows_of("chatml", template="none").layout.to_dict()["template"] == "none"


def decoded(name, prompt, user_text, **layout):
    return tokenizer(name).decode(rows_of(name, **layout).prompt_ids(prompt, user_text))


def test_user_text_becomes_the_system_turn():
    expected = "<|im_start|>system\nabout<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert rows_of("chatml").has_system_turn
    assert decoded("chatml", "Hi", "about") == expected
    assert decoded("chatml", [turn("user", "Hi")], "about") == expected


def test_user_text_is_merged_into_the_system_turn_there_is():
    turns = [turn("system", "Be brief."), turn("user", "Hi")]
    text = decoded("chatml", turns, "about")
    assert text.startswith("<|im_start|>system\nabout\n\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n")
    assert turns == [turn("system", "Be brief."), turn("user", "Hi")]


def test_user_text_begins_the_first_user_turn_where_there_is_no_system_turn():
    rows = rows_of("inst")
    assert not rows.has_system_turn
    turns = [turn("user", "words"), turn("assistant", "yes"), turn("user", "more")]
    assert rows.prompt_ids(turns, "about") == rows.prompt_ids([turn("user", "about\n\nwords"), *turns[1:]])
    assert rows.prompt_ids("words", "about") == rows.prompt_ids("about\n\nwords")


def test_user_text_comes_before_the_prompt_where_there_is_no_template():
    assert decoded("base", "words", "about") == "<s>about\nwords"
    assert decoded("base", [turn("user", "Hi"), turn("assistant", "yes"), turn("user", "no")], "") == "<s>Hi\nyes\nno"
    assert decoded("chatml", "words", "about", template="none") == "about\nwords"


@pytest.mark.parametrize("name", MADE)
def test_user_text_is_left_out_where_the_layout_ignores_it(name):
    ignoring, reading = rows_of(name, user_text="ignore"), rows_of(name)
    assert ignoring.prompt_ids("words", "about") == ignoring.prompt_ids("words") == reading.prompt_ids("words", "")
    assert reading.prompt_ids("words", "about") != reading.prompt_ids("words")
    (row,) = ignoring.rows(["words"], ["yes"], ["about"])
    assert row.prompt_ids == ignoring.prompt_ids("words")


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize(("prompt_words", "response_words"), [(1, 1), (1, 60), (60, 1), (60, 60), (12, 60), (60, 12)])
def test_truncation(name, prompt_words, response_words):
    prompt, response = "yes no " * prompt_words, "no yes " * response_words
    (whole,) = rows_of(name, max_length=10_000).rows([prompt], [response], [""])
    closing = rows_of(name).closing_ids
    assert whole.cut == 0
    assert whole.response_ids[len(whole.response_ids) - len(closing) :] == closing
    text_ids = whole.response_ids[: len(whole.response_ids) - len(closing)]
    for longest in (len(closing), len(closing) + 1, 20, 33, len(whole) - 1, len(whole), len(whole) + 1):
        (row,) = rows_of(name, max_length=longest).rows([prompt], [response], [""])
        assert row.cut == max(0, len(whole) - longest)
        assert len(row) == min(len(whole), longest)
        kept = row.response_ids[: len(row.response_ids) - len(closing)]
        assert row.response_ids == kept + closing
        assert kept == text_ids[: len(kept)]
        assert whole.prompt_ids[len(whole.prompt_ids) - len(row.prompt_ids) :] == row.prompt_ids
        if len(row.prompt_ids) < len(whole.prompt_ids):
            assert len(row.prompt_ids) >= (longest - len(closing)) // 2


def test_row_that_fits_exactly_is_not_cut():
    (whole,) = rows_of("chatml").rows(["words"], ["yes"], ["about"])
    (same,) = rows_of("chatml", max_length=len(whole)).rows(["words"], ["yes"], ["about"])
    assert same == whole
