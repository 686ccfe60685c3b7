// bfloat16 and float16 as storage types: arithmetic happens in float. Branch-free, so that loops over them vectorise.
#pragma once

#include <bit>
#include <cstdint>

namespace pymape {

struct BFloat16 {
  std::uint16_t bits;

  BFloat16() = default;
  explicit BFloat16(float value) {
    const std::uint32_t u = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // to nearest, ties to even
    const std::uint32_t quiet_nan = (u >> 16) | 0x40u;
    bits = static_cast<std::uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
  }
  operator float() const { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }
};

struct Half {
  std::uint16_t bits;

  Half() = default;
  explicit Half(float value) {
    const std::uint32_t u = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t magnitude = u & 0x7fffffffu;
    // Normal range: rebias the exponent by 127 - 15 and round the 13 dropped bits to nearest even.
    const std::uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14: adding 1/2 aligns the float's last bit with the subnormal's, and the addition does the rounding.
    const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    // Masks instead of `?:`, which GCC turns into branches that keep loops from vectorising.
    const std::uint32_t is_subnormal = -static_cast<std::uint32_t>(magnitude < (113u << 23));
    const std::uint32_t is_infinite = -static_cast<std::uint32_t>(magnitude >= 0x477ff000u);  // or rounds to it, or NaN
    const std::uint32_t is_nan = -static_cast<std::uint32_t>(magnitude > 0x7f800000u);
    const std::uint32_t finite = (subnormal & is_subnormal) | (normal & ~is_subnormal);
    const std::uint32_t h = (finite & ~is_infinite) | (0x7c00u & is_infinite) | (0x0200u & is_nan);
    bits = static_cast<std::uint16_t>(h | ((u >> 16) & 0x8000u));
  }
  operator float() const {
    const std::uint32_t sign = (bits & 0x8000u) << 16;
    const std::uint32_t shifted = (bits & 0x7fffu) << 13;
    const float finite = std::bit_cast<float>(shifted) * 0x1p112f;  // rebias, subnormals included
    const std::uint32_t special = 0x7f800000u & -static_cast<std::uint32_t>(shifted >= (0x7c00u << 13));
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(finite) | special | sign);
  }
};

}  // namespace pymape
