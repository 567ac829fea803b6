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

// What forward and backward want; measured, see benchmarks/cross_attention.py.
struct AttentionLimits {
  int64_t tasks;  // cut the queries of a head until there are so many tasks,
  int64_t min_chunk,
      max_chunk;          // but each task has so many queries: every task packs the keys, and in backward leaves partial sums
  int64_t one_pass_keys;  // up to so many keys are taken at once,
  int64_t key_block;      // beyond it about so many (a multiple of kPhiloxBlock)
  int64_t score_bytes;    // held at a time, for so many matrices of them,
  int64_t score_copies;
  int64_t min_rows;  // but for so many queries
};

// `weights`: they are wanted or have a gradient. A row of them is then taken at once, however long.
template <class P>
inline AttentionPlan plan_attention(const CrossAttention& s, bool weights, const AttentionLimits& limits) {
  using F = typename P::Compute;
  const auto parts = [](int64_t whole, int64_t part) { return (whole + part - 1) / part; };
  AttentionPlan plan;
  plan.all_heads = weights;
  const int64_t key_blocks = weights || s.keys <= limits.one_pass_keys ? 1 : parts(s.keys, limits.key_block);
  plan.key_block = key_blocks == 1 ? s.keys : round_up(parts(s.keys, key_blocks), kPhiloxBlock);

  const int64_t heads = s.batch * (weights ? 1 : s.key_heads);
  int64_t chunks = heads > 0 ? parts(limits.tasks, heads) : 1;
  const int64_t fewest = parts(s.queries, limits.max_chunk), most = parts(s.queries, limits.min_chunk);
  chunks = chunks > most ? most : chunks;
  chunks = chunks < fewest ? fewest : chunks;
  plan.chunk = s.queries > 0 ? round_up(parts(s.queries, chunks), P::kRowStep) : 0;
  plan.chunks = plan.chunk > 0 ? parts(s.queries, plan.chunk) : 0;

  const int64_t row_bytes = limits.score_copies * (row_length<F>(plan.key_block) + 1) * int64_t(sizeof(F));
  const int64_t rows = limits.score_bytes / row_bytes;
  const int64_t blocks = parts(plan.chunk, rows < limits.min_rows ? limits.min_rows : rows);
  plan.row_block = blocks > 0 ? round_up(parts(plan.chunk, blocks), P::kTileRows) : 0;
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
