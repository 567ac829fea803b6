#include "cross_attention.h"

#include <math.h>

#include "attention_plan.h"
#include "scratch.h"

namespace iumad::IUMAD_ISA {
namespace {

template <class P>
AttentionPlan forward_plan(const CrossAttention& s) {
  return plan_attention<P>(
      s, s.weights != nullptr,
      {.tasks = 48, .min_chunk = 128, .max_chunk = 512, .one_pass_keys = 1024, .key_block = 512, .score_copies = 1});
}

template <class P>
class Forward {
  using F = typename P::Compute;
  using T = typename P::Operand;

 public:
  explicit Forward(const CrossAttention& s)
      : s_(s),
        plan_(forward_plan<P>(s)),
        dim_(round_up(s.dim, P::kStep)),
        value_dim_(round_up(s.value_dim, P::kStep)),
        ld_query_(row_length<T>(dim_)),
        ld_value_(row_length<T>(value_dim_)),
        ld_out_(row_length<F>(value_dim_)),
        ld_score_(row_length<F>(round_up(plan_.key_block, P::kStep))),
        rows_(s.group() * plan_.chunk),
        keys_(round_up(plan_.key_block, P::kStep)),
        scratch_(Scratch::bytes<T>(rows_ * ld_query_) + Scratch::bytes<T>(keys_ * ld_query_) +
                 Scratch::bytes<T>(keys_ * ld_value_) + Scratch::bytes<T>(P::transposed_size(dim_, keys_)) +
                 Scratch::bytes<T>(P::buffer_size(keys_, value_dim_)) +
                 Scratch::bytes<T>(P::buffer_size(plan_.row_block, keys_)) + Scratch::bytes<F>(plan_.row_block * ld_score_) +
                 Scratch::bytes<F>(rows_ * ld_out_) + 2 * Scratch::bytes<F>(rows_) + 2 * Scratch::bytes<F>(keys_ + kPhiloxBlock) +
                 Scratch::bytes<uint32_t>(Dropout<F>::words(keys_))),
        query_(scratch_.take<T>(rows_ * ld_query_)),
        key_(scratch_.take<T>(keys_ * ld_query_)),
        value_(scratch_.take<T>(keys_ * ld_value_)),
        key_form_(scratch_.take<T>(P::transposed_size(dim_, keys_))),
        value_form_(scratch_.take<T>(P::buffer_size(keys_, value_dim_))),
        score_form_(scratch_.take<T>(P::buffer_size(plan_.row_block, keys_))),
        score_(scratch_.take<F>(plan_.row_block * ld_score_)),
        out_(scratch_.take<F>(rows_ * ld_out_)),
        max_(scratch_.take<F>(rows_)),
        sum_(scratch_.take<F>(rows_)),
        bias_(scratch_.take<F>(keys_ + kPhiloxBlock)),
        factor_(scratch_.take<F>(keys_ + kPhiloxBlock)),
        dropout_(s, scratch_.take<uint32_t>(Dropout<F>::words(keys_))) {}

  // `next`: the task after this one on the same thread, or -1.
  void run(int64_t task, int64_t next) {
    const TaskRange range = plan_.range(s_, task);
    first_ = range.first;
    count_ = range.count;
    if (plan_.all_heads) {
      prefetcher_.start(0);
      for (int64_t h = 0; h < s_.key_heads; ++h) run_head(range.batch, h);
    } else {
      prefetch(range.batch, range.key_head, next);
      run_head(range.batch, range.key_head);
    }
  }

 private:
  void prefetch(int64_t b, int64_t key_head, int64_t next) {
    const int64_t head = key_head * s_.group();
    prefetcher_.start(s_.group() * count_);
    prefetcher_.add(rows_of(s_.out, b, head, first_, count_, s_.value_dim), true);
    if (next < 0) return;
    const TaskRange n = plan_.range(s_, next);
    prefetcher_.add(rows_of(s_.query, n.batch, n.key_head * s_.group(), n.first, n.count, s_.dim));
    prefetcher_.add(rows_of(s_.key, n.batch, n.key_head, 0, s_.keys, s_.dim));
    prefetcher_.add(rows_of(s_.value, n.batch, n.key_head, 0, s_.keys, s_.value_dim));
  }

  void run_head(int64_t b, int64_t key_head) {
    for (int64_t g = 0; g < s_.group(); ++g)
      load_rows(query_ + g * plan_.chunk * ld_query_, ld_query_, plan_.chunk, dim_,
                rows_of(s_.query, b, key_head * s_.group() + g, first_, count_, s_.dim));
    for (int64_t i = 0; i < rows_; ++i) max_[i] = -kInfinity<F>, sum_[i] = F(0);
    if (s_.keys == 0) std::memset(out_, 0, size_t(rows_ * ld_out_) * sizeof(F));

    for (int64_t k = 0; k < s_.keys; k += plan_.key_block) {
      const int64_t count = s_.keys - k < plan_.key_block ? s_.keys - k : plan_.key_block;
      const KeyBlock block = {k, count, round_up(count, P::kStep)};
      load_rows(key_, ld_query_, block.padded, dim_, rows_of(s_.key, b, key_head, k, count, s_.dim));
      load_rows(value_, ld_value_, block.padded, value_dim_, rows_of(s_.value, b, key_head, k, count, s_.value_dim));
      const auto key = P::right_from_columns(key_, ld_query_, block.padded, dim_, key_form_);
      const auto value = P::right_from_rows(value_, ld_value_, block.padded, value_dim_, value_form_);
      for (int64_t g = 0; g < s_.group(); ++g)
        for (int64_t i = 0; i < count_; i += plan_.row_block)
          attend(b, key_head * s_.group() + g, i, g * plan_.chunk + i, block, key, value);
    }
    for (int64_t g = 0; g < s_.group(); ++g) finish(b, key_head * s_.group() + g, g * plan_.chunk);
  }

  // Queries i.. of the chunk, whose scratch rows start at `row`, over one block of keys.
  void attend(int64_t b, int64_t head, int64_t i, int64_t row, KeyBlock block, typename P::Right key, typename P::Right value) {
    const int64_t count = count_ - i < plan_.row_block ? count_ - i : plan_.row_block;
    if (const int64_t visible = visible_keys(s_, block, first_ + i + count - 1); visible < block.count) {
      block.count = visible;
      block.padded = round_up(visible, P::kStep);
    }
    P::multiply(count, block.padded, s_.dim, P::left_from_rows(query_ + row * ld_query_, ld_query_), key, score_, ld_score_,
                false);
    for (int64_t r = 0; r < count; ++r) {
      softmax_row(b, head, i + r, row + r, block, score_ + r * ld_score_);
      prefetcher_.step();
    }
    const auto left = P::left_from_scores(score_, ld_score_, count, block.padded, score_form_);
    P::multiply(count, value_dim_, block.count, left, value, out_ + row * ld_out_, ld_out_, block.first > 0);
  }

  void softmax_row(int64_t b, int64_t head, int64_t i, int64_t row, const KeyBlock& block, F* score) {
    const int64_t query = first_ + i;
    const F factor = F(s_.scale) * kLog2E<F>;
    if (s_.mask.data) load_bias(bias_, s_.mask, block, b, head, query);
    const int64_t visible = visible_keys(s_, block, query);
    // Without a mask the scaling is left to exp_row.
    const bool plain = !s_.mask.data && factor > F(0);
    F best = plain ? factor * max_row<F>(score, block.padded, visible)
                   : scale_row<F>(score, block.padded, visible, factor, s_.mask.data ? bias_ : nullptr);
    if (best < max_[row]) best = max_[row];
    const F shift = best == -kInfinity<F> ? F(0) : best;  // nothing seen yet: 2^(-inf - 0) = 0, where -inf - -inf would be NaN
    const F sum = exp_row(score, block.padded, plain ? factor : F(1), shift);
    if (block.first > 0) {
      const F shrink = max_[row] == -kInfinity<F> ? F(0) : exp2(max_[row] - shift);
      sum_[row] *= shrink;
      F* out = out_ + row * ld_out_;
      for (int64_t j = 0; j < value_dim_; j += kLanes<F>) store<F>(out + j, load(out + j) * broadcast(shrink));
    }
    sum_[row] += sum;
    max_[row] = best;
    if (s_.dropout_p > 0) {
      dropout_.factors(factor_, block, (b * s_.heads + head) * s_.queries + query);
      multiply_row(score, block.padded, factor_);
    }
    if (s_.weights) add_weights(b, head, query, score, block.count, sum_[row]);
  }

  void add_weights(int64_t b, int64_t head, int64_t query, const F* score, int64_t count, F sum) const {
    F* weights = static_cast<F*>(s_.weights) + (b * s_.queries + query) * s_.keys;
    const F factor = sum == F(0) ? F(0) : F(1) / (sum * F(s_.heads));
    if (head == 0)
      for (int64_t j = 0; j < s_.keys; ++j) weights[j] = F(0);
    for (int64_t j = 0; j < count; ++j) weights[j] += score[j] * factor;
  }

  void finish(int64_t b, int64_t head, int64_t row) const {
    F* lse = static_cast<F*>(s_.lse) + (b * s_.heads + head) * s_.queries + first_;
    for (int64_t i = 0; i < count_; ++i) {
      F* out = out_ + (row + i) * ld_out_;
      const F sum = sum_[row + i];
      const Vec<F> inverse = broadcast(F(1) / sum), none{};
      for (int64_t j = 0; j < value_dim_; j += kLanes<F>) store<F>(out + j, sum == F(0) ? none : load(out + j) * inverse);
      lse[i] = sum == F(0) ? -kInfinity<F> : max_[row + i] * kLn2<F> + log(sum);
    }
    store_rows(out_ + row * ld_out_, ld_out_, rows_of(s_.out, b, head, first_, count_, s_.value_dim), F(1));
  }

  static float exp2(float x) { return ::exp2f(x); }
  static double exp2(double x) { return ::exp2(x); }
  static float log(float x) { return ::logf(x); }
  static double log(double x) { return ::log(x); }

  const CrossAttention& s_;
  const AttentionPlan plan_;
  const int64_t dim_, value_dim_, ld_query_, ld_value_, ld_out_, ld_score_, rows_, keys_;
  Scratch scratch_;
  T *query_, *key_, *value_, *key_form_, *value_form_, *score_form_;
  F *score_, *out_, *max_, *sum_, *bias_, *factor_;
  Dropout<F> dropout_;
  Prefetcher prefetcher_;
  int64_t first_ = 0, count_ = 0;  // the chunk's queries
};

int64_t forward_tasks(const CrossAttention& s) {
  return with_products(s, [&](auto products) { return forward_plan<decltype(products)>(s).tasks(s); });
}

void forward(const CrossAttention& s, int64_t begin, int64_t end) {
  with_products(s, [&](auto products) {
    using P = decltype(products);
    [[maybe_unused]] const typename P::Session session;
    Forward<P> run(s);
    for (int64_t task = begin; task < end; ++task) run.run(task, task + 1 < end ? task + 1 : -1);
  });
}

}  // namespace

extern const CrossAttentionKernels cross_attention;
const CrossAttentionKernels cross_attention = {forward_tasks, forward, cross_attention_backward_parts,
                                               cross_attention_backward_tasks, cross_attention_backward};

}  // namespace iumad::IUMAD_ISA
