// The sLSTM recurrence as it is written (README.md), one position at a time: what the kernels compute, for
// reading. `Real` is the type that everything is computed in.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

namespace xlstm::reference {

// One position of one unit: its gates' pre-activations, and its state, which is updated in place.
template <class Real>
void slstm_unit(Real i, Real f, Real z, Real o, Real forget_max, Real &y, Real &c, Real &n, Real &m,
                bool forget_exp = false, Real normalizer_min = 0) {
    f = std::min(f, forget_max);
    const Real lf = forget_exp ? f : std::min(f, Real(0)) - std::log1p(std::exp(-std::abs(f)));
    const bool fresh = n == 0;  // then m is no stabilizer yet
    const Real m_new = fresh ? i : std::max(i, lf + m);
    const Real insert = std::exp(i - m_new);
    // Not (lf + m) - m': what was rounded off in m' comes back in the decay and does not add up.
    const Real forget = fresh ? Real(0) : std::exp(lf + (m - m_new));
    c = forget * c + insert * std::tanh(z);
    n = std::max(forget * n + insert, normalizer_min);
    m = m_new;
    y = c / (n * (1 + std::exp(-o)));
}

// One position of one head: x, bias (4, D), R (D, 4, D), results in y, c, n, m (D).
template <class Real>
void slstm_position(const Real *x, const Real *R, const Real *bias, Real forget_max, Real *y, Real *c,
                    Real *n, Real *m, int D) {
    std::vector<Real> raw(4 * D);
    for (int u = 0; u < 4 * D; ++u) raw[u] = x[u] + bias[u];
    for (int d = 0; d < D; ++d)
        for (int u = 0; u < 4 * D; ++u) raw[u] += R[d * 4 * D + u] * y[d];
    for (int e = 0; e < D; ++e)
        slstm_unit(raw[e], raw[D + e], raw[2 * D + e], raw[3 * D + e], forget_max, y[e], c[e], n[e], m[e]);
}

}  // namespace xlstm::reference
