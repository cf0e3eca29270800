// Places in arrays of elements whose type is known at run time.
#pragma once
#include <cstddef>

#include "kernels.h"

namespace moebius {

inline size_t size_of(Dtype dtype) { return dtype == BF16 ? 2 : 4; }

inline const char* at(const void* base, size_t bytes) { return static_cast<const char*>(base) + bytes; }
inline char* at(void* base, size_t bytes) { return static_cast<char*>(base) + bytes; }

}  // namespace moebius
