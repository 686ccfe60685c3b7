#pragma once
#include "half.h"

using __nv_bfloat16 = pymape::BFloat16;
inline float __bfloat162float(__nv_bfloat16 value) { return value; }
inline __nv_bfloat16 __float2bfloat16(float value) { return __nv_bfloat16(value); }
