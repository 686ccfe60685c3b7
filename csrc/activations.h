// The activations of masked_ffn and their derivatives, branch-free so that loops over them vectorise.
//
// GELU, tanh-GELU, SiLU and ReLU are all x * P(x) with P(-x) = 1 - P(x). With q = P(-|x|) and p = P'(|x|) = P'(-|x|):
//   act(x) = max(x, 0) - |x| q        act'(x) = [x > 0] + sign(x) (|x| p - q)
// Nothing cancels: q is computed to a few ulp relative to itself, however small it is.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define PYMAPE_INLINE __device__ __forceinline__
#else
#include <bit>
#define PYMAPE_INLINE inline __attribute__((always_inline))
#endif

namespace pymape {

enum class Activation : int { gelu, gelu_tanh, relu, silu };

template <typename ACC>
struct Tail {
  ACC q, p;
};

constexpr double kInvSqrt2Pi = 0.398942280401432678;  // 1 / sqrt(2 pi)
constexpr double kTanhScale = 1.595769121605730712;   // 2 sqrt(2 / pi): tanh-GELU is x sigmoid(kTanhScale (x + c x^3))
constexpr double kTanhCubic = 0.044715;

// 2^(-x scale) for products in [0, 126]; the product is rounded once at most where the processor has FMA. And quotients of
// denominators in [1, 2^126]: a GPU takes a quarter of the instructions for one that is right to 2 ulp.
#if defined(__CUDACC__)
PYMAPE_INLINE float exp2_negative(float x, float scale) { return exp2f(-x * scale); }
PYMAPE_INLINE float divide(float top, float bottom) { return __fdividef(top, bottom); }
#else
PYMAPE_INLINE float divide(float top, float bottom) { return top / bottom; }
PYMAPE_INLINE float exp2_negative(float x, float scale) {
  constexpr float kRounder = 0x1.8p23f;  // adding it leaves the nearest integer in the low mantissa bits
  const float shifted = kRounder - x * scale;
  const float fraction = (kRounder - shifted) - x * scale;  // in [-1/2, 1/2]
  float power = 1.53457429e-04f;  // minimax fit of 2^fraction, relative error 2e-9
  power = power * fraction + 1.34000106e-03f;
  power = power * fraction + 9.61848982e-03f;
  power = power * fraction + 5.55032858e-02f;
  power = power * fraction + 2.40226469e-01f;
  power = power * fraction + 6.93147206e-01f;
  power = power * fraction + 1.0f;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(power) + (std::bit_cast<std::uint32_t>(shifted) << 23));
}
#endif

// The tail of P at distance x, which is clamped so that the exponential stays a normal number.
template <Activation A>
PYMAPE_INLINE Tail<float> tail(float x) {
  constexpr float kLog2E = 1.44269504f;
  if constexpr (A == Activation::gelu) {
    // exp(-x^2 / 2) times the Mills ratio, a rational minimax fit: relative error 5e-8 up to 5.6, 4e-5 beyond, where q < 1e-8.
    const float e = exp2_negative(x * x, 0.5f * kLog2E);
    float top = 1.33411291e-02f, bottom = 3.34642623e-02f;
    bottom = bottom * x + 2.57911889e-01f;
    top = top * x + 1.03130855e-01f;
    bottom = bottom * x + 8.72724836e-01f;
    top = top * x + 3.32013394e-01f;
    bottom = bottom * x + 1.46190837e+00f;
    top = top * x + 4.99999975e-01f;
    bottom = bottom * x + 1.0f;
    return {e * divide(top, bottom), static_cast<float>(kInvSqrt2Pi) * e};
  } else if constexpr (A == Activation::relu) {
    return {0.0f, 0.0f};
  } else {
    float e, v_slope = 1.0f;
    if constexpr (A == Activation::gelu_tanh) {
      constexpr float kScale = static_cast<float>(kTanhScale), kCubic = static_cast<float>(kTanhScale * kTanhCubic);
      const float square = x * x;
      e = exp2_negative(x * (kScale + kCubic * square), kLog2E);
      v_slope = kScale + 3 * kCubic * square;
    } else {
      e = exp2_negative(x, kLog2E);
    }
    const float one_minus_q = divide(1.0f, 1.0f + e);
    const float q = e * one_minus_q;
    return {q, q * one_minus_q * v_slope};
  }
}

template <Activation A>
PYMAPE_INLINE Tail<double> tail(double x) {
  if constexpr (A == Activation::gelu) {
    return {0.5 * erfc(x * 0.707106781186547524), kInvSqrt2Pi * exp(-0.5 * x * x)};
  } else if constexpr (A == Activation::relu) {
    return {0.0, 0.0};
  } else {
    double v = x, v_slope = 1.0;
    if constexpr (A == Activation::gelu_tanh) {
      v = kTanhScale * (x + kTanhCubic * x * x * x);
      v_slope = kTanhScale * (1.0 + 3.0 * kTanhCubic * x * x);
    }
    const double e = exp(-v), one_minus_q = 1.0 / (1.0 + e);
    return {e * one_minus_q, e * one_minus_q * one_minus_q * v_slope};
  }
}

// Beyond this distance |x| q and |x| p are below 1e-33 in every activation; the clamp lets NaN through.
template <Activation A>
PYMAPE_INLINE float distance(float x) {
  constexpr float kReach = A == Activation::gelu ? 13.0f : A == Activation::gelu_tanh ? 9.8f : 87.0f;
  const float magnitude = x < 0 ? -x : x;
  return magnitude > kReach ? kReach : magnitude;
}
template <Activation A>
PYMAPE_INLINE double distance(double x) {
  constexpr double kReach = A == Activation::gelu ? 38.0 : A == Activation::gelu_tanh ? 20.0 : 700.0;
  const double magnitude = x < 0 ? -x : x;
  return magnitude > kReach ? kReach : magnitude;
}

template <Activation A, typename ACC>
PYMAPE_INLINE ACC activate(ACC x) {
  const ACC positive = x < 0 ? 0 : x;  // NaN stays NaN
  if constexpr (A == Activation::relu) return positive;
  const ACC d = distance<A>(x);
  return positive - d * tail<A>(d).q;
}

template <Activation A, typename ACC>
PYMAPE_INLINE void activate_with_slope(ACC x, ACC& value, ACC& slope) {
  const ACC positive = x < 0 ? 0 : x;
  if constexpr (A == Activation::relu) {
    value = positive;
    slope = x > 0 ? 1 : 0;
  } else {
    const ACC d = distance<A>(x);
    const Tail<ACC> t = tail<A>(d);
    const ACC offset = d * t.p - t.q;
    value = positive - d * t.q;
    slope = x > 0 ? 1 + offset : -offset;
  }
}

}  // namespace pymape
