"""A short supervised fine-tuning, after which a model ends its answers: what training of a policy starts from.

    python recipes/sft.py --data D/train.parquet --out runs/start
    prlhf policy train --model runs/start --data D/train.parquet --output-dir runs/policy

Both responses of every comparison are answers to learn from, each once: what is learned is how answers look and where
they end, and not what anybody prefers. TRL's SFTTrainer with LoRA, which is merged at the end.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from prlhf import TextLayout, find_model, load_comparisons, load_language_model
from prlhf.core.comparisons import Comparisons
from prlhf.core.compiled import compiled_layers
from prlhf.core.pretrained import EXAMPLE_MODEL
from prlhf.core.tokenize import RowTokenizer


def answers(rows: Comparisons, tokenizer: RowTokenizer) -> Dataset:
    """Token ids of distinct prompts with responses, and which of them belong to the response."""
    texts = {(str(row.prompt), text): (row.prompt, text) for row in rows for text in (row.chosen, row.rejected)}
    prompts, responses = zip(*texts.values(), strict=True)
    tokens = tokenizer.rows(prompts, responses, [""] * len(prompts))
    return Dataset.from_dict(
        {
            "input_ids": [list(row.prompt_ids + row.response_ids) for row in tokens],
            "completion_mask": [[0] * len(row.prompt_ids) + [1] * len(row.response_ids) for row in tokens],
        }
    )


def finetune(
    rows: Comparisons,
    out: Path,
    layout: TextLayout,
    model: str = EXAMPLE_MODEL,
    compile_layers: bool = False,
    **options: Any,
) -> None:
    """Fine-tunes a model on the responses of comparisons and writes it whole, with its tokenizer, to a folder."""
    base = load_language_model(find_model(model))
    settings: dict[str, Any] = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 16,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "logging_steps": 10,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "report_to": "none",
        "use_cpu": not torch.accelerator.is_available(),
        "completion_only_loss": True,
    }
    trainer = SFTTrainer(
        base.model,
        SFTConfig(output_dir=str(out), **{**settings, **options}),
        train_dataset=answers(rows, RowTokenizer(base.tokenizer, layout)),
        processing_class=base.tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    )
    with compiled_layers(trainer.model, compile_layers):
        trainer.train()
    trainer.model.merge_and_unload().save_pretrained(out)
    base.tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="comparisons of the training part")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--model", default=EXAMPLE_MODEL)
    parser.add_argument("--chat-template", default="chat", choices=("chat", "none"), help="as later for the policy")
    parser.add_argument("--num-train-epochs", type=float, default=2)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--compile-layers", action="store_true", help="less than half the time of a step on a CPU")
    given = parser.parse_args()
    rows, layout = load_comparisons(given.data), TextLayout(given.chat_template)
    options = {"num_train_epochs": given.num_train_epochs, "learning_rate": given.learning_rate}
    finetune(rows, given.out, layout, given.model, given.compile_layers, **options)


if __name__ == "__main__":
    main()
