#pragma once
#include "half.h"

using __half = pymape::Half;
inline float __half2float(__half value) { return value; }
inline __half __float2half(float value) { return __half(value); }
