// The host's version of cuda/load.cuh: names only; the kernels that run here use none of sm_90's barriers and copies.
#pragma once

using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using uint64 = unsigned long long;

#define INLINE inline
