"""The objectives of offline distillation, on supervised rows only: plain functions of tensors.

Teacher p, student q. A row is one position of a response: its logits [V] and the token y that the
teacher wrote there. Everything is computed in fp32 at temperature 1, whatever comes in.

    sft      -log q(y)                                            what DisCorD corrects
    kl       sum_v p (log p - log q)                              forward: covers the teacher
    rkl      sum_v q (log q - log p)                              reverse: seeks its modes
    todi     sum_v a p (log p - log q) + (1 - a) q (log q - log p),
             a = sigmoid(log p - log q) without gradient          arXiv 2505.16297
    gkd      b KL(p|m) + (1 - b) KL(q|m),  m = b p + (1 - b) q    arXiv 2306.13649, eq. 1
    discord  w * sft,  discord-kl  w * kl,  and so on             arXiv 2605.14071

    w = 2 sigmoid((log q(y) - log p(y)) / tau)     without gradient; 1 where q and p agree

The DisCorD weight is the importance ratio q/p of "the student would have written this token" to
"the teacher wrote it", made bounded and local: the product of the ratios over a response is exact
and useless, it explodes or vanishes with length. At tau = 1, w = 2q / (p + q). It needs one number
of the teacher, log p(y), stored with the trace; kl, rkl, todi and gkd need the whole of p.
The factor 2, dividing by the number of tokens (not by the sum of w) and the default tau are ours.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

TAU = 0.7


def fp32(x: Tensor) -> Tensor:
    """At least fp32: in bf16 a log-probability is wrong by up to 0.2 nats, and so is the ratio."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def log_softmaxes(q_logits: Tensor, p_logits: Tensor) -> tuple[Tensor, Tensor]:
    return fp32(q_logits).log_softmax(-1), fp32(p_logits).log_softmax(-1)


def sft(q_logits: Tensor, y: Tensor) -> Tensor:
    """-log q(y): logits [N, V], tokens [N] -> [N]."""
    return F.cross_entropy(fp32(q_logits), y, reduction="none")


def kl(q_logits: Tensor, p_logits: Tensor) -> Tensor:
    """Forward KL(p|q): two [N, V] -> [N]. Zero where they agree, unlike a cross-entropy."""
    log_q, log_p = log_softmaxes(q_logits, p_logits)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def rkl(q_logits: Tensor, p_logits: Tensor) -> Tensor:
    """Reverse KL(q|p): two [N, V] -> [N]."""
    return kl(p_logits, q_logits)


def todi(q_logits: Tensor, p_logits: Tensor) -> Tensor:
    """Forward KL where the teacher gives an entry of the vocabulary more, reverse where the student
    does: two [N, V] -> [N]. The value is exactly kl + rkl, only the gradient differs."""
    log_q, log_p = log_softmaxes(q_logits, p_logits)
    ratio = log_p - log_q
    alpha = ratio.sigmoid().detach()
    return ((alpha * log_p.exp() - (1 - alpha) * log_q.exp()) * ratio).sum(-1)


def gkd(q_logits: Tensor, p_logits: Tensor, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence: two [N, V] -> [N]. beta = 0 is kl and 1 is rkl by
    definition. The formula tends to 0 towards both ends: beta is a learning rate, too."""
    if beta in (0, 1):
        return rkl(q_logits, p_logits) if beta else kl(q_logits, p_logits)
    log_q, log_p = log_softmaxes(q_logits, p_logits)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    to_p, to_q = log_p.exp() * (log_p - log_m), log_q.exp() * (log_q - log_m)
    return (beta * to_p + (1 - beta) * to_q).sum(-1)


def discord_weight(q_logp: Tensor, p_logp: Tensor, tau: float = TAU) -> Tensor:
    """w = 2 sigmoid((log q(y) - log p(y)) / tau): two [N] -> [N], without gradient, 0 < w < 2.

    tau -> infinity is sft. In a table of probabilities the teacher is a fixed point for every tau,
    stable when tau > 1/2: near q = p a round multiplies log-ratios by 1 / (2 tau). Below, the
    student leaves for the modes it already prefers. A token with q(y) = 0 is never learned."""
    ratio = fp32(q_logp.detach()) - fp32(p_logp.detach())
    # The clamp keeps fp32 from rounding w to 0 or 2; it moves no w by more than 3e-7.
    return 2 * (ratio / tau).clamp(-80, 16).sigmoid()


# What each objective computes from (q_logits, y, p_logits, beta). Add yours here.
OBJECTIVES: dict[str, Callable[[Tensor, Tensor, Tensor | None, float], Tensor]] = {
    "sft": lambda q, y, p, beta: sft(q, y),
    "kl": lambda q, y, p, beta: kl(q, p),
    "rkl": lambda q, y, p, beta: rkl(q, p),
    "todi": lambda q, y, p, beta: todi(q, p),
    "gkd": lambda q, y, p, beta: gkd(q, p, beta),
}
NAMES = [*OBJECTIVES, "discord", *(f"discord-{name}" for name in OBJECTIVES if name != "sft")]


def split_name(objective: str) -> tuple[str, bool]:
    """"discord-kl" -> ("kl", True): the token loss, and whether the weight multiplies it."""
    return objective.removeprefix("discord").removeprefix("-") or "sft", "discord" in objective


def token_losses(objective: str, q_logits: Tensor, y: Tensor, p_logits: Tensor | None = None,
                 p_logp: Tensor | None = None, tau: float = TAU, beta: float = 0.5,
                 ) -> tuple[Tensor, Tensor]:
    """N rows -> (loss [N], w [N] without gradient, 1 where the objective has no weight).

    q_logits, p_logits [N, V]; y [N]; p_logp [N] is the stored log p(y), taken from p_logits if that
    is given. The objective is sum(w * loss) / N over the supervised tokens of a *whole* optimizer
    step: a mean of micro-batch means would depend on how the step is cut."""
    name, weighted = split_name(objective)
    losses = OBJECTIVES[name](q_logits, y, p_logits, beta)
    if not weighted:
        return losses, torch.ones_like(losses)
    with torch.no_grad():
        q_logp = -(losses if name == "sft" else sft(q_logits, y))
        p_logp = p_logp if p_logits is None else -sft(p_logits, y)
        return losses, discord_weight(q_logp, p_logp, tau)
