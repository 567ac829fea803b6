// A fiber: a function with a stack of its own that can be left in the middle and gone on with later.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

class Fiber {
 public:
  static constexpr size_t kStack = 128 * 1024;

  Fiber() : stack_(static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))) {
    if (stack_ == MAP_FAILED) std::abort();
  }
  Fiber(const Fiber&) = delete;
  ~Fiber() { munmap(stack_, kStack); }

  // Prepares entry() to run; it must leave by finish(), never return. A fiber given up in the middle may be started again.
  void start(void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_, kStack);
#endif
#if defined(__x86_64__)
    auto** top = reinterpret_cast<void**>(stack_ + kStack);
    *--top = nullptr;  // where entry would return to; keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(entry);
    top -= 6;  // the registers switch_stack restores
    inside_ = top;
#else
    getcontext(&inside_);
    inside_.uc_stack.ss_sp = stack_;
    inside_.uc_stack.ss_size = kStack;
    inside_.uc_link = nullptr;
    makecontext(&inside_, entry, 0);
#endif
  }

  // Runs the fiber until it suspends.
  void resume() {
    begin_switch(&outer_fake_stack_, stack_, kStack);
    swap(&outside_, &inside_);
    end_switch(outer_fake_stack_, nullptr, nullptr);
  }
  // Called inside the fiber, first thing in entry().
  void entered() { end_switch(nullptr, &outer_bottom_, &outer_size_); }
  // Called inside the fiber: back to resume().
  void suspend() {
    begin_switch(&fake_stack_, outer_bottom_, outer_size_);
    swap(&inside_, &outside_);
    end_switch(fake_stack_, &outer_bottom_, &outer_size_);
  }
  [[noreturn]] void finish() {
    begin_switch(nullptr, outer_bottom_, outer_size_);
    swap(&inside_, &outside_);
    std::abort();
  }

 private:
#if defined(__x86_64__)
  using Context = void*;
  // Saves the registers a call must keep on this stack, takes the other stack, restores its registers and returns there.
  __attribute__((naked, noinline)) static void switch_stack(void** /*save*/, void* /*load*/) {
    asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15; mov %rsp, (%rdi);"
        "mov %rsi, %rsp; pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
  }
  static void swap(Context* from, Context* to) { switch_stack(from, *to); }
#else
  using Context = ucontext_t;
  static void swap(Context* from, Context* to) { swapcontext(from, to); }
#endif

  // AddressSanitizer wants to know which stack it is on.
  static void begin_switch([[maybe_unused]] void** fake, [[maybe_unused]] const void* bottom, [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fake, bottom, size);
#endif
  }
  static void end_switch([[maybe_unused]] void* fake, [[maybe_unused]] const void** bottom, [[maybe_unused]] size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, bottom, size);
#endif
  }

  char* stack_;
  Context inside_{}, outside_{};
  void *outer_fake_stack_ = nullptr, *fake_stack_ = nullptr;
  const void* outer_bottom_ = nullptr;
  size_t outer_size_ = 0;
};

}  // namespace emulation
