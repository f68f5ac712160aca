"""model.py against transformers: logits, generation, files. python -m pytest tests/test_model.py"""

import json
from functools import partial

import pytest
import torch
from conftest import DATA, FIXTURES, KINDS, make_hf
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoConfig, AutoModelForCausalLM

import model
from model import BadInput, Config, KVCache, Transformer, sample_token

TOKENS = torch.randint(0, 97, (3, 70), generator=torch.Generator().manual_seed(0))


def ours_and_theirs(tmp_path, kind, **changes):
    theirs = make_hf(tmp_path, kind, **changes)
    return Transformer.from_pretrained(tmp_path), theirs


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_equal_transformers(tmp_path, kind):
    """Guards every formula of the network: swapped norms, dropped biases, RoPE layout and scaling
    (70 positions, 16 in the original context), the order of grouped heads, tied heads."""
    ours, theirs = ours_and_theirs(tmp_path, kind)
    expected = theirs(TOKENS).logits
    assert expected.std() > 0.5  # a network whose logits are all alike would prove nothing
    assert (ours.logits(ours(TOKENS)) - expected).abs().max() < 1e-4


def test_gradients_equal_transformers(tmp_path):
    """Guards training through a tied head and grouped heads, where a wrong view detaches."""
    ours, theirs = ours_and_theirs(tmp_path, "qwen3")
    ours.logits(ours(TOKENS)).square().mean().backward()
    theirs(TOKENS).logits.square().mean().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_transformers(tmp_path, kind):
    """Guards positions and masks of left padding (lengths 1, 4, 9, 30) and the cache."""
    ours, theirs = ours_and_theirs(tmp_path, kind, eos_token_id=None)
    prompts = [TOKENS[0, :n].tolist() for n in (9, 1, 30, 4)]
    for prompt, answer in zip(prompts, ours.generate(prompts, 24), strict=True):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False,
                                   attention_mask=torch.ones(1, len(prompt)), pad_token_id=0)
        assert answer == expected[0, len(prompt):].tolist()


def test_single_file_wins_over_a_stale_index(tmp_path):
    """Guards old shards that are read in place of a newer single file: transformers reads that."""
    make_hf(tmp_path, "qwen2")
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()},
              tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}))
    ours, theirs = (kind.from_pretrained(tmp_path) for kind in (Transformer, AutoModelForCausalLM))
    for name, tensor in ours.state_dict().items():
        assert tensor.equal(weights[name]) and tensor.equal(theirs.state_dict()[name])


def test_no_memory_is_not_a_corrupt_file(tmp_path, monkeypatch):
    """Guards a full GPU that is reported as a broken download: the error is a RuntimeError, too."""
    make_hf(tmp_path, "qwen2")

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "to", full)
    with pytest.raises(torch.OutOfMemoryError):
        Transformer.from_pretrained(tmp_path)


def test_an_error_in_the_network_is_not_a_wrong_file(tmp_path, monkeypatch):
    """Guards a mistake in somebody's Block that is reported as a broken checkpoint, without the
    traceback that leads to it."""
    make_hf(tmp_path, "qwen2")

    def broken(self, config):
        self.width = config.hiden_size

    monkeypatch.setattr(model.Block, "__init__", broken)
    with pytest.raises(AttributeError, match="hiden_size"):
        Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_heads_equal_repeated_ones(tmp_path, dtype):
    """Guards heads that read the keys of another group, in decoding and in prompts: the same model
    with each key head written out H / K times gives the same answers."""
    make_hf(tmp_path / "grouped", "qwen2", eos_token_id=None)
    grouped = Transformer.from_pretrained(tmp_path / "grouped", dtype)
    state, Dh = grouped.state_dict(), grouped.config.head_dim
    for name, tensor in state.items():
        if "k_proj" in name or "v_proj" in name:
            state[name] = tensor.unflatten(0, (-1, Dh)).repeat_interleave(2, 0).flatten(0, 1)
    full = Transformer(Config({**grouped.config.raw, "num_key_value_heads": 4}))
    full.load_state_dict(state, assign=True)
    prompts = [TOKENS[0, :n].tolist() for n in (9, 1, 30, 4)]
    hidden = [model(TOKENS) for model in (grouped, full)]
    torch.testing.assert_close(hidden[0], hidden[1], rtol=1e-5, atol=1e-5)
    assert grouped.generate(prompts, 24) == full.generate(prompts, 24)


def test_several_eos_ids_stop_each_row(tmp_path):
    """Guards stopping on the first EOS only, dropping the EOS, and mixing rows up when ended ones
    leave the batch: with 40 rows and 20 EOS ids, they leave at many different steps."""
    ours, _ = ours_and_theirs(tmp_path, "llama", eos_token_id=None)
    prompts = [TOKENS[i % 3, i:i + 5 + i % 7].tolist() for i in range(40)]
    free = ours.generate(prompts, 30)
    ours.eos_token_ids = list(range(20))
    stopped = ours.generate(prompts, 30)
    expected = [ids[:next((i + 1 for i, t in enumerate(ids) if t < 20), 30)] for ids in free]
    assert stopped == expected
    assert len({len(ids) for ids in expected}) > 8


@torch.no_grad()
def test_cache_equals_full_forward(tmp_path):
    """Guards the offset of cached positions and the padding of prompts, which must stay unseen:
    prompts of 40, 7 and 1 tokens, then single tokens."""
    ours, _ = ours_and_theirs(tmp_path, "llama3 rope, new")
    lengths = torch.tensor([40, 7, 1])
    full, cache = ours(TOKENS), KVCache(ours.config, lengths.clone(), 70, torch.float32)
    hidden = ours(TOKENS[:, :40], cache)
    torch.testing.assert_close(hidden, full[:, :40], rtol=1e-4, atol=1e-4)
    for step in range(30):
        columns = (lengths + step)[:, None]
        hidden = ours(TOKENS.gather(1, columns), cache)
        expected = full.take_along_dim(columns[:, :, None], 1)
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_decoding_keeps_its_shapes(tmp_path):
    """Guards static shapes: a graph for the prompts and one for each 64 columns (64, 128, 192, and
    200, all there are), not one for each token. Columns of the future must stay hidden: the same
    tokens."""
    ours, _ = ours_and_theirs(tmp_path, "qwen3")
    graphs, prompts = CompileCounterWithBackend("aot_eager"), [[5, 6, 7], [8] * 20]
    ours.eos_token_ids = []
    expected = ours.generate(prompts, 180, 1.0, seed=3)
    torch.compiler.reset()
    for block in ours.model.layers:
        block.compile(backend=graphs, dynamic=False)
    assert ours.generate(prompts, 180, 1.0, seed=3) == expected
    assert graphs.frame_count == 5


@pytest.mark.parametrize("kind", ["qwen2", "qwen2 untied"])
def test_logits_of_few_rows(tmp_path, kind):
    """Guards the head that is cut into parts for up to 16 rows: its order, rows lost or mixed,
    its gradient, and rows without a token; for a vocabulary that no power of two divides (97), and
    one that is 8 times 13 (104)."""
    for V in (97, 104):
        make_hf(tmp_path / f"{V}", kind, vocab_size=V)
        ours = Transformer.from_pretrained(tmp_path / f"{V}")
        rows = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
        plain = ours.logits(rows.repeat(4, 1, 1))[:2]  # 24 rows at once
        few = torch.stack([ours.logits(rows[:, t]) for t in range(3)], dim=1)
        one = torch.stack([ours.logits(row) for row in rows.flatten(0, 1)]).view(2, 3, V)
        (slope,) = torch.autograd.grad(plain.sin().sum(), rows)
        for found in (few, one):
            torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(torch.autograd.grad(found.sin().sum(), rows)[0], slope,
                                       rtol=1e-5, atol=1e-5)
        ours.vocab_size = 90  # of the tokenizer
        assert torch.equal(ours.logits(rows.repeat(4, 1, 1))[:2], plain[..., :90])
        assert torch.equal(ours.logits(rows[:, 0]), few[:, 0, :90])


def test_samples_follow_the_distribution(tmp_path):
    """Guards the inverse-CDF draw: an index off by one, a temperature that multiplies, and a token
    of probability 0 that is drawn since the others' fp32 probabilities sum to less than 1."""
    p = torch.tensor([[0.05, 0.0, 0.45, 0.2, 0.3]])
    draws = (torch.arange(20000, dtype=torch.double)[:, None] + 0.5) / 20000
    logits = p.log().expand(20000, 5)
    counts = torch.bincount(sample_token(logits, 1.0, draws), minlength=5) / 20000
    torch.testing.assert_close(counts[None], p, atol=2e-4, rtol=0)
    hot = (p.sqrt() / p.sqrt().sum())[0]
    counts = torch.bincount(sample_token(logits, 2.0, draws), minlength=5) / 20000
    torch.testing.assert_close(counts, hot, atol=2e-4, rtol=0)
    extremes = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.double)
    middle = torch.tensor([[-1e9, 0.0, -1e9]] * 2)
    assert sample_token(middle, 1.0, extremes).tolist() == [1, 1]
    wide = 3 * torch.randn(64, 129, generator=torch.Generator().manual_seed(0))
    wide[:, -1] = -1e9
    assert sample_token(wide, 1.0, extremes[1:].expand(64, 1)).max() < 128


def test_a_row_does_not_depend_on_its_neighbors(tmp_path):
    """Guards reproducible traces: the same seed gives the same answer in any batch; another seed
    gives another."""
    ours, _ = ours_and_theirs(tmp_path, "qwen2", eos_token_id=5)
    prompts = [TOKENS[0, :n].tolist() for n in (9, 4, 9, 30)]
    together = ours.generate(prompts, 40, temperature=1.0, seed=[10, 11, 12, 13])
    alone = [ours.generate([p], 40, temperature=1.0, seed=[s])[0]
             for p, s in zip(prompts, (10, 11, 12, 13), strict=True)]
    assert together == alone
    assert together[0] != together[2]
    assert ours.generate(prompts, 9, 1.0, seed=7) == ours.generate(prompts, 9, 1.0, seed=7)


@torch.no_grad()
def test_sampled_logprobs_are_raw(tmp_path):
    """Guards log-probabilities taken after temperature or at the wrong position, and rows of the
    head that have no token: they are neither sampled nor part of the softmax."""
    ours, _ = ours_and_theirs(tmp_path, "qwen3", eos_token_id=5)
    prompts = [TOKENS[0, :9].tolist(), TOKENS[1, :3].tolist()]
    head = ours.model.embed_tokens.weight
    ours.vocab_size = 90
    for prompt, (ids, logp) in zip(prompts, ours.sample(prompts, 20, 0.5, seed=1), strict=True):
        hidden = ours(torch.tensor([prompt + ids]))[0, len(prompt) - 1:-1]
        full = (hidden @ head[:90].T).log_softmax(-1)
        expected = full.gather(-1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logp), expected, rtol=1e-4, atol=1e-4)
        assert max(ids) < 90


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_generate_refuses(tmp_path, prompts):
    ours, _ = ours_and_theirs(tmp_path, "llama")
    with pytest.raises(BadInput, match="generate"):
        ours.generate(prompts, 2)


# ------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("kind", ["llama3 rope, old", "qwen2", "qwen2 untied", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_save_opens_in_transformers(tmp_path, kind, dtype):
    """Guards keys (a tied head is not saved, biases are), dtype and config on the way out."""
    make_hf(tmp_path / "a", kind)
    ours = Transformer.from_pretrained(tmp_path / "a", dtype)
    ours.save_pretrained(tmp_path / "b")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert theirs.dtype == dtype
    again = Transformer.from_pretrained(tmp_path / "b")  # fp32 on both sides: bf16 rounds apart
    assert (theirs.float()(TOKENS).logits - again.logits(again(TOKENS))).abs().max() < 1e-4
    before = load_file(tmp_path / "a" / "model.safetensors")
    after = load_file(tmp_path / "b" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].to(dtype), after[name]) for name in before)
    assert {tensor.dtype for tensor in after.values()} == {dtype}


@pytest.mark.parametrize("rope", [
    {"rope_type": "default", "rope_theta": 3.6e9},
    {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
     "high_freq_factor": 4.0, "original_max_position_embeddings": 16}])
def test_saved_rope_is_read_by_transformers_4(tmp_path, rope):
    """Guards a student of transformers 5 that version 4 opens with theta 10,000 and no stretching:
    the older fields must be there, too, and give our logits."""
    make_hf(tmp_path / "a", "llama")
    file = tmp_path / "a/config.json"
    raw = {key: value for key, value in json.loads(file.read_text()).items() if "rope" not in key}
    file.write_text(json.dumps({**raw, "rope_parameters": rope}))
    ours = Transformer.from_pretrained(tmp_path / "a")
    ours.save_pretrained(tmp_path / "b")
    saved = json.loads((tmp_path / "b/config.json").read_text())
    del saved["rope_parameters"]
    (tmp_path / "b/config.json").write_text(json.dumps(saved))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert theirs.config.rope_parameters["rope_theta"] == rope["rope_theta"]
    assert (theirs(TOKENS).logits - ours.logits(ours(TOKENS))).abs().max() < 1e-4


@torch.no_grad()
def test_shards(tmp_path, monkeypatch):
    """Guards index files, ours and theirs."""
    make_hf(tmp_path / "a", "qwen2 untied")
    ours = Transformer.from_pretrained(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(model, "save_torch_state_dict",
                      partial(model.save_torch_state_dict, max_shard_size="20KB"))
        ours.save_pretrained(tmp_path / "b")
    assert len(list((tmp_path / "b").glob("model-0000*.safetensors"))) > 2
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    theirs.save_pretrained(tmp_path / "c", max_shard_size="30KB")
    again = Transformer.from_pretrained(tmp_path / "c")
    assert torch.equal(again(TOKENS), ours(TOKENS))


def test_eos_of_generation_config(tmp_path):
    """Guards chat models that list more EOS ids there than in config.json (Qwen2.5: two)."""
    make_hf(tmp_path, "llama")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 7], "top_p": 0.8}')
    ours = Transformer.from_pretrained(tmp_path)
    assert ours.eos_token_ids == [3, 7]
    ours.save_pretrained(tmp_path / "b")
    saved = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert saved == {"eos_token_id": [3, 7]}
    assert Transformer.from_pretrained(tmp_path / "b").eos_token_ids == [3, 7]


def test_old_constants_and_saved_tied_heads_load(tmp_path):
    """Guards Llama-2 files with inv_freq and tied models that were saved with their head."""
    make_hf(tmp_path, "qwen2")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert Transformer.from_pretrained(tmp_path).config.tie_word_embeddings


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_defaults_are_those_of_transformers(model_type):
    """Guards keys that a config may omit (Llama-2 has no rope_theta, Qwen2 no head_dim)."""
    raw = {"model_type": model_type, "vocab_size": 97, "hidden_size": 64, "intermediate_size": 48,
           "num_hidden_layers": 1, "num_attention_heads": 4}
    if model_type != "llama":
        raw["num_key_value_heads"] = 2
    ours, theirs = Config(raw), AutoConfig.for_model(**raw)
    for key in ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 16)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


def test_real_configs():
    """Each of sixty real config.json files (or five, of the fixtures) is refused by name or has
    transformers' parameters."""
    supported, refused = [], []
    for file in sorted((DATA / "configs").glob("*.json")):
        if "generation_config" in file.name:
            continue
        raw = json.loads(file.read_text())
        try:
            config = Config(raw, file.name)
        except BadInput as error:
            refused.append(str(error))
            continue
        supported.append(file.name)
        config.num_hidden_layers = 1
        theirs = AutoConfig.for_model(**raw)
        theirs.num_hidden_layers = 1
        with torch.device("meta"):
            ours, theirs = Transformer(config), AutoModelForCausalLM.from_config(theirs)
        shapes = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
        assert {name: tuple(p.shape) for name, p in ours.named_parameters()} == shapes, file.name
        assert config.rms_norm_eps == theirs.config.rms_norm_eps
        assert config.rope_theta == theirs.config.rope_parameters["rope_theta"]
        assert config.rope_type == theirs.config.rope_parameters["rope_type"]
    expected = (5, 0) if DATA == FIXTURES else (49, 12)
    assert (len(supported), len(refused)) == expected, refused
    assert all(" = " in message or "is not implemented" in message for message in refused)
