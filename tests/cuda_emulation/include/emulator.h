// Runs CUDA kernels on the CPU, one block after the other, its threads as fibers, and checks what a GPU would let pass:
//
// - a barrier that not all threads of the block reach, or that they reach at different places;
// - warp collectives whose mask lacks the caller, differs between lanes, names lanes that have ended, or that read a lane outside
// it;
// - shared memory read before it is written, used out of bounds, or used by two threads without a barrier between
//   (checked_shared_array.h);
// - threads that wait for each other for ever.
//
// Accesses to global memory are ordinary loads and stores: AddressSanitizer finds those out of bounds. A finding is an
// emulation::Error thrown from the launch. Not modelled: clusters, asynchronous copies, atomics, warp-level memory order other
// than __syncwarp of the whole warp.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <numeric>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order { kForward, kReverse, kShuffled };
inline Order order = Order::kForward;  // in which threads run between two barriers: results must not depend on it

enum class Collective { kShuffle, kVote, kSync };

struct Thread {
  enum State { kReady, kAtBarrier, kInWarp, kDone } state = kReady;
  Fiber fiber;
  uint3 index;
  unsigned number, warp, lane;
  std::source_location where;
  // The warp collective it waits in, and what came out of it.
  Collective collective;
  unsigned mask, source;
  uint64_t value, result;
};

// Shared arrays, which forget their contents when a block starts.
struct SharedMemory {
  virtual void poison() = 0;

 protected:
  SharedMemory() { all().push_back(this); }
  ~SharedMemory() = default;

 public:
  SharedMemory(const SharedMemory&) = delete;
  static std::vector<SharedMemory*>& all() {
    static std::vector<SharedMemory*> arrays;
    return arrays;
  }
};

class Emulator {
 public:
  Thread* current = nullptr;
  dim3 grid, block;
  uint3 block_index{}, thread_index{};
  uint64_t epoch = 0;                     // counts barriers of the block, and blocks
  std::array<uint64_t, 32> warp_epoch{};  // counts __syncwarp of each warp

  void run(dim3 blocks, dim3 threads, const std::function<void()>& kernel) {
    if (current) throw Error("a kernel launched another one");
    if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) throw Error("a grid without blocks");
    if (blocks.x > 2147483647u || blocks.y > 65535 || blocks.z > 65535) throw Error("a grid beyond the limits of the hardware");
    count_ = threads.x * threads.y * threads.z;
    if (count_ == 0 || count_ > 1024) throw Error("a block of " + std::to_string(count_) + " threads");
    while (threads_.size() < count_) threads_.emplace_back();
    grid = blocks, block = threads, kernel_ = &kernel;
    for (unsigned z = 0; z < blocks.z; ++z)
      for (unsigned y = 0; y < blocks.y; ++y)
        for (unsigned x = 0; x < blocks.x; ++x) run_block({x, y, z});
  }

  void barrier(std::source_location where) {
    current->where = where;
    current->state = Thread::kAtBarrier;
    current->fiber.suspend();
  }

  // All lanes of `mask` meet here; each gets its own result.
  uint64_t meet(Collective collective, unsigned mask, uint64_t value, unsigned source, std::source_location where) {
    Thread& me = *current;
    if (!(mask >> me.lane & 1)) fail("a warp collective whose mask " + hex(mask) + " lacks the calling lane", where);
    me.where = where, me.collective = collective, me.mask = mask, me.value = value, me.source = source;
    me.state = Thread::kInWarp;
    bool complete = true;
    for_lanes(mask, [&](Thread* other, unsigned lane) {
      if (other == nullptr)
        fail("a mask " + hex(mask) + " that names lane " + std::to_string(lane) + ", which does not exist", where);
      if (other->state == Thread::kDone) fail("a mask that names lane " + std::to_string(lane) + ", which has ended", where);
      if (other->state != Thread::kInWarp) {
        complete = false;
      } else if (other->mask != mask || other->collective != collective) {
        fail("lanes of a warp in different collectives: lane " + std::to_string(lane) + " is at " + place(other->where) +
                 " with mask " + hex(other->mask) + ", not " + hex(mask),
             where);
      }
    });
    if (complete) {
      uint64_t votes = 0;
      for_lanes(mask, [&](Thread* t, unsigned lane) { votes |= uint64_t(t->value != 0) << lane; });
      for_lanes(mask, [&](Thread* t, unsigned lane) {
        if (collective == Collective::kShuffle && !(mask >> t->source & 1))
          fail("lane " + std::to_string(lane) + " shuffles from lane " + std::to_string(t->source) + ", which its mask lacks",
               where);
        t->result = collective == Collective::kShuffle ? threads_[t->warp * 32 + t->source].value : votes;
        t->state = Thread::kReady;
      });
      if (collective == Collective::kSync && mask == 0xffffffffu) ++warp_epoch[me.warp];
    } else {
      me.fiber.suspend();
    }
    return me.result;
  }

  [[noreturn]] void fail(const std::string& what, std::source_location where) {
    error_ = what + " (at " + place(where) + ", " + describe(*current) + ")";
    current->fiber.finish();
  }

 private:
  static std::string place(std::source_location w) {
    const std::string file = w.file_name();
    return file.substr(file.rfind('/') + 1) + ":" + std::to_string(w.line());
  }
  static std::string hex(unsigned mask) {
    char text[16];
    snprintf(text, sizeof text, "0x%08x", mask);
    return text;
  }
  std::string describe(const Thread& t) const {
    return "block " + std::to_string(block_index.x) + " thread " + std::to_string(t.number);
  }

  template <class F>
  void for_lanes(unsigned mask, F&& f) {
    for (unsigned lane = 0; lane < 32; ++lane) {
      const unsigned number = current->warp * 32 + lane;
      if (mask >> lane & 1) f(number < count_ ? &threads_[number] : nullptr, lane);
    }
  }

  static Emulator& instance();
  static void entry() {
    Emulator& e = instance();
    Thread& me = *e.current;
    me.fiber.entered();
    (*e.kernel_)();
    me.state = Thread::kDone;
    me.fiber.finish();
  }

  void run_block(uint3 index) {
    block_index = index;
    ++epoch;
    for (SharedMemory* array : SharedMemory::all()) array->poison();
    std::vector<unsigned> turn(count_);
    std::iota(turn.begin(), turn.end(), 0u);
    if (order == Order::kReverse) std::reverse(turn.begin(), turn.end());
    if (order == Order::kShuffled)
      for (unsigned i = count_; i > 1; --i) {
        random_ = random_ * 6364136223846793005u + 1442695040888963407u;
        std::swap(turn[i - 1], turn[(random_ >> 33) % i]);
      }
    for (unsigned n = 0; n < count_; ++n) {
      Thread& t = threads_[n];
      t.index = {n % block.x, n / block.x % block.y, n / block.x / block.y};
      t.number = n, t.warp = n / 32, t.lane = n % 32, t.state = Thread::kReady;
      t.fiber.start(&entry);
    }
    while (step(turn)) {
    }
  }

  // Every thread that can run does so, until it waits. False when all have ended.
  bool step(const std::vector<unsigned>& turn) {
    unsigned ran = 0, waiting = 0, done = 0;
    Thread* waits = nullptr;
    for (unsigned n : turn) {
      Thread& t = threads_[n];
      if (t.state == Thread::kReady) {
        ++ran;
        current = &t;
        thread_index = t.index;
        t.fiber.resume();
        current = nullptr;
        if (!error_.empty()) throw Error(std::exchange(error_, {}));
      }
      if (t.state == Thread::kAtBarrier) ++waiting, waits = &t;
      if (t.state == Thread::kDone) ++done;
    }
    if (done == count_) return false;
    if (waiting == count_) {
      for (unsigned n = 0; n < count_; ++n) {
        Thread& t = threads_[n];
        if (t.where.line() != waits->where.line() || std::strcmp(t.where.file_name(), waits->where.file_name()) != 0)
          throw Error("divergent barrier: " + describe(t) + " is at " + place(t.where) + ", " + describe(*waits) + " at " +
                      place(waits->where));
        t.state = Thread::kReady;
      }
      ++epoch;
    } else if (ran == 0 && waits && waiting + done == count_) {
      throw Error("divergent barrier: " + describe(*waits) + " waits at " + place(waits->where) + " for threads that have ended");
    } else if (ran == 0) {
      for (unsigned n = 0; n < count_; ++n)
        if (threads_[n].state == Thread::kInWarp)
          throw Error("deadlock: " + describe(threads_[n]) + " waits at " + place(threads_[n].where) + " for lanes of mask " +
                      hex(threads_[n].mask));
    }
    return true;
  }

  std::deque<Thread> threads_;
  unsigned count_ = 0;
  uint64_t random_ = 1;
  const std::function<void()>* kernel_ = nullptr;
  std::string error_;
};

inline Emulator& emulator() {
  static Emulator e;
  return e;
}
inline Emulator& Emulator::instance() { return emulator(); }

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T shuffle(unsigned mask, T value, unsigned source, std::source_location where) {
  const uint64_t bits = emulator().meet(Collective::kShuffle, mask, to_bits(value), source, where);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulation
