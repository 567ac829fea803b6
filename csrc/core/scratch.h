// Cache-line aligned scratch memory, handed out piece by piece and released as a whole.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace iumad {

class Scratch {
 public:
  explicit Scratch(int64_t bytes) : data_(static_cast<char*>(std::aligned_alloc(kAlign, round_up(bytes)))) {
    if (data_ == nullptr) throw std::bad_alloc();
    next_ = data_;
  }
  ~Scratch() { std::free(data_); }
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
  static int64_t round_up(int64_t n) { return (n + kAlign) / kAlign * kAlign; }
  char* data_;
  char* next_;
};

}  // namespace iumad
