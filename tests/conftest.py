"""Tiny models with every parameter random, in the real formats; nothing here needs a network."""

import os
import tempfile

from hub import HUB

os.environ["HF_ENDPOINT"] = HUB.endpoint  # before huggingface_hub is imported
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hub-")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "0"  # clusters export 1, and the server of hub.py is not the Hub
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes share two cores

import atexit
import json
import random
import shutil
import socket
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

import data
import train
from model import Transformer

atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
SHARED = Path(__file__).parents[2] / "shared" / "data"
FIXTURES = Path(__file__).parent / "fixtures"
DATA = SHARED if SHARED.exists() else FIXTURES  # the same paths, but only a few rows
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
         "eos_token_id": 3, "bos_token_id": 1, "rms_norm_eps": 1e-5}
# kind -> what differs from SIZES, in the spelling of transformers 4 (rope_theta at the top level)
# or of transformers 5 (rope_parameters).
KINDS = {
    "llama": {"model_type": "llama", "rope_theta": 10000.0},
    "llama without GQA": {"model_type": "llama", "num_key_value_heads": None, "head_dim": None},
    "llama biased": {"model_type": "llama", "attention_bias": True, "tie_word_embeddings": True},
    "llama3 rope, new": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE, "head_dim": 16},
    "llama3 rope, old": {"model_type": "llama", "rope_theta": 5000.0, "rope_scaling":
                         {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}},
    "qwen2": {"model_type": "qwen2", "rope_theta": 1000000.0, "tie_word_embeddings": True},
    "qwen2 untied": {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4,
                     "attention_bias": True,  # a key that Qwen2 does not read
                     "rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
    "qwen3": {"model_type": "qwen3", "head_dim": 24, "tie_word_embeddings": True},
    "qwen3 biased": {"model_type": "qwen3", "head_dim": 8, "attention_bias": True},
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM",
                 "qwen3": "Qwen3ForCausalLM"}


def raw_config(kind: str, **changes) -> dict:
    raw = {**SIZES, **KINDS[kind], **changes}
    return {**raw, "architectures": [ARCHITECTURES[raw["model_type"]]]}


def make_hf(folder: Path, kind: str = "qwen2", seed: int = 0, scale: float = 0.25, **changes):
    """Saves a random model with transformers, and returns it. Norms and biases are random too: at
    their initial ones and zeros, a swapped norm or a dropped bias would go unseen."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw_config(kind, **changes)))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(1 + noise if "norm" in name else noise)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(raw_config(kind, **changes)))
    return model


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory) -> Path:
    """A random Qwen2 with the toy world's tokenizer."""
    folder = tmp_path_factory.mktemp("toy") / "model"
    make_hf(folder, "qwen2", vocab_size=train.save_toy_tokenizer(folder), num_hidden_layers=1)
    return folder


@pytest.fixture(scope="session")
def traces(toy_model, tmp_path_factory):
    """40 ragged toy traces with random teacher log-probabilities."""
    rng, file = random.Random(0), tmp_path_factory.mktemp("traces") / "traces.jsonl"
    records = [{**train.toy_trace(rng, skip=0.5), "id": f"t{i}"} for i in range(40)]
    for record in records:
        record["teacher_logprobs"] = [-rng.random() * 8 for _ in range(len(
            record["response"].split()) + 1)]
    data.write_jsonl(file, records)
    return file


def save_byte_tokenizer(folder: Path, words=(), special=("<|im_end|>", "<|im_start|>",
                                                         "<|endoftext|>"), plain=("<think>",)):
    """A byte-level tokenizer like Qwen's: a token for each byte, and one for each of `words`."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab, merges = {token: i for i, token in enumerate(alphabet)}, []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[:end - 1], word[end - 1]))
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([*special])
    backend.add_tokens([*plain])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))


def options(student, traces, out, *more):
    return train.parse_args([
        "--student", str(student), "--traces", str(traces), "--out", str(out), "--steps", "12",
        "--batch-size", "4", "--grad-accum", "2", "--lr", "1e-2", "--max-length", "64",
        "--log-every", "3", "--save-every", "5", "--device", "cpu", *more])


def weights(folder):
    return Transformer.from_pretrained(folder).state_dict()


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """The suite needs no network: a connection or a look-up that leaves this machine fails."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def local(host) -> None:
        assert host in ("127.0.0.1", "::1", "localhost", None), f"a test asked for {host}"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", lambda self, address: (
            local(address[0] if isinstance(address, tuple) else None), connect(self, address))[1])
        patch.setattr(socket, "getaddrinfo", lambda host, *more, **options: (
            local(host), look_up(host, *more, **options))[1])
        yield


@pytest.fixture
def shared() -> Path:
    if not SHARED.exists():
        pytest.skip("needs whole tokenizers, benchmarks or configs in ../shared/data")
    return SHARED


transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
