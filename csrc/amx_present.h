// Whether this process may use AMX-BF16: the processor has it, and Linux grants its register state, which every process has
// to ask for once, for all of its threads (Documentation/arch/x86/xstate.rst).
#pragma once
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace moebius {

inline bool ask_for_amx() {
    unsigned a, b, c, d;
    constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;  // leaf 7, edx
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & AMX_BF16) || !(d & AMX_TILE)) return false;
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

inline bool amx_present() {
    static const bool present = ask_for_amx();
    return present;
}

}  // namespace moebius
