// The shared array of csrc/cuda/shared_array.cuh with every access checked: bounds, alignment, initialisation, races.
//
// Two accesses of which one writes race when different threads make them with neither a __syncthreads nor, inside a warp, a
// __syncwarp of the whole warp between. The order the fibers happen to run in plays no part.
#pragma once

#include <limits>

#include "cuda_runtime.h"

namespace iumad::cuda {

template <class T, int kSize>
class SharedArray : emulation::SharedMemory {
 public:
  T operator[](int i) const {
    check_read(i);
    return data_[i];
  }
  void put(int i, T value) {
    check_write(i);
    data_[i] = value;
  }
  template <int n>
  void load(int i, T (&out)[n]) const {
    check_alignment(i);
    for (int j = 0; j < n; ++j) out[j] = (*this)[i + j];
  }
  template <int n>
  void store(int i, const T (&in)[n]) {
    check_alignment(i);
    for (int j = 0; j < n; ++j) put(i + j, in[j]);
  }

  void poison() override {
    for (T& value : data_) value = std::numeric_limits<T>::has_quiet_NaN ? std::numeric_limits<T>::quiet_NaN() : T(-1);
    for (Cell& cell : cells_) cell = {};
  }

 private:
  struct Access {
    uint64_t epoch = 0, warp_epoch = 0;  // epoch 0: never
    unsigned thread = 0;
    bool several_warps = false, several_threads = false;
  };
  struct Cell {
    Access write, read;
  };

  static emulation::Emulator& e() { return emulation::emulator(); }
  [[noreturn]] static void fail(const std::string& what, int i) {
    e().fail(what + " element " + std::to_string(i) + " of a shared array of " + std::to_string(kSize), Where::current());
  }
  static void check_bounds(int i) {
    if (i < 0 || i >= kSize) fail("out of bounds:", i);
  }
  static void check_alignment(int i) {
    if (i * sizeof(T) % 16 != 0) fail("a 16-byte access that is not aligned:", i);
  }
  // Whether an earlier access may overlap in time with one of the current thread.
  static bool concurrent(const Access& a) {
    const emulation::Thread& me = *e().current;
    if (a.epoch != e().epoch || (a.thread == me.number && !a.several_threads)) return false;
    return a.several_warps || a.thread / 32 != me.warp || a.warp_epoch == e().warp_epoch[me.warp];
  }
  static void record_read(Access& a) {
    const emulation::Thread& me = *e().current;
    if (a.epoch != e().epoch) a = {e().epoch, 0, me.number};
    a.several_threads |= a.thread != me.number;
    a.several_warps |= a.thread / 32 != me.warp;
    a.warp_epoch = e().warp_epoch[me.warp];
  }
  void check_read(int i) const {
    check_bounds(i);
    Cell& cell = cells_[i];
    if (cell.write.epoch == 0) fail("read before it is written:", i);
    if (concurrent(cell.write)) fail("race: read while another thread (" + std::to_string(cell.write.thread) + ") writes", i);
    record_read(cell.read);
  }
  void check_write(int i) {
    check_bounds(i);
    Cell& cell = cells_[i];
    if (concurrent(cell.write)) fail("race: written by this and another thread (" + std::to_string(cell.write.thread) + "):", i);
    if (concurrent(cell.read))
      fail("race: written while another thread (such as " + std::to_string(cell.read.thread) + ") reads", i);
    cell.write = {e().epoch, e().warp_epoch[e().current->warp], e().current->number};
  }

  alignas(16) T data_[kSize];
  mutable Cell cells_[kSize];
};

// One object in shared memory, checked as a whole where a reference to it is taken.
template <class T>
class SharedObject {
 public:
  const T& read() const {
    static_cast<void>(cell_[0]);
    return value_;
  }
  T& write() {
    cell_.put(0, 0);
    return value_;
  }

 private:
  SharedArray<int, 1> cell_;
  T value_;
};

}  // namespace iumad::cuda
