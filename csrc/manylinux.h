// Included before all else in a build with -DMOEBIUS_MANYLINUX=ON (GCC on Linux), so that what a new compiler builds loads
// wherever torch's own wheels load: glibc 2.28 and the libstdc++ of GCC 8.
//
// The linker binds a name to its newest version. Where that is newer than those libraries, an older one is named here, or
// the function is replaced (manylinux.cpp). auditwheel tells what a wheel needs (Makefile, target wheel).
#pragma once

#if defined(__x86_64__)
#define MOEBIUS_FIRST_GLIBC "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define MOEBIUS_FIRST_GLIBC "GLIBC_2.17"
#else
#error "csrc/manylinux.h knows x86-64 and AArch64; build without MOEBIUS_MANYLINUX"
#endif

// glibc 2.29 has a `log` that leaves errno alone; its results are the same.
__asm__(".symver log, log@" MOEBIUS_FIRST_GLIBC);
// GCC 12 has a `wait` that a cancelled thread can leave by an exception; nobody cancels threads here.
__asm__(".symver _ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE, "
        "_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE@GLIBCXX_3.4.11");
