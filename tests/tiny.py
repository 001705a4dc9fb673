"""A tiny random Llama, a byte tokenizer, and users on a checkerboard."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from prlhf.core.comparisons import Comparison, Comparisons, User

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Every byte is a token; ChatML control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_config(**changes: object) -> LlamaConfig:
    keep = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaConfig(**{**keep, "vocab_size": 260, "max_position_embeddings": 512, "pad_token_id": 257, **changes})


def checkerboard(prompts: int, users: int = 4, first: int = 0) -> Comparisons:
    """Even users like the calm response and odd users the loud one: nothing can be learned without the user."""
    rows = []
    for i in range(first, first + prompts):
        calm, loud = f"well, {i} it is.", f"WOW!!! {i}!!!"
        for u in range(users):
            chosen, rejected = (calm, loud) if u % 2 == 0 else (loud, calm)
            rows.append(Comparison(User(f"u{u}"), f"Say {i}", chosen, rejected, f"board:{len(rows) + 1}"))
    return Comparisons(rows, "board")


def write_jsonl(path: Path, rows: Comparisons) -> Path:
    records = [{"user_id": r.user.id, "prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected} for r in rows]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
