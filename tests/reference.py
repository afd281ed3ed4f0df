"""The formulas once more, slowly: plain Python floats, one row and one token at a time, written from the papers.

Nothing here is shared with rlhf/: not a helper, not a recursion, not a tensor. Rows are lists, masks are lists of bool,
and a sum is a sum over the tokens that the mask counts. At the end: ragged batches for hypothesis, and `close`.
"""

import math

import torch
from hypothesis import strategies as st

# ---- statistics ----------------------------------------------------------------------------------------------------


def counted(x, mask):
    return [v for row, m in zip(x, mask) for v, keep in zip(row, m) if keep]


def mean(values):
    return math.fsum(values) / len(values) if values else 0.0


def variance(values, unbiased=True):
    n = len(values) - 1 if unbiased else len(values)
    return math.fsum((v - mean(values)) ** 2 for v in values) / n if n > 0 else 0.0


def whiten(x, mask):
    m, scale = mean(counted(x, mask)), math.sqrt(variance(counted(x, mask)) + 1e-8)
    return [[(v - m) / scale if keep else 0.0 for v, keep in zip(*row)] for row in zip(x, mask)]


def explained_variance(values, returns, mask):
    v, r = counted(values, mask), counted(returns, mask)
    return 1 - variance([b - a for a, b in zip(v, r)]) / variance(r) if variance(r) > 0 else 0.0


# ---- distributions -------------------------------------------------------------------------------------------------


def softmax(logits, temperature=1.0):
    top = max(logits)
    weights = [math.exp((z - top) / temperature) for z in logits]
    return [w / math.fsum(weights) for w in weights]


def entropy(probs):
    return -math.fsum(p * math.log(p) for p in probs if p > 0)


def full_kl(p, q):
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q) if a > 0)


def kl_estimate(name, logp, logq):
    """Schulman's note, with r = q / p for a token drawn from p."""
    r = math.exp(logq - logp)
    return {"k1": -math.log(r), "k2": math.log(r) ** 2 / 2, "k3": (r - 1) - math.log(r)}[name]


def adaptive_kl(coef, target, horizon, history):
    """Ziegler et al., section 2.2: the coefficient after each (KL, number of sequences)."""
    trace = []
    for kl, n in history:
        error = (kl - target) / target
        error = -0.2 if error < -0.2 else 0.2 if error > 0.2 else error
        coef = coef * (1 + error * n / horizon)
        trace.append(coef)
    return trace


def truncated_ratio(logp, logq, cap):
    """Truncated importance sampling: how much likelier the first is, but at most `cap` times."""
    ratio = math.exp(logp) / math.exp(logq)
    return ratio if ratio < cap else cap


# ---- rewards and advantages ----------------------------------------------------------------------------------------


def shape_rewards(scores, logprobs, ref_logprobs, mask, kl_coef, estimator="k1"):
    rewards = []
    for score, new, ref, m in zip(scores, logprobs, ref_logprobs, mask):
        row = [-kl_coef * kl_estimate(estimator, a, b) if keep else 0.0 for a, b, keep in zip(new, ref, m)]
        row[max(t for t, keep in enumerate(m) if keep)] += score
        rewards.append(row)
    return rewards


def k_step_advantage(rewards, values, t, k, gamma, end):
    """A^(k) of the GAE paper (eq. 14): k rewards, then the value of the state where they lead, `end` after the last."""
    steps = [gamma**i * rewards[t + i] for i in range(k)]
    landing = values[t + k] if t + k < len(values) else end
    return -values[t] + math.fsum(steps) + gamma**k * landing


def gae_of_episode(rewards, values, gamma, lam, end=0.0):
    """The definition in eq. 16, before its simplification: the exponentially weighted average of all k-step estimates.

    An episode of n more steps has n of them; the last stands for all longer ones and gets their weight too.
    """
    advantages = []
    for t in range(len(rewards)):
        n = len(rewards) - t
        weights = [(1 - lam) * lam ** (k - 1) for k in range(1, n)] + [lam ** (n - 1)]
        estimates = [k_step_advantage(rewards, values, t, k, gamma, end) for k in range(1, n + 1)]
        advantages.append(math.fsum(w * a for w, a in zip(weights, estimates)))
    return advantages


def spread(values, mask_row):
    """Put the values of the counted tokens back to their columns."""
    values = iter(values)
    return [next(values) if keep else 0.0 for keep in mask_row]


def gae(rewards, values, mask, gamma, lam, bootstrap=None):
    advantages, returns = [], []
    for i, m in enumerate(mask):
        r, v = counted([rewards[i]], [m]), counted([values[i]], [m])  # a hole is not there at all
        a = gae_of_episode(r, v, gamma, lam, 0.0 if bootstrap is None else bootstrap[i])
        advantages.append(spread(a, m))
        returns.append(spread([x + y for x, y in zip(a, v)], m))
    return advantages, returns


def rloo(scores, group):
    out = []
    for i, s in enumerate(scores):
        others = [x for j, x in enumerate(scores) if group[j] == group[i] and j != i]
        out.append(s - mean(others) if others else 0.0)
    return out


def grpo(scores, group, eps=1e-6):
    out = []
    for s, g in zip(scores, group):
        members = [x for x, h in zip(scores, group) if h == g]
        out.append((s - mean(members)) / (math.sqrt(variance(members)) + eps))
    return out


def dr_grpo(scores, group):
    return [s - mean([x for x, h in zip(scores, group) if h == g]) for s, g in zip(scores, group)]


def reinforce_plus_plus(rewards, mask, gamma):
    """Eq. 4 with a discount: token t is credited with everything that is paid from t on; then eq. 5."""
    returns = []
    for row, m in zip(rewards, mask):
        r = counted([row], [m])
        to_go = [math.fsum(gamma ** (k - t) * r[k] for k in range(t, len(r))) for t in range(len(r))]
        returns.append(spread(to_go, m))
    return whiten(returns, mask), returns


# ---- losses --------------------------------------------------------------------------------------------------------


def policy_objective(logp, old, advantage, clip, clip_high=None, dual_clip=None):
    """What PPO maximises for one token (eq. 7), with DAPO's upper range and the lower bound of dual-clip PPO (eq. 5)."""
    ratio = math.exp(logp) / math.exp(old)
    low, high = 1 - clip, 1 + (clip if clip_high is None else clip_high)
    objective = min(ratio * advantage, min(max(ratio, low), high) * advantage)
    if dual_clip is not None and advantage < 0:
        objective = max(objective, dual_clip * advantage)
    return objective


def clipped(logp, old, advantage, clip, clip_high=None):
    """The clip decides where the policy has already moved past the range in the direction that its advantage asks."""
    ratio = math.exp(logp) / math.exp(old)
    above, below = ratio > 1 + (clip if clip_high is None else clip_high), ratio < 1 - clip
    return float((advantage > 0 and above) or (advantage < 0 and below))


def value_loss(new, old, target, clip=None):
    if clip is None:
        return (new - target) ** 2 / 2
    near = old + max(-clip, min(clip, new - old))
    return max((new - target) ** 2, (near - target) ** 2) / 2


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def preference_loss(chosen, rejected, margin=0.0, p=1.0):
    win = sigmoid(chosen - rejected - margin)
    return -p * math.log(win) - (1 - p) * math.log(1 - win)


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0):
    """Eq. 7 with the ratios of probabilities written out."""
    better = math.log(math.exp(policy_chosen) / math.exp(ref_chosen))
    worse = math.log(math.exp(policy_rejected) / math.exp(ref_rejected))
    h = beta * better - beta * worse
    return -(1 - label_smoothing) * math.log(sigmoid(h)) - label_smoothing * math.log(sigmoid(-h))


# ---- calibration ---------------------------------------------------------------------------------------------------


def reliability_bins(probs, labels, bins):
    """For each of the bins of equal width: how many, mean prediction, mean outcome."""
    table = []
    for b in range(bins):
        low, high = b / bins, (b + 1) / bins
        inside = [(p, y) for p, y in zip(probs, labels) if low <= p < high or (b == bins - 1 and p == 1)]
        table.append((len(inside), mean([p for p, _ in inside]), mean([y for _, y in inside])))
    return table


def calibration_error(probs, labels, bins, norm):
    gaps = [(n / len(probs), abs(y - p)) for n, p, y in reliability_bins(probs, labels, bins)]
    if norm == "max":
        return max(gap for _, gap in gaps)
    power = {"l1": 1, "l2": 2}[norm]
    return math.fsum(w * gap**power for w, gap in gaps) ** (1 / power)


def cross_entropy(margins, labels, temperature):
    def cost(x):  # -log sigmoid(x), for any x
        return max(-x, 0) + math.log1p(math.exp(-abs(x)))

    return mean([y * cost(m / temperature) + (1 - y) * cost(-m / temperature) for m, y in zip(margins, labels)])


def best_temperature(margins, labels):
    """Ternary search over log T between 1/1000 and 1000."""
    low, high = math.log(1e-3), math.log(1e3)
    for _ in range(200):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        worse_at_a = cross_entropy(margins, labels, math.exp(a)) > cross_entropy(margins, labels, math.exp(b))
        low, high = (a, high) if worse_at_a else (low, b)
    return math.exp((low + high) / 2)


def wilson_interval(wins, n, z):
    """The rates p that a z-test would not reject: |wins / n - p| <= z sqrt(p (1 - p) / n), both ends by bisection."""

    def rejected(p):
        return abs(wins / n - p) > z * math.sqrt(p * (1 - p) / n)

    ends = []
    for outside in (0.0, 1.0):
        inside = wins / n
        for _ in range(200):
            middle = (outside + inside) / 2
            outside, inside = (middle, inside) if rejected(middle) else (outside, middle)
        ends.append(inside)
    return tuple(ends)


# ---- batches and comparison ----------------------------------------------------------------------------------------


class Batch:
    """A mask and, for every name asked for, a tensor of normal random numbers of its shape (or (B,) for `row`)."""

    def __init__(self, mask, seed, dtype):
        self.mask, self.dtype = torch.tensor(mask), dtype
        self.generator = torch.Generator().manual_seed(seed)

    def token(self, scale=1.0):
        return (torch.randn(self.mask.shape, generator=self.generator, dtype=torch.float64) * scale).to(self.dtype)

    def logprob(self):
        return -self.token().abs()

    def row(self, scale=1.0):
        return (torch.randn(len(self.mask), generator=self.generator, dtype=torch.float64) * scale).to(self.dtype)

    def group(self):
        """Ids in no order, with gaps, some of them alone; few enough to have company."""
        return torch.randint(0, 1 + len(self.mask) // 2, (len(self.mask),), generator=self.generator) * 7 - 3

    def __repr__(self):
        return f"Batch({self.mask.tolist()}, {self.generator.initial_seed()}, {self.dtype})"


def mask_row(width, holes, empty):
    """[prompt | response | padding] of one row: full, of one token, or anything between; then perhaps holes in it."""

    def build(drawn):
        start, stop, keep = drawn
        row = [start <= t < stop and (keep[t] or not holes) for t in range(width)]
        row[start] = row[start] or not empty
        return row

    lengths = st.integers(0, width - 1).flatmap(
        lambda start: st.tuples(
            st.just(start), st.integers(start + 1, width) | st.just(width), st.lists(st.booleans(), min_size=width)
        )
    )
    row = lengths.map(build)
    return row | st.just([False] * width) if empty else row


@st.composite
def batches(draw, holes=False, empty=False):
    """1 to 5 ragged rows of 1 to 7 columns; with `holes` the mask need not be contiguous, with `empty` rows may be."""
    width = draw(st.integers(1, 7))
    mask = draw(st.lists(mask_row(width, holes, empty), min_size=1, max_size=5))
    return Batch(mask, draw(st.integers(0, 2**31)), draw(st.sampled_from([torch.float64, torch.float32])))


def close(actual, expected):
    """Equal to 1e-12 in float64 and to 1e-5 in float32, absolutely or relatively; `expected` in numbers and lists."""
    actual = torch.as_tensor(actual)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[actual.dtype]
    expected = torch.tensor(expected, dtype=torch.float64).to(actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
