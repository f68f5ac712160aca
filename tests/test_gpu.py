"""What can be checked of a GPU without one: the meta device stands for it (it has no numbers, so
an operation that mixes devices, or that waits for a number, fails), and a CUDA graph is played."""

import contextlib
from functools import partial

import numpy as np
import pytest
import torch
from conftest import make_hf, options
from torch.overrides import TorchFunctionMode

import data
import evaluate
import train
from model import Transformer, decode_with_cuda_graph


class Host(TorchFunctionMode):
    """Answers what the host asks the device, and counts it: each question makes it wait."""
    questions = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        known = {torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.__bool__, torch.Tensor.item}
        if func not in known or args[0].device.type != "meta":
            return func(*args, **(kwargs or {}))
        self.questions += 1
        if func is torch.Tensor.__bool__:
            return self.questions % 2 == 1  # "is a row alive?" yes. "are many done?" no
        ones = torch.ones(args[0].shape, dtype=args[0].dtype)
        return ones if func is torch.Tensor.cpu else ones.tolist()


@pytest.fixture
def device(monkeypatch) -> str:
    """The meta device in the place of a GPU."""
    load = data.load
    monkeypatch.setattr(data, "load", lambda path, dtype="float32", device="cpu": (
        load(path, dtype)[0].to(device), load(path)[1]))
    monkeypatch.setitem(train.CHUNK, "meta", 5)
    monkeypatch.setattr(train, "load_file", lambda file, device: {  # AdamW without fused=True
        name: tensor if name.endswith(" step") else tensor.to(device)  # counts on the host
        for name, tensor in train_load_file(file).items()})
    monkeypatch.setattr(train, "save_checkpoint", lambda *_: None)
    monkeypatch.setattr(Transformer, "save_pretrained", lambda *_: None)
    monkeypatch.setattr(torch.optim, "AdamW", partial(unfused, torch.optim.AdamW))
    return "meta"


train_load_file = train.load_file


def unfused(kind, *args, fused, **kwargs):
    return kind(*args, **kwargs)


@pytest.mark.parametrize("resumed, more", [
    (False, []), (True, ["--recompute", "--dtype", "bfloat16"]),
    (False, ["--objective", "discord-kl", "--teacher"])])
def test_a_step_never_waits(toy_model, traces, tmp_path, monkeypatch, request, resumed, more):
    """Guards tensors on mixed devices, in a new run and a resumed one, and a question of the host
    to the GPU within a step: one wait a log line, 4 or (after step 10) 1 in 12 steps."""
    more = [*more, str(toy_model)] if more[-1:] == ["--teacher"] else more
    args = options(toy_model, traces, tmp_path / "run", *more)
    args.resume = resumed
    if resumed:
        args.save_every = 10
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            rate = train.learning_rate
            patch.setattr(train, "learning_rate", lambda step, args: rate(step, args) if step < 10
                          else (_ for _ in ()).throw(KeyboardInterrupt))
            train.train(args)
    args.device = request.getfixturevalue("device")
    with Host() as host:
        train.train(args)
    lines = [line["step"] for _, line in data.read_jsonl(tmp_path / "run" / "log.jsonl")]
    assert lines == ([3, 6, 9, 10, 12] if resumed else [3, 5, 6, 9, 10, 12])
    assert host.questions == (1 if resumed else 6)


def test_sampling_scoring_exposure_stay_on_the_device(toy_model, device, tmp_path):
    """Guards a mask, a cache, a draw or an index that is made on the CPU."""
    model, tokenizer = data.load(toy_model, device=device)
    prompts = [tokenizer.encode("<user> 1 a+4"), tokenizer.encode("<user> 1 a+4 b-2 c+3")]
    for temperature in (0.0, 1.0):
        with Host() as host:
            assert len(model.sample(prompts, 40, temperature, seed=0)) == 2
        assert host.questions == 3 * 2 + 3  # at the steps 0, 16 and 32; three results at the end
    with Host() as host:
        examples = [data.Example(np.arange(9), 3), data.Example(np.arange(5), 2)]
        assert [len(logp) for logp in data.response_logp(model, examples)] == [6, 3]
        assert host.questions == 1
    args = options(toy_model, "t", tmp_path)
    args.max_new_tokens, args.device = 6, device
    with Host():
        found = evaluate.kl_along_samples(model, model, model, prompts, args)
    assert found.shape == (2, 6)


class PlayedGraph:
    """Stands for torch.cuda.CUDAGraph: a recording computes nothing, a replay does."""
    def replay(self) -> None:
        model, tokens, cache = self.step
        used = cache.used
        self.out.copy_(model(tokens, cache))
        cache.used = used


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cuda_graph(tmp_path, monkeypatch, temperature):
    """Guards a replay with the tokens, lengths or columns of another step: rows leave, and the
    columns grow beyond 64 and 128."""
    make_hf(tmp_path, "qwen2")
    model, recorded, forward = Transformer.from_pretrained(tmp_path), [], Transformer.forward
    model.eos_token_ids = [3, 4]

    def record(self, tokens, cache=None):
        if not recorded or hasattr(recorded[-1], "step"):
            return forward(self, tokens, cache)
        lengths, keys = cache.lengths.clone(), cache.data.clone()
        graph, out = recorded[-1], forward(self, tokens, cache)
        cache.lengths.copy_(lengths)
        cache.data.copy_(keys)
        graph.step, graph.out = (self, tokens, cache), out.fill_(float("nan"))
        return out

    prompts = [[5 + i] * n for i, n in enumerate((3, 50, 62, 17, 1))]
    expected = model.sample(prompts, 150, temperature, seed=1)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PlayedGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext(
        recorded.append(graph)))
    monkeypatch.setattr(Transformer, "forward", record)
    model.decode = decode_with_cuda_graph
    found = model.sample(prompts, 150, temperature, seed=1)
    assert [ids for ids, _ in found] == [ids for ids, _ in expected]
    assert len({len(ids) for ids, _ in expected}) > 1 and len(recorded) > 3
