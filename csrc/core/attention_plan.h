// How attention is cut into tasks and blocks. Depends on the shapes alone.
#pragma once

#include "attention_scores.h"
#include "matrix.h"
#include "matrix_bf16.h"

namespace iumad::IUMAD_ISA {

// Calls f with the way matrix blocks are multiplied. Files compiled for a bfloat16 matrix unit serve bfloat16 tensors only.
template <class Body>
inline auto with_products([[maybe_unused]] const CrossAttention& s, Body&& f) {
#if defined(__AVX512BF16__)
  return f(Bf16Pairs{});
#else
  return s.is_double ? f(Dense<double>{}) : f(Dense<float>{});
#endif
}

struct TaskRange {
  int64_t batch, key_head, first, count;  // queries [first, first + count); key_head means nothing where a task walks over all
};

struct AttentionPlan {
  int64_t chunk;      // queries of a task
  int64_t chunks;     // tasks per key head
  int64_t key_block;  // keys taken at a time
  int64_t row_block;  // queries whose scores are held at a time
  bool all_heads;     // a task walks over all heads (the weights are averaged over them)

  TaskRange range(const CrossAttention& s, int64_t task) const {
    const int64_t head = task / chunks, first = task % chunks * chunk, heads = all_heads ? 1 : s.key_heads;
    return {head / heads, head % heads, first, s.queries - first < chunk ? s.queries - first : chunk};
  }
  int64_t tasks(const CrossAttention& s) const { return s.batch * (all_heads ? 1 : s.key_heads) * chunks; }
};

// `copies`: matrices of scores held at a time. `weights`: they are wanted or have a gradient.
template <class P>
inline AttentionPlan plan_attention(const CrossAttention& s, bool weights, int64_t copies, int64_t max_chunk) {
  constexpr int64_t kTasks = 48,
                    kMinChunk = 128;  // enough tasks for many threads, but not at the price of packing keys too often
  constexpr int64_t kMaxKeys = 1024, kKeyBlock = 512;  // up to kMaxKeys in one pass, beyond it online
  constexpr int64_t kScoreBytes = 128 * 1024;
  constexpr int64_t kMinRows = 96;
  AttentionPlan plan;
  plan.all_heads = weights;
  plan.key_block = weights || s.keys <= kMaxKeys ? s.keys : kKeyBlock;
  const int64_t heads = s.batch * (weights ? 1 : s.key_heads);
  int64_t chunks = heads > 0 ? (kTasks + heads - 1) / heads : 1;
  const int64_t fewest = (s.queries + max_chunk - 1) / max_chunk, most = (s.queries + kMinChunk - 1) / kMinChunk;
  chunks = chunks > most ? most : chunks;
  chunks = chunks < fewest ? fewest : chunks;
  chunks = chunks < 1 ? 1 : chunks;
  plan.chunk = round_up((s.queries + chunks - 1) / chunks, P::kStep);
  plan.chunks = plan.chunk > 0 ? (s.queries + plan.chunk - 1) / plan.chunk : 0;
  const int64_t row_bytes = copies * row_length<typename P::Compute>(plan.key_block) * int64_t(sizeof(typename P::Compute));
  const int64_t rows = kScoreBytes / (row_bytes > 0 ? row_bytes : 1), most_rows = rows < kMinRows ? kMinRows : rows;
  const int64_t blocks = (plan.chunk + most_rows - 1) / most_rows;
  plan.row_block = blocks > 0 ? round_up((plan.chunk + blocks - 1) / blocks, P::kStep) : 0;
  return plan;
}

inline Rows rows_of(const HeadView& t, int64_t b, int64_t h, int64_t first, int64_t count, int64_t columns) {
  char* data = static_cast<char*>(t.data) + (b * t.batch + h * t.head + first * t.token) * size_of(t.dtype);
  return {data, t.dtype, count, columns, t.token, t.feature};
}

// Defined in cross_attention_backward.cpp.
int64_t cross_attention_backward_parts(const CrossAttention& s, bool weights);
int64_t cross_attention_backward_tasks(const CrossAttention& s, bool weights);
void cross_attention_backward(const CrossAttention& s, const CrossAttentionGradients& d, int64_t begin, int64_t end);

}  // namespace iumad::IUMAD_ISA
