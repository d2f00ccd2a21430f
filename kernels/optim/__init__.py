r"""Adam, AdamW, Lion and Muon: every tensor of a model in a constant number of launches.

Kingma & Ba 2015, https://arxiv.org/abs/1412.6980; Loshchilov & Hutter 2019,
https://arxiv.org/abs/1711.05101; ``lion`` and ``muon`` give their own.

One step t of Adam for a gradient g (negated under ``maximize``), with s the gradient scale:

    g = g / s                            p = p - lr * weight_decay * p          (AdamW)
                                         g = g + weight_decay * p               (Adam)
    exp_avg    = exp_avg    + (1 - beta1) * (g   - exp_avg)
    exp_avg_sq = exp_avg_sq + (1 - beta2) * (g^2 - exp_avg_sq)
    p = p - lr / (1 - beta1^t) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2^t)) + eps)

``amsgrad`` divides by the largest exp_avg_sq so far. Scalars are computed in float64, elements in
float32 and rounded once, so float16 and bfloat16 results are closer to float64 than eager's.

The first kernel advances the steps and writes each tensor's scalars; the second walks all tensors
through a table of addresses in chunks of equal size. Learning rates, betas and steps live in
device memory: a schedule neither recompiles nor synchronises. Of DTensors the table has the local
parts; clipping sums their squares over the processes in one reduction.

Cost, bound by memory, in bytes a parameter and step (p and g, states, extras):

                                                       Adam, AdamW     Lion
    float32                                                 28           20
    float32, state_dtype=bfloat16                           20           16
    float32, state_dtype="8bit"                             16.125       14.0625
    bfloat16 throughout, torch's default for it             14           10
    bfloat16, state_dtype="8bit", stochastic or nearest     10.125        8.0625
    bfloat16, state_dtype=float32, stochastic               22           14
    bfloat16, state_dtype=float32, master="split"           26           18
    bfloat16, state_dtype=float32, master="fp32"            28           20
    amsgrad + the states' largest, read and written; ema_decay +8; max_grad_norm + the gradient
    read once more; cautious + the gradient and exp_avg read once more
"""

from .adam import Adam, AdamW
from .lion import Lion, lion_step
from .muon import Muon, muon_step
from .step import adamw_step

__all__ = ["Adam", "AdamW", "Lion", "Muon", "adamw_step", "lion_step", "muon_step"]
