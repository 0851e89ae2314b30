// The mLSTM recurrence as it is written (README.md), one position at a time: what the kernels compute, for
// reading. `Real` is the type that everything is computed in.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

namespace xlstm::reference {

template <class Real>
Real log_sigmoid(Real x) {
    return std::min(x, Real(0)) - std::log1p(std::exp(-std::abs(x)));
}

// One position of one head: q, k (Dk), v, h (Dv); C (Dk, Dv), n (Dk) and m are updated in place.
template <class Real>
void mlstm_position(const Real *q, const Real *k, const Real *v, Real i, Real f, Real *C, Real *n, Real &m,
                    Real *h, int Dk, int Dv, Real scale, Real eps) {
    const Real lf = log_sigmoid(f);
    const Real m_new = std::max(lf + m, i);
    // Not (lf + m) - m': what was rounded off in m' comes back in the decay and does not add up.
    const Real forget = std::exp(lf + (m - m_new));
    const Real insert = std::exp(i - m_new);
    m = m_new;
    Real qn = 0;
    std::fill(h, h + Dv, Real(0));
    for (int d = 0; d < Dk; ++d) {
        const Real key = insert * k[d], query = scale * q[d];
        n[d] = forget * n[d] + key;
        qn += query * n[d];
        for (int e = 0; e < Dv; ++e) {
            Real &c = C[d * Dv + e];
            c = forget * c + key * v[e];
            h[e] += query * c;
        }
    }
    const Real normalizer = std::max(std::abs(qn), std::exp(-m)) + eps;
    for (int e = 0; e < Dv; ++e) h[e] /= normalizer;
}

}  // namespace xlstm::reference
