// The weights that merge to one value: an interval of keys, for a vector of merged values and
// updates.
//
// A guess from the inverse in float arithmetic is nearly always right or next to it, and two probes
// at neighbouring keys prove each end. Where the float32 bits of T's values are evenly spaced,
// probes are float32 values and their neighbours; where that proves nothing (at zero and Inf) the
// vector's probes are repeated over keys, and where those fail too all keys are bisected.
#pragma once

#include "exact_vec.h"

namespace lora_kernels {
namespace LK_ISA {

// About where w + acc leaves the values that round to m, towards its neighbour `next`.
template <class T>
struct Inverse {
  fv m, acc;
  LK_INLINE Inverse(fv merged, fv a) : m(merged), acc(a) {}
  LK_INLINE fv edge(fv next) const { return (m * splat(0.5f) + next * splat(0.5f)) - acc; }
};
// A float32 has no midpoints: m - acc with its rounding error, then half a step.
template <>
struct Inverse<float> {
  fv m, d, e;
  LK_INLINE Inverse(fv merged, fv a) : m(merged), d(m - a) {
    const fv b = d - m;
    e = (m - (d - b)) - (a + b);
  }
  LK_INLINE fv edge(fv next) const { return d + (e + (next - m) * splat(0.5f)); }
};

// -1 or +1, and that with its sign changed where `turn` is all ones.
LK_INLINE iv away(fv x, iv turn) { return (((iv)x >> 31) ^ turn) | 1; }

// Probes of float32 values for the edge of the values that merge to m, near c: kLower is the
// smallest of them, else the largest. Set where that is proven for a c that is neither at zero nor
// at Inf.
template <class T, bool kLower>
LK_INLINE iv probe_floats(fv m, fv acc, fv c, fv* end) {
  const auto inside = [&](fv w) LK_INLINED {
    const fv u = Num<T>::nearest(w + acc);
    return kLower ? (iv)(u >= m) : (iv)(u <= m);
  };
  const iv in = inside(c);
  // One step out of the interval where c is in it, else one step in.
  const iv step = away(c, kLower ? in : ~in) * Num<T>::kStep;
  const fv p = (fv)((iv)c + step);
  *end = (fv)pick(in, (iv)c, (iv)p);
  return in ^ inside(p);
}

// Where float32 values do: the smallest and the largest that merge to m.
template <class T>
LK_INLINE iv interval_of_floats(fv m, fv acc, fv* lo, fv* hi) {
  const Inverse<T> inverse(m, acc);
  const iv up = away(m, iv{}) * Num<T>::kStep;
  const fv below = Num<T>::nearest(inverse.edge((fv)((iv)m - up)));
  const fv above = Num<T>::nearest(inverse.edge((fv)((iv)m + up)));
  const iv sure =
      probe_floats<T, true>(m, acc, below, lo) & probe_floats<T, false>(m, acc, above, hi);
  const iv least = smaller(magnitude(m), smaller(magnitude(below), magnitude(above)));
  const iv most = larger(magnitude(below), magnitude(above));
  return sure & (least > Num<T>::kStep) & (most < 0x7f800000 - Num<T>::kStep);
}

template <class T>
LK_INLINE iv clamp_finite(iv k) {
  return larger(smaller(k, isplat(Num<T>::kInf - 1)), isplat(-Num<T>::kInf));
}

// The smallest and the largest key that merge to km. Set where that is proven.
template <class T>
LK_INLINE iv interval_of_keys(iv km, fv acc, iv* lo, iv* hi) {
  const Inverse<T> inverse(value<T>(km), acc);
  iv c = clamp_finite<T>(round_key<T>(inverse.edge(value<T>(km - 1))));
  iv in = merged<T>(c, acc) >= km;
  iv p = c + (in | 1);
  const iv sure = in ^ (merged<T>(p, acc) >= km);
  *lo = pick(in, c, p);

  c = clamp_finite<T>(round_key<T>(inverse.edge(value<T>(km + 1))));
  in = merged<T>(c, acc) <= km;
  p = c - (in | 1);
  *hi = pick(in, c, p);
  return sure & (in ^ (merged<T>(p, acc) <= km));
}

// The smallest key whose merged key is at least km (kLower), or the largest whose is at most km.
template <class T, bool kLower>
LK_INLINE iv bisect(iv km, fv acc) {
  iv in = isplat(kLower ? Num<T>::kInf : -Num<T>::kInf - 1);
  iv out = isplat(kLower ? -Num<T>::kInf - 1 : Num<T>::kInf);
  for (int step = 0; step < Num<T>::kKeyBits + 1; ++step) {
    const iv below = kLower ? out : in, above = kLower ? in : out;
    const iv mid = (iv)((uv)below + (((uv)above - (uv)below) >> 1));
    // The last steps repeat the lower end, which stays where it is.
    const iv f = merged<T>(mid, acc);
    const iv inside = kLower ? f >= km : f <= km;
    in = pick(inside, mid, in);
    out = pick(inside, out, mid);
  }
  return in;
}

// The smallest key that merges to the value with bits m, and the largest less that: -1 where there
// is none.
template <class T>
LK_INLINE void interval(uv m, fv acc, iv* lo, uv* range) {
  iv hi;
  if constexpr (Num<T>::kEven) {
    fv from, to;
    const iv sure = interval_of_floats<T>(Num<T>::widen(m), acc, &from, &to);
    *lo = Num<T>::key(Num<T>::narrow(from));
    hi = Num<T>::key(Num<T>::narrow(to));
    *range = (uv)hi - (uv)*lo;
    if (__builtin_expect(lanes(sure) == kAllLanes, 1)) return;
  }
  const iv km = Num<T>::key(m);
  const iv sure = interval_of_keys<T>(km, acc, lo, &hi);
  if (__builtin_expect(lanes(sure) != kAllLanes, 0)) {
    *lo = bisect<T, true>(km, acc);
    hi = bisect<T, false>(km, acc);
  }
  *range = (uv)hi - (uv)*lo;
}

}  // namespace LK_ISA
}  // namespace lora_kernels
