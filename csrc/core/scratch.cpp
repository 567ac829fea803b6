#include "scratch.h"

#include <cstdlib>
#include <new>
#include <utility>

namespace iumad {
namespace {

constexpr int64_t kKept = int64_t(8) << 20;

struct Kept {
  Scratch::Block block;
  ~Kept() { std::free(block.data); }
};
thread_local Kept kept;

}  // namespace

Scratch::Block Scratch::allocate(int64_t bytes) {
  if (kept.block.bytes >= bytes) return std::exchange(kept.block, Block{});
  const Block block = {static_cast<char*>(std::aligned_alloc(kAlign, round_up(bytes))), bytes};
  if (block.data == nullptr) throw std::bad_alloc();
  return block;
}

void Scratch::release(Block block) {
  if (block.bytes > kept.block.bytes && block.bytes <= kKept) std::swap(block, kept.block);
  std::free(block.data);
}

}  // namespace iumad
