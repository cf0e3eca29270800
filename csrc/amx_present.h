// Whether this process may use AMX: the processor has it, for bfloat16 and bytes, and Linux grants its register state, which
// every process has to ask for once, for all of its threads (Documentation/arch/x86/xstate.rst).
#pragma once
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace moebius {

inline bool ask_for_amx() {
    unsigned a, b, c, d;
    constexpr unsigned NEEDED = 1u << 22 | 1u << 24 | 1u << 25;  // leaf 7, edx: AMX-BF16, AMX-TILE, AMX-INT8
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & NEEDED) != NEEDED) return false;
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

inline bool amx_present() {
    static const bool present = ask_for_amx();
    return present;
}

}  // namespace moebius
