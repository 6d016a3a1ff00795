#include "fiber.hpp"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

namespace fusewright_simulator {

#if defined(__x86_64__)

// Callee-saved registers go on the old stack; nothing else differs between two fibers.
asm(R"(
.text
.p2align 4
.type fusewright_simulator_switch, @function
fusewright_simulator_switch:
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
.size fusewright_simulator_switch, .-fusewright_simulator_switch
)");
extern "C" void fusewright_simulator_switch(void** from, void* to) __attribute__((visibility("hidden")));

void switch_context(Context& from, Context& to) {
    fusewright_simulator_switch(&from.stack_pointer, to.stack_pointer);
}

void prepare_context(Context& context, StackTop* stack, void (*entry)()) {
    // What the switch pops: six registers, then `entry` as its return address, then a null return address for `entry`.
    auto** top = reinterpret_cast<void**>(stack);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    context.stack_pointer = top;
}

#else

void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

void prepare_context(Context& context, StackTop* stack, void (*entry)()) {
    getcontext(&context.state);
    char* bottom = reinterpret_cast<char*>(stack + 1) - kStackBytes;
    context.state.uc_stack.ss_sp = bottom;
    context.state.uc_stack.ss_size = kStackBytes - sizeof(StackTop);
    context.state.uc_link = nullptr;
    makecontext(&context.state, entry, 0);
}

#endif

StackTop* StackPool::take() {
    if (free_.empty()) {
        // Many stacks at a time: one mapping, aligned by cutting. Guards below each and above the last.
        constexpr size_t kStacks = 64;
        constexpr size_t kBytes = (kStacks + 1) * kStackBytes;
        void* mapping = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
        if (mapping == MAP_FAILED) throw std::bad_alloc();
        mappings_.push_back(mapping);
        uintptr_t base = (reinterpret_cast<uintptr_t>(mapping) + kStackBytes - 1) & ~(kStackBytes - 1);
        const uintptr_t end = base + kStacks * kStackBytes;
        mprotect(reinterpret_cast<void*>(end), reinterpret_cast<uintptr_t>(mapping) + kBytes - end, PROT_NONE);
        for (size_t i = kStacks; i-- > 0;) {
            uintptr_t bottom = base + i * kStackBytes;
            mprotect(reinterpret_cast<void*>(bottom), kStackGuardBytes, PROT_NONE);
            free_.push_back(reinterpret_cast<StackTop*>(bottom + kStackBytes) - 1);
        }
    }
    StackTop* stack = free_.back();
    free_.pop_back();
    return stack;
}

StackPool::~StackPool() {
    for (void* mapping : mappings_) munmap(mapping, 65 * kStackBytes);
}

}  // namespace fusewright_simulator
