#include "signals.hpp"

#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>

#include "block.hpp"

namespace fusewright_simulator {

thread_local Thread* running = nullptr;

namespace {

// What a kernel can provoke, then the interrupt.
constexpr std::array kSignals = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGINT};
std::array<struct sigaction, kSignals.size()> before;
std::mutex mutex;
unsigned launches = 0;
std::atomic<bool> interrupt{false};
std::array<std::atomic<pid_t>, 1024> workers;  // the OS threads that simulate

#if defined(__x86_64__)
uintptr_t program_counter(const ucontext_t& at) { return static_cast<uintptr_t>(at.uc_mcontext.gregs[REG_RIP]); }
uintptr_t stack_pointer(const ucontext_t& at) { return static_cast<uintptr_t>(at.uc_mcontext.gregs[REG_RSP]); }
void go_to(ucontext_t& at, void (*entry)(), StackTop* stack) {
    at.uc_mcontext.gregs[REG_RIP] = reinterpret_cast<greg_t>(entry);
    at.uc_mcontext.gregs[REG_RSP] = reinterpret_cast<greg_t>(stack) - 8;  // as after a call
}
#else
uintptr_t program_counter(const ucontext_t& at) { return at.uc_mcontext.pc; }
uintptr_t stack_pointer(const ucontext_t& at) { return at.uc_mcontext.sp; }
void go_to(ucontext_t& at, void (*entry)(), StackTop* stack) {
    at.uc_mcontext.pc = reinterpret_cast<uintptr_t>(entry);
    at.uc_mcontext.sp = reinterpret_cast<uintptr_t>(stack);
}
#endif

// Where the kernel stood: the instruction, or the return address that lies close by if it has called something.
const char* kernel_place(const Thread& thread, uintptr_t pc, uintptr_t stack) {
    if (thread.block->in_code(pc)) return reinterpret_cast<const char*>(pc) + 1;
    const auto top = reinterpret_cast<uintptr_t>(thread.stack);
    if (top - stack > kStackBytes) return nullptr;
    // Not far: what lies deeper may be left from other calls.
    const uintptr_t begin = std::max(stack, lowest(thread.stack)) & ~uintptr_t(7), end = std::min(begin + 256, top);
    for (auto* word = reinterpret_cast<const uintptr_t*>(begin); word < reinterpret_cast<const uintptr_t*>(end); ++word)
        if (thread.block->in_code(*word)) return reinterpret_cast<const char*>(*word);
    return nullptr;
}

// Makes the fiber go on with a report, at the top of its own stack, to which nobody returns.
void redirect(Thread& thread, int signal, const siginfo_t& info, ucontext_t& at) {
    const auto address = reinterpret_cast<uintptr_t>(info.si_addr);
    const uintptr_t pc = program_counter(at), end = reinterpret_cast<uintptr_t>(thread.stack + 1);
    thread.fault = {signal, address, kernel_place(thread, pc, stack_pointer(at)), address == pc && signal != SIGILL,
                    thread.stack->thread != &thread || address - end < kStackGuardBytes};
    thread.stack->thread = &thread;
    go_to(at, &Block::report_fault, thread.stack);
}

void pass_on(int signal, siginfo_t* info, void* context) {
    const auto at = static_cast<size_t>(std::find(kSignals.begin(), kSignals.end(), signal) - kSignals.begin());
    const struct sigaction& old = before[at];
    if (old.sa_flags & SA_SIGINFO) return old.sa_sigaction(signal, info, context);
    if (old.sa_handler != SIG_DFL && old.sa_handler != SIG_IGN) return old.sa_handler(signal);
    sigaction(signal, &old, nullptr);  // the fault comes again, and ends the process
}

void on_fault(int signal, siginfo_t* info, void* context) {
    Thread* thread = running;
    if (!thread || thread->fault.signal) return pass_on(signal, info, context);
    redirect(*thread, signal, *info, *static_cast<ucontext_t*>(context));
}

void on_interrupt(int signal, siginfo_t* info, void* context) {
    const bool first = !interrupt.exchange(true);
    auto& at = *static_cast<ucontext_t*>(context);
    // Kernel code can be left anywhere; whatever else runs comes to the scheduler by itself.
    Thread* thread = running;
    if (thread && !thread->fault.signal && thread->block->in_code(program_counter(at)))
        redirect(*thread, signal, *info, at);
    if (!first && info->si_code == SI_TKILL) return;  // from the lines below, on another OS thread
    const pid_t self = static_cast<pid_t>(syscall(SYS_gettid));
    for (auto& worker : workers)
        if (const pid_t id = worker.load(); id && id != self) syscall(SYS_tgkill, getpid(), id, signal);
    pass_on(signal, info, context);
}

}  // namespace

bool interrupted() { return interrupt.load(std::memory_order_relaxed); }

SignalHandlers::SignalHandlers() {
    std::lock_guard lock(mutex);
    if (launches++) return;
    interrupt.store(false);
    for (size_t i = 0; i < kSignals.size(); ++i) {
        sigaction(kSignals[i], nullptr, &before[i]);
        struct sigaction ours {};
        ours.sa_sigaction = kSignals[i] == SIGINT ? on_interrupt : on_fault;
        ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
        // An interrupt that nobody handles ends the process, or is ignored: so be it.
        const bool handled = before[i].sa_handler != SIG_DFL && before[i].sa_handler != SIG_IGN;
        if (kSignals[i] != SIGINT || handled) sigaction(kSignals[i], &ours, nullptr);
    }
}

SignalHandlers::~SignalHandlers() {
    std::lock_guard lock(mutex);
    if (--launches) return;
    for (size_t i = 0; i < kSignals.size(); ++i) {
        struct sigaction now;
        sigaction(kSignals[i], nullptr, &now);
        if (now.sa_sigaction == on_fault || now.sa_sigaction == on_interrupt)  // else somebody has changed it since
            sigaction(kSignals[i], &before[i], nullptr);
    }
}

SignalStack::SignalStack() : memory_(new char[64 * 1024]), slot_(-1) {
    stack_t ours{};
    ours.ss_sp = memory_.get();
    ours.ss_size = 64 * 1024;
    sigaltstack(&ours, &before_);
    const pid_t self = static_cast<pid_t>(syscall(SYS_gettid));
    for (size_t i = 0; i < workers.size() && slot_ < 0; ++i) {
        pid_t free = 0;
        if (workers[i].compare_exchange_strong(free, self)) slot_ = static_cast<int>(i);
    }
}

SignalStack::~SignalStack() {
    if (slot_ >= 0) workers[static_cast<size_t>(slot_)].store(0);
    sigaltstack(&before_, nullptr);
}

}  // namespace fusewright_simulator
