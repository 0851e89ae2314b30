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
                    Real *h, int Dk, int Dv, Real scale, Real eps, bool forget_exp = false,
                    bool input_sigmoid = false, bool normalize = true) {
    const Real lf = forget_exp ? f : log_sigmoid(f);
    if (input_sigmoid) i = log_sigmoid(i);
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
    const Real one = std::exp(-m);  // in units of C and n
    Real normalizer = std::max(std::abs(qn), one) + (input_sigmoid ? eps * one : eps);
    if (!normalize) normalizer = one;
    for (int e = 0; e < Dv; ++e) h[e] /= normalizer;
}

}  // namespace xlstm::reference
