// Cache-line aligned scratch memory, handed out piece by piece and released as a whole. Every thread keeps its largest block up
// to 8 MiB for the next call: memory fresh from the system would cost a page fault every 4 KiB.
#pragma once

#include <cstdint>

namespace iumad {

class Scratch {
 public:
  struct Block {
    char* data = nullptr;
    int64_t bytes = 0;
  };

  explicit Scratch(int64_t bytes) : block_(allocate(bytes)), next_(block_.data) {}
  ~Scratch() { release(block_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // What `take` needs for n values: add these up for the constructor.
  template <class T>
  static int64_t bytes(int64_t n) {
    return round_up(n * int64_t(sizeof(T)));
  }
  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(n);
    return p;
  }

 private:
  static constexpr int64_t kAlign = 64;
  static constexpr int64_t round_up(int64_t n) { return (n + kAlign) / kAlign * kAlign; }
  static Block allocate(int64_t bytes);
  static void release(Block block);
  Block block_;
  char* next_;
};

}  // namespace iumad
