// What only GCC 11 and later, or new versions of glibc, have: made of what is older (manylinux.h says what for). Other
// libraries do not see it: the module exports its entry alone.
#include <exception>
#include <new>

extern "C" void moebius_copy_exception(void* to, const void* from);
extern "C" void moebius_assign_exception(void* to, const void* from);
// exception_ptr's copy constructor and assignment, which were not inline then.
__asm__(".symver moebius_copy_exception, _ZNSt15__exception_ptr13exception_ptrC1ERKS0_@CXXABI_1.3.3");
__asm__(".symver moebius_assign_exception, _ZNSt15__exception_ptr13exception_ptraSERKS0_@CXXABI_1.3.3");

// The headers declare these visible; were they so here, the library's own would be bound.
__asm__(".hidden _ZSt28__throw_bad_array_new_lengthv");
__asm__(".hidden _ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
__asm__(".hidden _ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");

// Here glibc 2.32 tells libstdc++ whether there is but one thread, so that shared_ptr may count without atomics. There are
// several.
__asm__(".hidden __libc_single_threaded");
extern "C" char __libc_single_threaded;
char __libc_single_threaded = false;

namespace std {

// What containers call that are asked for more elements than there are addresses.
void __throw_bad_array_new_length() { throw bad_array_new_length(); }

namespace __exception_ptr {

// One more holder: a copy that is never destroyed.
void exception_ptr::_M_addref() noexcept {
    void* copy;
    moebius_copy_exception(&copy, this);
}

// One holder fewer: what holds it is given nothing instead.
void exception_ptr::_M_release() noexcept {
    const void* const nothing = nullptr;
    moebius_assign_exception(this, &nothing);
}

}  // namespace __exception_ptr
}  // namespace std
