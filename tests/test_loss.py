"""loss.py: every formula against a naive float64 one, value and gradient; the weight's facts."""

import math

import pytest
import torch

import loss

N, V = 7, 11


def logits(seed, scale=3.0):
    return torch.randn(N, V, generator=torch.Generator().manual_seed(seed)) * scale


Y = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(9))


def naive(name, q_logits, y, p_logits, beta):
    """The formulas of the paper, one probability at a time, in float64."""
    rows = []
    for zq, zp, token in zip(q_logits, p_logits, y.tolist(), strict=True):
        q, p = zq.softmax(-1), zp.softmax(-1)
        total = 0
        for v in range(V):
            a = (p[v] / (p[v] + q[v])).detach()
            m = beta * p[v] + (1 - beta) * q[v]
            total = total + {
                "sft": -(v == token) * q[v].log(),
                "kl": p[v] * (p[v] / q[v]).log(),
                "rkl": q[v] * (q[v] / p[v]).log(),
                "todi": a * p[v] * (p[v] / q[v]).log() + (1 - a) * q[v] * (q[v] / p[v]).log(),
                "gkd": beta * p[v] * (p[v] / m).log() + (1 - beta) * q[v] * (q[v] / m).log()}[name]
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("objective", loss.OBJECTIVES)
@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_value_and_gradient_equal_naive(objective, beta):
    """Guards every formula and, with p and q far apart and beta away from 1/2, p and q exchanged;
    and that the weight multiplies each loss and has no gradient of its own. DFT's weight is q(y),
    and it is given no p at all."""
    name = {"dft": "sft", "discord": "sft"}.get(objective, objective.removeprefix("discord-"))
    p, q = logits(1), logits(2).requires_grad_()
    p_logp = None if objective == "dft" else p.log_softmax(-1)[range(N), Y]
    got, weight = loss.token_losses(objective, q, Y, None if name == "sft" else p, p_logp,
                                    tau=0.6, beta=beta)
    (weight * got).sum().backward()
    q64, p64 = logits(2).double().requires_grad_(), p.double()
    expected = naive(name, q64, Y, p64, beta)
    w = torch.ones(N)
    if objective == "dft":
        w = q64.softmax(-1)[range(N), Y].detach()
    elif objective.startswith("discord"):
        ratio = (q64.softmax(-1) / p64.softmax(-1))[range(N), Y].detach()
        w = 2 / (1 + ratio ** (-1 / 0.6))
        assert w.min() < 0.2 and w.max() > 1.5
    (w * expected).sum().backward()
    torch.testing.assert_close(weight, w.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(q.grad, q64.grad.float(), rtol=1e-4, atol=1e-5)
    assert not weight.requires_grad


def test_generalized_jsd_equals_trl():
    """Guards TRL's convention of beta (m = beta p + (1 - beta) q), the ends included."""
    from trl.experimental.gkd import GKDTrainer
    p, q = logits(1), logits(2)
    for beta in (0.0, 0.1, 0.5, 0.9, 1.0):
        theirs = GKDTrainer.generalized_jsd_loss(q[None], p[None], beta=beta, reduction="none")
        torch.testing.assert_close(loss.gkd(q, p, beta), theirs.reshape(N, V).sum(-1))


def test_dft_in_numbers():
    """Guards DFT with p in it, or with a gradient through its weight: for q(y) = 1/4 of three, the
    loss is log(4) / 4, and its gradient a quarter of that of SFT."""
    q = torch.tensor([[1.0, 2.0, 1.0]]).log().requires_grad_()
    got, w = loss.token_losses("dft", q, torch.tensor([0]))
    (w * got).sum().backward()
    assert not loss.dft_weight(q.log_softmax(-1)[:, 0]).requires_grad
    assert w.tolist() == [0.25] and (w * got).item() == pytest.approx(math.log(4) / 4)
    torch.testing.assert_close(q.grad, torch.tensor([[-0.75, 0.5, 0.25]]) / 4)


def test_divergences_vanish_at_the_teacher():
    """Guards a cross-entropy taken for a KL, and bf16 arithmetic that makes a KL negative."""
    for dtype in (torch.float32, torch.bfloat16):
        z = logits(3, scale=8).to(dtype)
        for f in (loss.kl, loss.rkl, loss.todi, loss.gkd):
            q = z.clone().requires_grad_()
            value = f(q, z)
            value.sum().backward()
            assert value.dtype == torch.float32 and value.abs().max() < 1e-6
            assert q.grad.abs().max() < 1e-6


def test_todi_is_jeffreys_in_value_only():
    p, q = logits(1), logits(2).requires_grad_()
    both = loss.kl(q, p) + loss.rkl(q, p)
    torch.testing.assert_close(loss.todi(q, p), both)
    grads = [torch.autograd.grad(value.sum(), q)[0] for value in (loss.todi(q, p), both)]
    assert (grads[0] - grads[1]).abs().max() > 0.05


def test_gkd_at_its_ends():
    """Guards the special cases: by definition they are kl and rkl, by formula the value goes to 0,
    as beta KL(p|q) and as (1 - beta) KL(q|p)."""
    p, q = logits(1), logits(2)
    assert torch.equal(loss.gkd(q, p, 0.0), loss.kl(q, p))
    assert torch.equal(loss.gkd(q, p, 1.0), loss.rkl(q, p))
    small = 1e-3
    p, q = logits(1, 1.0).double(), logits(2, 1.0).double()
    torch.testing.assert_close(loss.gkd(q, p, small) / small, loss.kl(q, p), rtol=0.02, atol=0)
    torch.testing.assert_close(loss.gkd(q, p, 1 - small) / small, loss.rkl(q, p), rtol=0.02, atol=0)


# --------------------------------------------------------------- facts of the weight (method, §2)


def test_fact_1_agreement_is_sft():
    """q = p on the data: weights are 1, loss and gradient are exactly those of SFT."""
    q = logits(2).requires_grad_()
    nll = loss.sft(q, Y)
    got, weight = loss.token_losses("discord", q, Y, p_logp=-nll.detach())
    assert weight.tolist() == [1.0] * N and torch.equal(got, nll)
    grads = [torch.autograd.grad(value.sum(), q)[0] for value in (weight * got, loss.sft(q, Y))]
    assert torch.equal(*grads)


def test_fact_2_infinite_tau_is_sft():
    q = logits(2)
    for tau in (1e9, math.inf):
        got, weight = loss.token_losses("discord", q, Y, p_logp=logits(1)[:, 0].abs().neg(),
                                        tau=tau)
        torch.testing.assert_close(weight, torch.ones(N))
        torch.testing.assert_close(got, loss.sft(q, Y))


def test_tau_1_is_the_posterior():
    """2q / (p + q): above 1 where the student is surer of the token than the teacher."""
    q, p = torch.tensor([0.9, 0.1, 0.5]), torch.tensor([0.1, 0.9, 0.5])
    w = loss.discord_weight(q.log().requires_grad_(), p.log().requires_grad_(), 1.0)
    torch.testing.assert_close(w, 2 * q / (p + q))
    assert not w.requires_grad  # fact 3: no gradient flows through the weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fact_4_bounds(dtype):
    """Guards weights that round to 0 or 2, NaN and inf, for any finite log-probabilities."""
    values = torch.tensor([0.0, -1e-6, -0.3, -5.0, -88.0, -200.0, -1e4], dtype=dtype)
    q_logp, p_logp = torch.meshgrid(values, values, indexing="ij")
    for tau in (0.05, 0.5, 1.0, 30.0):
        weight = loss.discord_weight(q_logp, p_logp, tau)
        assert ((weight > 0) & (weight < 2)).all()
        assert torch.equal(weight.diagonal(), torch.ones(7, dtype=weight.dtype))
        exact = 2 * torch.sigmoid((q_logp - p_logp).double() / tau)
        assert (weight - exact).abs().max() < (1e-6 if dtype != torch.bfloat16 else 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [8, 152064])
def test_extreme_logits_are_right(size, dtype):
    """p or q of exactly 0 and 1, log-probabilities of -1e4, a vocabulary of 8 and the largest of
    Qwen2.5: values, weights and gradients are those of float64, and finite, for every objective."""
    q = torch.full((5, size), -1e4)
    p, y = q.clone(), torch.tensor([1, 0, 2, 3, size - 1])
    q[0, 0] = p[0, 1] = q[1, 1] = p[1, 1] = 0.0  # one wrong and certain; one certain together
    q[2, :3], p[2, :3] = torch.tensor([50.0, 0.0, -50.0]), torch.tensor([-50.0, 0.0, 50.0])
    noise = torch.randn(2, 2, size, generator=torch.Generator().manual_seed(0)) * 4
    q[3:], p[3:] = noise[0], noise[1]
    for objective, (token_loss, _) in loss.OBJECTIVES.items():
        found = []
        for kind in (dtype, torch.float64):
            student = q.to(dtype).to(kind).requires_grad_()
            teacher = p.to(dtype).to(kind)
            got, weight = loss.token_losses(
                objective, student, y, None if token_loss is loss.sft else teacher,
                -loss.sft(teacher, y))
            grad, = torch.autograd.grad((weight * got).sum(), student)
            found.append([x.detach().double() for x in (got, weight, grad)])
        for ours, exact, at_most in zip(*found, (1e-4, 1e-6, 1e-2 if dtype == torch.bfloat16 else
                                                 1e-4), strict=True):
            assert ours.isfinite().all(), objective
            assert ((ours - exact).abs() / (1 + exact.abs())).max() < at_most, objective


def tabular(start, tau, steps=2000, teacher=(0.5, 0.3, 0.2)):
    """Gradient descent of the expected DisCorD loss in a table of three probabilities."""
    p, z = torch.tensor(teacher).double(), torch.tensor(start).double().log()
    for _ in range(steps):
        q_logp = z.log_softmax(-1)
        mass = p * loss.discord_weight(q_logp, p.log(), tau)
        z = z + mass - mass.sum() * q_logp.exp()  # minus the gradient of -sum mass log q
    return z.softmax(-1)


@pytest.mark.parametrize("start, tau, end", [
    ((0.4, 0.35, 0.25), 4.0, (0.5, 0.3, 0.2)), ((0.4, 0.35, 0.25), 1.0, (0.5, 0.3, 0.2)),
    ((0.4, 0.35, 0.25), 0.7, (0.5, 0.3, 0.2)), ((0.4, 0.35, 0.25), 0.55, (0.5, 0.3, 0.2)),
    ((0.4, 0.35, 0.25), 0.45, (0.0007, 0.6, 0.4)), ((0.4, 0.35, 0.25), 0.3, (0.0007, 0.6, 0.4)),
    ((0.9, 0.09, 0.01), 1.0, (0.5, 0.3, 0.2)), ((0.9, 0.09, 0.01), 0.7, (0.624, 0.375, 0.001)),
    ((0.9, 0.09, 0.01), 0.55, (1.0, 0.0, 0.0))])
def test_fact_5_fixed_point(start, tau, end):
    """The teacher attracts the student when tau > 1/2 and repels it below: inverting tau, or p and
    q, moves these end points."""
    torch.testing.assert_close(tabular(start, tau), torch.tensor(end).double(), atol=2e-3, rtol=0)


def test_fact_5_contraction():
    """Near the teacher a round multiplies log-ratios by 1 / (2 tau): the exact update q <- p w /
    sum(p w) from 1 % away."""
    p = torch.tensor([0.5, 0.3, 0.2]).double()
    for tau in (0.3, 0.5, 0.7, 2.0):
        r = torch.tensor([0.01, -0.01, -0.01]).double()
        q = p * r.exp() / (p * r.exp()).sum()
        r = (q / p).log()
        new = p * loss.discord_weight(q.log(), p.log(), tau)
        ratio = (new / new.sum() / p).log() / r
        expected = torch.full((3,), 1 / (2 * tau)).double()
        torch.testing.assert_close(ratio, expected, rtol=0.02, atol=0)


def test_fact_6_dead_token():
    """A token that the student gives almost nothing is not learned, at tau = 1 either."""
    end = tabular((0.9, 0.0999, 0.0001), 1.0, steps=200)
    expected = torch.tensor([0.625, 0.375, 0.0002]).double()
    torch.testing.assert_close(end, expected, atol=2e-3, rtol=0)


def test_names():
    """Guards an objective that exists without its DisCorD form, or twice."""
    assert [*loss.OBJECTIVES] == [
        "sft", "dft", "discord", "kl", "rkl", "todi", "gkd", "discord-kl", "discord-rkl",
        "discord-todi", "discord-gkd"]
    assert loss.TAU == 1  # w = 2q / (p + q)
