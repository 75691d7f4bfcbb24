"""The same losses as anyone writes them, with whole logits [N, V]: peers in their dtype, truth in float64.

N positions, V vocabulary, K entries of the teacher's head, T temperature. A loss is a mean over positions.
"""

import torch
from kernel_cases import CE_WEIGHT, GRID, KD_WEIGHT, Inputs, Setting
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


def wide_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits of the head's own dtype, widened to float32 afterwards: what models give."""
    logits = functional.linear(hidden, weight)
    return logits if logits.dtype == torch.float64 else logits.float()


def _teacher_law(inputs: Inputs, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the head [N, K] and of the rest [N] at T."""
    head = inputs.targets.head_logprobs / temperature
    total = torch.logaddexp(head.logsumexp(1), inputs.targets.log_rest)
    return head - total[:, None], inputs.targets.log_rest - total


def _scattered_kd(logits: Tensor, inputs: Inputs, temperature: float) -> Tensor:
    """Forward KL over head and rest from a dense p [N, V], times T^2: [N]."""
    log_p, log_p_rest = _teacher_law(inputs, temperature)
    log_q = (logits / temperature).log_softmax(1)
    ids = inputs.targets.ids
    dense = torch.zeros_like(log_q).scatter_(1, ids, log_p.exp().to(log_q.dtype))
    in_head = torch.zeros_like(log_q, dtype=torch.bool).scatter_(1, ids, True)
    of_head = functional.kl_div(log_q, dense, reduction="none").sum(1)
    log_q_rest = log_q.masked_fill(in_head, -torch.inf).logsumexp(1)
    return temperature**2 * (of_head + log_p_rest.exp() * (log_p_rest - log_q_rest))


def kd_ce_scattered(inputs: Inputs, setting: Setting) -> Tensor:
    """Distillation and cross-entropy, p scattered into [N, V]."""
    logits = wide_logits(inputs.hidden, inputs.weight)
    kd = _scattered_kd(logits, inputs, setting.temperature).mean()
    return KD_WEIGHT * kd + CE_WEIGHT * functional.cross_entropy(logits, inputs.labels)


def kd_scattered(inputs: Inputs, setting: Setting) -> Tensor:
    """Distillation alone, p scattered into [N, V]."""
    return _scattered_kd(wide_logits(inputs.hidden, inputs.weight), inputs, setting.temperature).mean()


def kd_ce_gathered(inputs: Inputs, setting: Setting) -> Tensor:
    """The leanest dense form: q gathered at the head, the rest as 1 minus the head's mass."""
    temperature = setting.temperature
    log_p, log_p_rest = _teacher_law(inputs, temperature)
    logits = wide_logits(inputs.hidden, inputs.weight)
    total_1 = logits.logsumexp(1)
    scaled = logits if temperature == 1.0 else logits / temperature
    total_t = total_1 if temperature == 1.0 else scaled.logsumexp(1)
    log_q = scaled.gather(1, inputs.targets.ids) - total_t[:, None]
    log_q_rest = torch.log1p(-log_q.exp().sum(1).clamp(max=1 - 1e-6))
    kd = (log_p.exp() * (log_p - log_q)).sum(1) + log_p_rest.exp() * (log_p_rest - log_q_rest)
    ce = total_1 - logits.gather(1, inputs.labels[:, None])[:, 0]
    return (KD_WEIGHT * temperature**2 * kd + CE_WEIGHT * ce).mean()


def kd_ce_chunked(inputs: Inputs, setting: Setting, chunk: int) -> Tensor:
    """The leanest form in chunks that are recomputed in the backward pass: four products, not three."""

    def part(hidden: Tensor, weight: Tensor, rows: slice) -> Tensor:
        some = inputs._replace(
            hidden=hidden,
            weight=weight,
            labels=inputs.labels[rows],
            targets=inputs.targets._replace(
                ids=inputs.targets.ids[rows],
                head_logprobs=inputs.targets.head_logprobs[rows],
                log_rest=inputs.targets.log_rest[rows],
            ),
        )
        return kd_ce_gathered(some, setting) * hidden.shape[0]

    count = inputs.hidden.shape[0]
    total = torch.zeros((), device=inputs.hidden.device)
    for start in range(0, count, chunk):
        rows = slice(start, start + chunk)
        total = total + checkpoint(
            part, inputs.hidden[rows], inputs.weight, rows, use_reentrant=False, preserve_rng_state=False
        )
    return total / count


def ce(inputs: Inputs, setting: Setting) -> Tensor:
    """Cross-entropy."""
    return functional.cross_entropy(wide_logits(inputs.hidden, inputs.weight), inputs.labels)


def live_kd(inputs: Inputs, setting: Setting) -> Tensor:
    """Forward KL over the whole vocabulary from the teacher's own logits, times T^2."""
    temperature = setting.temperature
    with torch.no_grad():
        teacher = wide_logits(inputs.teacher_hidden, inputs.weight.detach())
        log_p = (teacher / temperature).log_softmax(1)
        del teacher
    log_q = (wide_logits(inputs.hidden, inputs.weight) / temperature).log_softmax(1)
    loss = functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return temperature**2 * loss / inputs.hidden.shape[0]


@torch.no_grad()
def record(inputs: Inputs, setting: Setting, *, whole: bool) -> tuple[Tensor, Tensor]:
    """Head and log R of the teacher from whole logits, with `torch.multinomial` for the draws.

    Args:
        inputs: hidden states of the teacher, head, labels.
        setting: k.
        whole: make all that the store keeps: log R at every T of the grid, both entropies, the true token's
            log-probability; else topk, logsumexp and multinomial alone.

    Returns:
        (log-probabilities of the head [N, k], log R [N, grid or 1]).
    """
    logits = wide_logits(inputs.teacher_hidden, inputs.weight.detach())
    log_p = logits - logits.logsumexp(1, keepdim=True)
    del logits
    head, ids = log_p.topk(setting.k, dim=1)
    if whole:
        _ = log_p.gather(1, inputs.labels[:, None])
        _ = -(log_p.exp() * log_p).sum(1)
    rest = log_p.scatter_(1, ids, -torch.inf)
    grid = GRID if whole else GRID[:1]
    log_rest = torch.stack([(rest / temperature).logsumexp(1) for temperature in grid], 1)
    powers = rest.exp()
    if whole:
        _ = -(powers * rest.clamp_min(-1e30)).sum(1) / log_rest[:, 0].exp() + log_rest[:, 0]
    torch.multinomial(powers.float(), inputs.uniforms.shape[1], replacement=True)
    return head, log_rest


# The truth by the name of what is computed; in float64 they are exact for our purpose.
TRUTHS = {"kd_ce": kd_ce_scattered, "kd": kd_scattered, "ce": ce, "live_kd": live_kd}
