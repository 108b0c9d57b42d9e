"""The strategies once more, slow, in float64, on all models at once: (K, P) matrices.

A fleet that keeps in step (equal ranks, a fast network) must follow them. Gradients are
those of `ProtocolLearner` without noise and momentum: theta - target.
"""

from __future__ import annotations

import numpy as np

from mpilm.strategies.blocks import cut, due
from mpilm.strategies.sparta import index_set
from mpilm.strategies.topology import mixing_matrix, random_groups
from tests.strategies.fleets import LAYOUT

LR = 0.125


def mean_matrix(size):
    """Return the matrix of the mean over all ranks."""
    return np.full((size, size), 1.0 / size)


def mixing(theta, target, steps, *, before=None, after=None, stale=True, rate=LR):
    """Return theta <- A (B theta - lr g), `steps` times.

    Args:
        before, after: functions of the step (from 0) that return B and A, (K, K).
        stale: g at theta, not at B theta.
    """
    identity = np.eye(len(theta))
    for step in range(steps):
        mixed = (before(step) if before else identity) @ theta
        moved = mixed - rate * ((theta if stale else mixed) - target)
        theta = (after(step) if after else identity) @ moved
    return theta, theta.mean(axis=0)


def local(theta, target, steps):
    return mixing(theta, target, steps)


def allreduce(theta, target, steps):
    """From equal models the mean of gradients is the mean of models after the step."""
    return mixing(theta, target, steps, after=lambda step: mean_matrix(len(theta)))


def model_averaging(theta, target, steps, *, period, warmup=0):
    def after(step):
        is_due = step < warmup or (step + 1 - warmup) % period == 0
        return mean_matrix(len(theta)) if is_due else np.eye(len(theta))

    return mixing(theta, target, steps, after=after)


def delay_by_one(theta, target, steps):
    return mixing(theta, target, steps, before=lambda step: mean_matrix(len(theta)))


def dpsgd(theta, target, steps, *, topology, seed, overlap=True):
    def before(step):
        return mixing_matrix(topology, len(theta), seed, step)

    return mixing(theta, target, steps, before=before, stale=overlap)


def gossip_pga(theta, target, steps, *, period, topology, seed):
    size = len(theta)

    def after(step):
        if (step + 1) % period == 0:
            return mean_matrix(size)
        return mixing_matrix(topology, size, seed, step - step // period)

    return mixing(theta, target, steps, after=after)


def push_matrix(graph, size, seed, step):
    """Return P of `sgp`, (K, K): column j has the halves of what rank j holds."""
    matrix = 0.5 * np.eye(size)
    for rank in range(size):
        if graph == "exponential":
            goal = rank + 2 ** (step % max(1, (size - 1).bit_length()))
        else:
            draws = np.random.default_rng([seed, step]).integers(size - 1, size=size)
            goal = rank + 1 + draws[rank]
        matrix[goal % size, rank] += 0.5
    return matrix


def sgp(theta, target, steps, *, graph, seed):
    """x and w are kept, and z is made of them; the strategy keeps z and w."""
    x, w = theta.copy(), np.ones((len(theta), 1))
    for step in range(steps):
        P = push_matrix(graph, len(x), seed, step)
        x = P @ (x - LR * (x / w - target))
        w = P @ w
    return x / w, x.mean(axis=0)


def noloco(theta, target, steps, *, period, alpha=0.5, beta=0.7, gamma=0.9, seed=0):
    phi, delta = theta.copy(), np.zeros_like(theta)
    for step in range(1, steps + 1):
        theta = theta - LR * (theta - target)
        if step % period == 0:
            T = mixing_matrix("random_pairs", len(theta), seed, step // period)
            delta = alpha * delta + beta * T @ (theta - phi) - gamma * (phi - T @ phi)
            phi = phi + delta
            theta = phi.copy()
    return theta, theta.mean(axis=0)


def sparta(theta, target, steps, *, share, seed):
    for step in range(1, steps + 1):
        theta = theta - LR * (theta - target)
        where = index_set(theta.shape[1], share, seed, step)
        theta[:, where] = theta[:, where].mean(axis=0)
    return theta, theta.mean(axis=0)


def sparse(vector, chunk, share):
    """Return a vector with the largest of each chunk left, at one of two sizes."""
    out, count = np.zeros_like(vector), round(share * chunk)
    for start in range(0, len(vector), chunk):
        part = np.zeros(chunk)
        part[: len(vector) - start] = vector[start : start + chunk]
        kept = sorted(range(chunk), key=lambda index: -abs(part[index]))[:count]
        middle = np.mean([abs(part[index]) for index in kept])
        for is_upper in (False, True):
            these = [i for i in kept if (abs(part[i]) > middle) == is_upper]
            for index in these:
                if start + index < len(vector):
                    size = np.mean([abs(part[other]) for other in these])
                    out[start + index] = np.copysign(size, part[index])
    return out


def sparse_loco(theta, target, steps, *, period, share, chunk, decay, outer_lr=1.0):
    g, error = theta.copy(), np.zeros_like(theta)
    for step in range(1, steps + 1):
        theta = theta - LR * (theta - target)
        if step % period == 0:
            error = decay * error + theta - g
            sent = np.stack([sparse(own, chunk, share) for own in error])
            error = error - sent
            g = g + outer_lr * sent.mean(axis=0)
            theta = g.copy()
    return theta, theta.mean(axis=0)


def eager_diloco(theta, target, steps, *, period, eta, zeta, momentum="nesterov"):
    """Each rank sums what it learned itself and what the others had before."""
    size, nesterov = len(theta), momentum == "nesterov"
    W, g, delta, before = theta.copy(), theta.copy(), 0.0 * theta, 0.0 * theta
    others = mean_matrix(size) - np.eye(size) / size
    for step in range(1, steps + 1):
        theta = theta - LR * (theta - target)
        if step % period == 0:
            learned = theta - g
            update = learned / size + others @ before
            delta = eta * delta + zeta * update
            W = g + (zeta * update if nesterov else delta)
            g = W + (eta * delta if nesterov else 0.0)
            theta, before = g.copy(), learned
    return theta, W.mean(axis=0)


def adpsgd(theta, target, steps, *, weight=1 / 3):
    """In step, a rank begins an exchange with one neighbour and answers the other.

    Credit comes with a step, and that of the last step is not used any more.
    """
    size = len(theta)
    ring = np.eye(size)
    for rank in range(size):
        for peer in ((rank + 1) % size, (rank - 1) % size):
            ring[rank, peer] += weight
            ring[rank, rank] -= weight

    def before(step):
        return ring if step else np.eye(size)

    return mixing(theta, target, steps, before=before)


def async_sgd(theta, target, steps, *, rate=LR):
    """In step, all read the same model and the pushes of all are applied."""
    size = len(theta)
    return mixing(
        theta, target, steps, after=lambda step: mean_matrix(size), rate=rate * size
    )


def group_matrix(seed, block, component, size, group_size):
    """Return the mixing matrix of a component in a block, (K, K)."""
    matrix = np.zeros((size, size))
    for group in random_groups(seed, block, component, size, group_size):
        matrix[np.ix_(group, group)] = 1.0 / len(group)
    return matrix


def blocks(
    theta,
    target,
    steps,
    *,
    period,
    group_size,
    components="whole",
    eta,
    zeta=1.0,
    momentum="nesterov",
    mix="starts",
    delay=0,
    stagger=False,
    warmup=0,
    filter=True,
):
    """Return models and final model of `gossip_bmuf`; `bmuf`: one group of all.

    `bmuf`'s W(t), which the strategies do not keep, is kept here.
    """
    size, nesterov = len(theta), momentum == "nesterov"
    g, delta, W = theta.copy(), np.zeros_like(theta), theta.copy()
    parts = cut(LAYOUT, components)
    pending = {}  # component -> the step of its jump, and the jump
    for step in range(1, steps + 1):
        theta = theta - LR * (theta - target)
        for at, jump in pending.values():
            if step == at:
                theta = theta + jump
        w = theta.copy()
        for component in due(step, period, len(parts), stagger):
            T = group_matrix(1, step // period, component, size, group_size)
            jump = np.zeros_like(theta)
            for c in parts[component]:
                wbar = T @ w[:, c]
                if not filter or step <= warmup * period:
                    W[:, c] = g[:, c] = wbar
                else:
                    gbar = g[:, c] if mix == "models" else T @ g[:, c]
                    before = T @ delta[:, c] if mix == "momenta" else delta[:, c]
                    delta[:, c] = eta * before + zeta * (wbar - gbar)
                    W[:, c] = gbar + (zeta * (wbar - gbar) if nesterov else delta[:, c])
                    g[:, c] = W[:, c] + (eta * delta[:, c] if nesterov else 0.0)
                jump[:, c] = g[:, c] - w[:, c]
            if delay:
                pending[component] = (step + delay, jump)
            else:
                theta = theta + jump
    return theta, (W if filter else theta).mean(axis=0)
