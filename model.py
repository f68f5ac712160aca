"""A Llama / Qwen2 / Qwen3 transformer that reads and writes Hugging Face folders, in HF's names.

One network, four switches: bias on q, k, v (Qwen2), RMSNorm on query and key heads (Qwen3), a free
head size, a tied head. Letters in all files: B sequences, T tokens, D hidden, H query and K
key/value heads, Dh head size, V vocabulary, N supervised tokens. arXiv 2407.21783, 2505.09388."""

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import errors, save_torch_state_dict, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


class BadInput(ValueError):
    """Something the user gave is wrong; the message names it and says what to do."""


def check(fine: object, message: str) -> None:
    if not fine:
        raise BadInput(message)


def fetch(path_or_repo: str | Path) -> Path:
    """The folder of a model: the one given, or the Hub's "org/name", downloaded once."""
    try:
        return (Path(path_or_repo) if Path(path_or_repo).is_dir() else
                Path(snapshot_download(str(path_or_repo), allow_patterns=[
                    "*config.json", "tokenizer.json", "*.jinja", "model*.safetensors*"])))
    except (OSError, ValueError, errors.HTTPError) as error:  # whole files stay in the cache
        raise BadInput(f"{path_or_repo}: not a folder, and the Hub says: {error!s:.200}") from error


def read_json(file: Path) -> dict:
    try:
        return dict(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise BadInput(f"{file}: missing, or not a JSON object ({error!s:.200})") from error


ONLY = {  # keys of config.json that change the computation, with the values implemented here
    "model_type": ("llama", "qwen2", "qwen3"), "rope_type": ("default", "llama3"),
    "architectures": ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    "layer_types": ("full_attention",), "hidden_act": ("silu",), "mlp_bias": (False,),
    "attention_dropout": (0,), "use_sliding_window": (False,), "partial_rotary_factor": (1,),
    "tie_word_embeddings": (False, True), "attention_bias": (False, True),
    "quantization_config": (), "auto_map": (), "mrope_section": (), "full_attention": ()}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class Config(SimpleNamespace):
    """config.json as attributes under HF's names, checked; `raw` is the file as it was."""

    def __init__(self, raw: dict, source: str | Path = "config.json"):
        old, new = (raw.get(key) or {} for key in ("rope_scaling", "rope_parameters"))
        check(isinstance(old, dict) and isinstance(new, dict), f"{source}: rope_scaling and "
              f"rope_parameters = {old!s:.60} and {new!s:.60}: not objects")
        given = {**raw, "rope_type": old.get("type"), **old, **new}  # "type" is the older name
        heads, kind = raw.get("num_attention_heads"), raw.get("model_type")
        values = {"model_type": None, "rope_type": "default", "rope_theta": 1e4,
                  "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "attention_bias": False,
                  "num_key_value_heads": heads if kind == "llama" else 0,
                  "max_position_embeddings": 10 ** 9,
                  **{key: value for key, value in given.items() if value is not None}}
        llama3 = LLAMA3_ROPE if values["rope_type"] == "llama3" else ()
        def accept(fine: bool, key: str, why: str) -> None:
            check(fine, f"{source}: {key} = {values.get(key)!s:.60}: {why}")
        for key, known in ONLY.items():
            found = values.get(key, [])
            accept(all(item in known for item in (found if isinstance(found, list) else [found])),
                   key, f"not implemented, only {' or '.join(map(str, known)) or 'without it'}")
        for key in (*SIZES, "rope_theta", "rms_norm_eps", *llama3):
            number = type(values.get(key)) in (int, int if key in SIZES else float)
            most = 999 if key == "num_hidden_layers" else 1e9
            accept(number and 0 < values[key] <= most, key, f"no number from 0 to {most:g}")
        values.setdefault("head_dim", 128 if kind == "qwen3" else values["hidden_size"] // heads)
        accept(heads % values["num_key_value_heads"] == 0, "num_key_value_heads", "uneven groups")
        accept(values["head_dim"] in range(2, 1025, 2), "head_dim", "RoPE needs an even number")
        super().__init__(**values, raw=raw, llama3=[values[key] for key in llama3])


def rope_table(config: Config, positions: Tensor) -> tuple[Tensor, Tensor]:
    """positions [B, T] -> cos and sin of the angles in fp32, each [B, 1, T, Dh]. In HF's layout a
    dimension turns together with the one Dh/2 away; sin has the sign of the rotation in it."""
    pair = torch.arange(0, config.head_dim, 2, device=positions.device).float()
    freq = 1.0 / config.rope_theta ** (pair / config.head_dim)  # [Dh/2], RoPE 2104.09864
    if config.llama3:  # slow waves are stretched by `factor`, fast ones kept, others blended
        factor, low, high, length = config.llama3
        turns = length * freq / (2 * torch.pi)  # of each wave within the original context
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        freq = kept * freq + (1 - kept) * freq / factor
    angle = positions[:, None, :, None].float() * freq
    return angle.cos().repeat(1, 1, 1, 2), torch.cat((-angle.sin(), angle.sin()), dim=-1)


class KVCache:
    """Keys and values of all layers, allocated once: [2, layer, B, K, columns, Dh]."""
    def __init__(self, config: Config, rows: int, columns: int, like: Tensor):
        self.data = like.new_zeros(2, config.num_hidden_layers, rows, config.num_key_value_heads,
                                   columns, config.head_dim)
        self.length = 0  # columns filled


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        D, Dh, qwen2 = config.hidden_size, config.head_dim, config.model_type == "qwen2"
        H, K, bias = config.num_attention_heads, config.num_key_value_heads, config.attention_bias
        self.q_proj = nn.Linear(D, H * Dh, bias=bias or qwen2)
        self.k_proj, self.v_proj = (nn.Linear(D, K * Dh, bias=bias or qwen2) for _ in range(2))
        self.o_proj = nn.Linear(H * Dh, D, bias=bias and not qwen2)
        norm = nn.RMSNorm if config.model_type == "qwen3" else nn.Identity
        self.q_norm, self.k_norm = norm(Dh, config.rms_norm_eps), norm(Dh, config.rms_norm_eps)

    def forward(self, x: Tensor, rope, mask: Tensor | None, past: tuple | None) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, rope[0].shape[-1])).transpose(1, 2)  # [B, H, T, Dh]
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (x * rope[0] + x.roll(x.shape[-1] // 2, -1) * rope[1]
                for x in (self.q_norm(q), self.k_norm(k)))
        if past is not None:  # this layer's [2, B, K, :, Dh], and the columns [T] that are new
            k, v = past[0].index_copy_(3, past[1], torch.stack((k, v)))
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = (nn.Linear(D, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope, mask: Tensor | None, past: tuple | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, past)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model: Any = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            "norm": nn.RMSNorm(config.hidden_size, config.rms_norm_eps)})
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.generation, self.eos_token_ids = {}, []  # generation_config.json, and the ids in it
        self.run: Any = nn.Module.__call__  # of a block; train.py may recompute activations instead
        self.folder = Path("nowhere")  # what it was read from: its tokenizer files are saved along

    def forward(self, tokens: Tensor, cache: KVCache | None = None,
                pad: Tensor | None = None) -> Tensor:
        """tokens [B, T] -> hidden [B, T, D], causal. Batches are padded on the right; or on the
        left, then pad [B] says how far. A cache goes before the tokens and is extended by them."""
        x, start, mask = self.model.embed_tokens(tokens), cache.length if cache else 0, None
        end = seen = start + tokens.shape[1]
        if cache:  # shapes stay the same for 64 tokens, which compilers and CUDA graphs want
            cache.length, seen = end, min(end + -end % 64, cache.data.shape[4])
        column = torch.arange(seen, device=x.device)
        query, first = column[start:end, None], 0 if pad is None else pad[:, None, None, None]
        positions = query.T if pad is None else (query.T - pad[:, None]).clamp(min=0)  # [1 or B, T]
        if start or pad is not None:
            # [..., T, columns]; a query always sees itself, since one that sees nothing gives NaN
            mask = (column <= query) & (column >= first) | (column == query)
        rope = [table.to(x.dtype) for table in rope_table(self.config, positions)]
        for i, block in enumerate(self.model.layers):
            past = cache and (cache.data[:, i, :, :, :seen], query[:, 0])
            x = self.run(block, x, rope, mask, past)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> [..., V], for only those rows that are supervised or sampled."""
        weight, rows = getattr(self, "lm_head", self.model.embed_tokens).weight, hidden[..., 0]
        if rows.numel() > 16 or (weight.device.type, weight.dtype) != ("cpu", torch.float32):
            return F.linear(hidden, weight)
        # MKL takes few rows through a wide matrix at a third of memory's speed, in parts at all
        parts = weight.unflatten(0, (math.gcd(64, len(weight)), -1))
        x = hidden.reshape(-1, weight.shape[1]).T.expand(len(parts), -1, -1)
        return (parts @ x).flatten(0, 1).T.reshape(*rows.shape, -1)

    def generate(self, *args, **options) -> list[list[int]]:
        """generate(prompts, max_new_tokens, temperature=0.0, seed=None, ...): `sample`'s tokens."""
        return [ids for ids, _ in self.sample(*args, **options)]

    @torch.no_grad()
    def sample(self, prompts: list[list[int]], max_new_tokens: int, temperature: float = 0.0,
               seed: int | list | None = None, top_p: float = 1.0, vocab_size: int | None = None,
               ) -> list[tuple[list[int], list[float]]]:
        """(new tokens, the EOS included, their fp32 log-probabilities at temperature 1) of each
        prompt. Temperature 0 is greedy. A row draws from its own generator, seeded with (seed, row)
        or seed[row], whatever its neighbours. `vocab_size` cuts unused rows off the head."""
        check(prompts and all(prompts) and temperature >= 0 and 0 < top_p <= 1, "generate: "
              f"no prompts, an empty one among them, or {temperature=}, {top_p=} out of range")
        weight, B, longest = self.model.embed_tokens.weight, len(prompts), max(map(len, prompts))
        eos = torch.tensor(self.eos_token_ids, dtype=torch.long, device=weight.device)
        seeds = seed if isinstance(seed, list) else [seed if seed is None else (seed, row)
                                                     for row in range(B)]
        draws = torch.tensor(np.stack([np.random.default_rng(s).random(max_new_tokens)
                                       for s in seeds]), device=weight.device)  # [B, ...], [0, 1)
        pad = torch.tensor([longest - len(p) for p in prompts], device=weight.device)  # on the left
        tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=weight.device)
        cache = KVCache(self.config, B, longest + max_new_tokens, weight)
        out, logp, length, done = draws.long(), draws.float(), torch.zeros_like(pad), pad < 0
        rows = torch.arange(B, device=weight.device)  # the prompts that are still being answered
        for step in range(max_new_tokens):
            logits = self.logits(self(tokens, cache, pad)[:, -1])[:, :vocab_size].float()
            out[rows, step] = token = pick(logits, temperature, top_p, draws[rows, step, None])
            logp[rows, step] = logits.gather(-1, token[:, None])[:, 0] - logits.logsumexp(-1)
            length[rows] += ~done[rows]
            done[rows] |= torch.isin(token, eos)
            if weight.device.type == "cpu" or step % 16 == 0:  # asking a GPU makes it wait
                alive = ~done[rows]
                if not alive.any():
                    break
                if alive.sum() <= 0.75 * len(rows):  # answered prompts leave, many at a time
                    rows, token, pad = rows[alive], token[alive], pad[alive]
                    cache.data = cache.data[:, :, alive]
            tokens = token[:, None]
        return [(ids[:n], values[:n]) for ids, values, n
                in zip(out.tolist(), logp.tolist(), length.tolist(), strict=True)]

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, dtype: torch.dtype = torch.float32,
                        device: str | torch.device = "cpu") -> "Transformer":
        """Reads a Hugging Face folder or Hub repository; every tensor must be there and fit."""
        folder, state, file = fetch(path_or_repo), {}, "model.safetensors.index.json"
        with torch.device("meta"):
            network = cls(Config(read_json(folder / "config.json"), folder / "config.json"))
        try:
            files = read_json(folder / file)["weight_map"] if (folder / file).exists() else {
                "every tensor": "model.safetensors"}
            for file in sorted({*{**files}.values()}):  # mapped into memory, read where it is used
                state |= {name: tensor.to(device, dtype)
                          for name, tensor in load_file(folder / Path(file).name).items()
                          if not name.endswith("rotary_emb.inv_freq")}  # a constant in old files
            head, embedding = state.get("lm_head.weight"), state.get("model.embed_tokens.weight")
            if network.config.tie_word_embeddings and head is not None and head.equal(embedding):
                del state["lm_head.weight"]  # tied, and saved all the same
            network.load_state_dict(state, strict=True, assign=True)
        except (SafetensorError, OSError, RuntimeError, LookupError, TypeError) as error:
            raise BadInput(f"{folder}/{file}: missing, corrupt, truncated, or not what config.json "
                           f"says: {' '.join(str(error).split()):.300}") from error
        network.folder, options = folder, folder / "generation_config.json"
        network.generation = read_json(options) if options.exists() else {}
        eos = (network.config.raw | network.generation).get("eos_token_id")
        network.eos_token_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        check(all(type(i) is int for i in network.eos_token_ids), f"{folder}: eos_token_id = {eos}")
        return network

    def save_pretrained(self, folder: str | Path, max_shard_size: str | int = "5GB") -> None:
        """Writes config, weights, EOS ids and tokenizer files; moved here once all are whole."""
        dtype = str(self.model.embed_tokens.weight.dtype).removeprefix("torch.")
        config = {**self.config.raw, "dtype": dtype, "torch_dtype": dtype}  # its old name
        generation = {**self.generation, "eos_token_id": self.eos_token_ids}
        Path(folder).mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".saving-") as new:
            save_torch_state_dict(self.state_dict(), new, max_shard_size=max_shard_size)
            for file in [*self.folder.glob("tokenizer*.json"), *self.folder.glob("*.jinja")]:
                Path(new, file.name).write_bytes(file.read_bytes())
            for name, content in ("generation_config.json", generation), ("config.json", config):
                Path(new, name).write_text(json.dumps(content, indent=2) + "\n")
            Path(folder, "model.safetensors.index.json").unlink(missing_ok=True)
            for file in sorted(Path(new).iterdir(), key=lambda file: file.name == "config.json"):
                file.replace(Path(folder, file.name))


def pick(logits: Tensor, temperature: float, top_p: float, draw: Tensor) -> Tensor:
    """One token a row by inverting the cumulative distribution: [B, V], draw [B, 1] -> [B]."""
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits / temperature).softmax(-1).double(), None
    if top_p < 1:  # the fewest most likely tokens that hold top_p: the nucleus, arXiv 1904.09751
        p, order = p.sort(-1, descending=True)
        p = p.where(p.cumsum(-1) - p < top_p, 0.0)
    total = p.cumsum(-1)
    index = torch.searchsorted(total, draw * total[:, -1:], right=True).clamp(max=p.shape[-1] - 1)
    return (index if order is None else order.gather(-1, index))[:, 0]
