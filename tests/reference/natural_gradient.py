"""Online natural gradient in float64 with dense D x D matrices: slow, plain numpy.

F, T and G are formed and G is inverted; nothing is stored but the eigenvalues, the
orthonormal rows and rho. Written from equations (1) to (15) of
mpilm/optim/natural_gradient.py. It does not mend lost orthogonality (17) to (19): it is
for well-conditioned data.
"""

from __future__ import annotations

import numpy as np


class DenseNaturalGradient:
    def __init__(self, D, *, rank, alpha, history, period, epsilon=1e-10, delta=5e-4):
        self.D, self.R = D, min(rank, D - 1)
        self.alpha, self.history, self.period = alpha, history, period
        self.epsilon, self.delta = epsilon, delta
        self.rows = np.array(
            [[(column % self.R == r) for column in range(D)] for r in range(self.R)],
            dtype=float,
        )
        self.rows[range(self.R), range(self.R)] = 1.1
        self.rows /= np.linalg.norm(self.rows, axis=1, keepdims=True)
        self.d, self.rho, self.t = np.full(self.R, epsilon), epsilon, 0

    def fisher(self):
        return self.rows.T @ np.diag(self.d) @ self.rows + self.rho * np.eye(self.D)

    def smoothed(self):
        F = self.fisher()
        return F + self.alpha / self.D * np.trace(F) * np.eye(self.D)

    def target(self, X):
        """Return T_t."""
        eta = min(0.9, 1 - np.exp(-len(X) / self.history))
        return eta * X.T @ X / len(X) + (1 - eta) * self.fisher()

    def learn(self, X):
        eta = min(0.9, 1 - np.exp(-len(X) / self.history))
        T = self.target(X)
        Y = self.rows @ T
        c, U = np.linalg.eigh(Y @ Y.T)
        c, U = c[::-1], U[:, ::-1]
        c = np.maximum(c, ((1 - eta) * self.rho) ** 2)
        self.rows = np.diag(c**-0.5) @ U.T @ Y
        rho = (np.trace(T) - np.sqrt(c).sum()) / (self.D - self.R)
        d = np.sqrt(c) - rho
        least = max(self.epsilon, self.delta * np.sqrt(c).max())
        self.rho, self.d = max(rho, least), np.maximum(d, least)

    def __call__(self, X):
        """Return X_hat, scale."""
        if self.t == 0:
            for _ in range(3 if len(X) > self.R else 1):
                self.learn(X)
        G = self.smoothed()
        beta = self.rho + self.alpha / self.D * np.trace(self.fisher())
        X_hat = beta * X @ np.linalg.inv(G)
        norm = np.linalg.norm(X)
        scale = norm / np.linalg.norm(X_hat) if norm > 0 else 1.0
        if self.t <= 10 or (self.t - 10) % self.period == 0:
            self.learn(X)
        self.t += 1
        return X_hat, scale
