// A fiber: a function with a stack of its own that hands control to another fiber and later goes on.
//
// The switch saves what the calling convention says a function must keep; on other processors than x86-64 and
// aarch64, ucontext does it, some twenty times slower. AddressSanitizer is told of every switch.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#define XLSTM_HOST_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define XLSTM_HOST_ASAN 1
#endif
#endif

#ifdef XLSTM_HOST_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#define XLSTM_HOST_UCONTEXT 1
#endif

#ifndef XLSTM_HOST_UCONTEXT
// Pushes the registers to keep, leaves the stack pointer in *save, and pops those of `to`. A definition in every
// object, of which the linker keeps one.
extern "C" void xlstm_host_switch(void **save, void *to);
#ifdef __x86_64__
asm(R"(
    .pushsection .text.xlstm_host_switch,"axG",@progbits,xlstm_host_switch,comdat
    .weak xlstm_host_switch
    .hidden xlstm_host_switch
    .type xlstm_host_switch,@function
xlstm_host_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size xlstm_host_switch,.-xlstm_host_switch
    .popsection
)");
#else
asm(R"(
    .pushsection .text.xlstm_host_switch,"axG",@progbits,xlstm_host_switch,comdat
    .weak xlstm_host_switch
    .hidden xlstm_host_switch
    .type xlstm_host_switch,@function
xlstm_host_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size xlstm_host_switch,.-xlstm_host_switch
    .popsection
)");
#endif
#endif

namespace xlstm::host {

#ifdef XLSTM_HOST_ASAN
constexpr size_t STACK = 256 << 10;
#else
constexpr size_t STACK = 128 << 10;
#endif
constexpr size_t GUARD = 64 << 10;  // a multiple of every page size: an overflow faults instead of corrupting

// The stack of one fiber, or (without memory of its own) that of the thread which the fibers run on.
class Fiber {
public:
    Fiber() = default;
    Fiber(const Fiber &) = delete;
    Fiber &operator=(const Fiber &) = delete;

    // Makes the fiber ready to run `entry`, which never returns.
    void prepare(void (*entry)()) {
        if (memory_ == nullptr) {
            constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
            void *const memory = mmap(nullptr, GUARD + STACK, PROT_READ | PROT_WRITE, flags, -1, 0);
            if (memory == MAP_FAILED || mprotect(memory, GUARD, PROT_NONE) != 0) {
                std::perror("stack of a fiber");
                std::abort();
            }
            memory_ = static_cast<char *>(memory) + GUARD;
        }
#ifdef XLSTM_HOST_ASAN
        __asan_unpoison_memory_region(memory_, STACK);  // frames that the last `entry` never left
        shadow_ = nullptr;
        bottom_ = memory_, size_ = STACK;
#endif
#ifdef XLSTM_HOST_UCONTEXT
        getcontext(&context_);
        context_.uc_stack.ss_sp = memory_;
        context_.uc_stack.ss_size = STACK;
        context_.uc_link = nullptr;
        makecontext(&context_, entry, 0);
#else
        // As if `entry` had been about to begin when it switched away: registers to pop and its address. On
        // x86-64 a function begins 8 bytes off a multiple of 16.
        auto *top = reinterpret_cast<void **>(memory_ + STACK);
#ifdef __x86_64__
        top -= 2;
        top[0] = reinterpret_cast<void *>(entry);
        top -= 6;
        for (int x = 0; x < 6; ++x) top[x] = nullptr;
#else
        top -= 20;
        for (int x = 0; x < 20; ++x) top[x] = nullptr;
        top[11] = reinterpret_cast<void *>(entry);
#endif
        sp_ = top;
#endif
    }

    // Goes on with `to`; returns when some fiber switches back here. With `last`, none will.
    void switch_to(Fiber &to, bool last = false) {
#ifdef XLSTM_HOST_ASAN
        came_from() = this;
        __sanitizer_start_switch_fiber(last ? nullptr : &shadow_, to.bottom_, to.size_);
#else
        (void)last;
#endif
#ifdef XLSTM_HOST_UCONTEXT
        swapcontext(&context_, &to.context_);
#else
        xlstm_host_switch(&sp_, to.sp_);
#endif
        arrived();
    }

    // To be called first by `entry`.
    void arrived() {
#ifdef XLSTM_HOST_ASAN
        Fiber &from = *came_from();
        __sanitizer_finish_switch_fiber(shadow_, &from.bottom_, &from.size_);
#endif
    }

private:
    char *memory_ = nullptr;
#ifdef XLSTM_HOST_UCONTEXT
    ucontext_t context_;
#else
    void *sp_ = nullptr;
#endif
#ifdef XLSTM_HOST_ASAN
    static Fiber *&came_from() {
        static Fiber *from = nullptr;
        return from;
    }
    void *shadow_ = nullptr;
    const void *bottom_ = nullptr;
    size_t size_ = 0;
#endif
};

}  // namespace xlstm::host
