"""The objectives of offline distillation, as plain functions of tensors.

Teacher p, student q. A row is the position of one response token: its logits [V], and the
token y that the teacher wrote there. All math is in fp32 at temperature 1.

    sft      -log q(y)                                            plain imitation
    kl       sum_v p (log p - log q)                              forward KL, covers p
    rkl      sum_v q (log q - log p)                              reverse KL, seeks modes
    todi     sum_v a p (log p - log q) + (1 - a) q (log q - log p),
             a = sigmoid(log p - log q), no gradient              arXiv 2505.16297
    gkd      b KL(p|m) + (1 - b) KL(q|m),  m = b p + (1 - b) q    arXiv 2306.13649, eq. 1
    dft      w * sft,  w = q(y), no gradient                      arXiv 2508.05629
    discord  w * sft,  discord-kl  w * kl,  and so on             arXiv 2605.14071
             w = 2 sigmoid((log q(y) - log p(y)) / tau), no gradient; 1 if q = p

DisCorD wants the loss on the student's own text but only has the teacher's. The exact
correction is the product of q/p over a whole response, which explodes or vanishes with
length. DisCorD keeps the ratio of each token and bounds it: at tau = 1, w = 2q / (p + q).
It needs one stored number per token, log p(y); sft and dft need none, the others all of p.

Ours, not the paper's (we had its abstract and summaries, not its full text):
1. The factor 2, so that w = 1 where student and teacher agree.
2. The loss is divided by the number of tokens, not by the sum of w.
3. The default tau = 1, which gives the simplest formula.
4. In train.backward, the end of turn has w = 1. A base model hardly ever writes it, so the
   formula gives it a weight near 0, and the student would learn to stop late or never.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

TAU = 1.0

def fp32(x: Tensor) -> Tensor:
    """At least fp32. bf16 shifts a log q of -16 to -32 by up to 0.06, and so q/p by 6 %."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

def log_softmaxes(q_logits: Tensor, p_logits: Tensor) -> tuple[Tensor, Tensor]:
    return fp32(q_logits).log_softmax(-1), fp32(p_logits).log_softmax(-1)

def sft(q_logits: Tensor, y: Tensor) -> Tensor:
    """-log q(y). Logits [N, V], tokens [N] -> [N]."""
    return F.cross_entropy(fp32(q_logits), y, reduction="none")

def kl(q_logits: Tensor, p_logits: Tensor) -> Tensor:
    """Forward KL(p|q). Two [N, V] -> [N]. Zero where q = p, unlike cross-entropy."""
    log_q, log_p = log_softmaxes(q_logits, p_logits)
    return (log_p.exp() * (log_p - log_q)).sum(-1)

def rkl(q_logits: Tensor, p_logits: Tensor) -> Tensor:
    """Reverse KL(q|p). Two [N, V] -> [N]."""
    return kl(p_logits, q_logits)

def todi(q_logits: Tensor, p_logits: Tensor) -> Tensor:
    """Forward KL with the share a = p / (p + q), reverse KL with 1 - a (arXiv 2505.16297).

    Two [N, V] -> [N]. The value equals kl + rkl exactly; only the gradient differs."""
    log_q, log_p = log_softmaxes(q_logits, p_logits)
    log_ratio = log_p - log_q
    alpha = log_ratio.sigmoid().detach()
    return ((alpha * log_p.exp() - (1 - alpha) * log_q.exp()) * log_ratio).sum(-1)

def gkd(q_logits: Tensor, p_logits: Tensor, beta: float = 0.5) -> Tensor:
    """Generalized Jensen-Shannon divergence (arXiv 2306.13649, eq. 1). Two [N, V] -> [N].
    Defined as kl at beta = 0 and rkl at 1. The formula itself tends to 0 at both ends."""
    if beta in (0, 1):
        return kl(q_logits, p_logits) if beta == 0 else rkl(q_logits, p_logits)
    log_q, log_p = log_softmaxes(q_logits, p_logits)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    kl_p = log_p.exp() * (log_p - log_m)
    kl_q = log_q.exp() * (log_q - log_m)
    return (beta * kl_p + (1 - beta) * kl_q).sum(-1)

def dft_weight(q_logp: Tensor, p_logp: Tensor | None = None, tau: float = TAU) -> Tensor:
    """w = q(y): imitate what the student would write itself. [N] -> [N], no gradient."""
    return fp32(q_logp.detach()).exp()

def discord_weight(q_logp: Tensor, p_logp: Tensor, tau: float = TAU) -> Tensor:
    """w = 2 sigmoid((log q(y) - log p(y)) / tau). Two [N] -> [N], no gradient, 0 < w < 2.

    tau = infinity is SFT. For a softmax table, q = p is a fixed point at every tau, and a
    stable one if tau > 1/2: a round multiplies log(q/p) by 1 / (2 tau). Below, the student
    drifts to its own modes. As q(y) -> 0, w -> 0: such a token is hardly ever learned."""
    log_ratio = fp32(q_logp.detach()) - fp32(p_logp.detach())
    # fp32 would round w to 0 or 2; if all were 0, the effective sample size would be 0 / 0.
    return 2 * (log_ratio / tau).clamp(-80, 16).sigmoid()

# Each objective: its token loss and its weight. Add yours here.
OBJECTIVES: dict[str, tuple[Callable, Callable | None]] = {
    "sft": (sft, None),
    "dft": (sft, dft_weight),
    "discord": (sft, discord_weight),
    "kl": (kl, None),
    "rkl": (rkl, None),
    "todi": (todi, None),
    "gkd": (gkd, None),
    "discord-kl": (kl, discord_weight),
    "discord-rkl": (rkl, discord_weight),
    "discord-todi": (todi, discord_weight),
    "discord-gkd": (gkd, discord_weight),
}

def token_losses(objective: str, q_logits: Tensor, y: Tensor,
                 p_logits: Tensor | None = None, p_logp: Tensor | None = None,
                 tau: float = TAU, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """N rows -> (loss [N], w [N]). w has no gradient; without a weight it is 1.

    q_logits, p_logits: [N, V]. y, p_logp: [N]. p_logp is the stored log p(y); p_logits, if
    given, replace it. The objective is sum(w * loss) / N, with N the tokens of the *whole*
    optimizer step: a mean of micro-batch means would depend on how the step is cut."""
    token_loss, weight = OBJECTIVES[objective]
    if token_loss is sft:
        losses = sft(q_logits, y)
    elif token_loss is gkd:
        losses = gkd(q_logits, p_logits, beta)
    else:
        losses = token_loss(q_logits, p_logits)
    if weight is None:
        return losses, torch.ones_like(losses)
    with torch.no_grad():
        q_logp = -losses if token_loss is sft else -sft(q_logits, y)
        if p_logits is not None:
            p_logp = -sft(p_logits, y)
        return losses, weight(q_logp, p_logp, tau)
