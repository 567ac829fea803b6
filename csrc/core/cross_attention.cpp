#include "cross_attention.h"

#include <math.h>

#include "attention_plan.h"
#include "scratch.h"

namespace iumad::IUMAD_ISA {
namespace {

// Scores up to this size, in units of log 2, need no maximum subtracted: neither their powers of two nor sums of these, nor
// products with values up to kLargestValue, come near the ends of float's range.
constexpr float kLargestScore = 24, kLargestValue = 0x1p60f;

template <class P>
AttentionPlan forward_plan(const CrossAttention& s) {
  return plan_attention<P>(s, s.weights != nullptr,
                           {.tasks = 8,
                            .min_chunk = 256,
                            .max_chunk = 1024,
                            .one_pass_keys = 1024,
                            .key_block = 512,
                            .score_bytes = 40 * 1024,
                            .score_copies = 1,
                            .min_rows = 48});
}

// Bounded scores in registers -> their weights: 2^(scale score), added to the lanes of `sum`; the dropped ones 0 after that.
template <class F>
struct Exponentials {
  Vec<F> scale;
  int64_t count;         // keys; the columns beyond are padding
  F* sum;                // a vector for every row
  const uint64_t* kept;  // null: none is dropped
  int64_t words;         // of a row of `kept`

  template <int n>
  void operator()(int64_t i, int64_t j, Vec<F> (&x)[n]) const {
#pragma GCC unroll 4
    for (int v = 0; v < n; ++v) x[v] = exp2_product<F, Range::kNormal>(x[v], scale);
    zero_beyond<F>(count, j, x);
    Vec<F> total = load(sum + i * kLanes<F>);
#pragma GCC unroll 4
    for (int v = 0; v < n; ++v) total += x[v];
    store<F>(sum + i * kLanes<F>, total);
    if (kept) {
      IUMAD_UNROLL for (int v = 0; v < n; ++v) x[v] = without_dropped<F>(kept + i * words, j + v * kLanes<F>, x[v]);
    }
  }
};

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
        words_(Dropout::words(keys_)),
        keep_scale_(F(1 / (1 - s.dropout_p))),
        scratch_(Scratch::bytes<T>(rows_ * ld_query_) + Scratch::bytes<T>(keys_ * ld_query_) +
                 Scratch::bytes<T>(keys_ * ld_value_) + Scratch::bytes<T>(P::transposed_size(dim_, keys_)) +
                 Scratch::bytes<T>(P::buffer_size(keys_, value_dim_)) +
                 Scratch::bytes<T>(P::buffer_size(plan_.row_block, keys_)) + Scratch::bytes<F>(plan_.row_block * ld_score_) +
                 Scratch::bytes<F>(rows_ * ld_out_) + 2 * Scratch::bytes<F>(round_up(rows_, kLanes<F>)) +
                 Scratch::bytes<F>(round_up(rows_, kLanes<F>) * kLanes<F>) + Scratch::bytes<F>(keys_) +
                 Scratch::bytes<uint64_t>(plan_.row_block * words_)),
        query_(scratch_.take<T>(rows_ * ld_query_)),
        key_(scratch_.take<T>(keys_ * ld_query_)),
        value_(scratch_.take<T>(keys_ * ld_value_)),
        key_form_(scratch_.take<T>(P::transposed_size(dim_, keys_))),
        value_form_(scratch_.take<T>(P::buffer_size(keys_, value_dim_))),
        score_form_(scratch_.take<T>(P::buffer_size(plan_.row_block, keys_))),
        score_(scratch_.take<F>(plan_.row_block * ld_score_)),
        out_(scratch_.take<F>(rows_ * ld_out_)),
        max_(scratch_.take<F>(round_up(rows_, kLanes<F>))),
        sum_(scratch_.take<F>(round_up(rows_, kLanes<F>))),
        sums_(scratch_.take<F>(round_up(rows_, kLanes<F>) * kLanes<F>)),
        bias_(scratch_.take<F>(keys_)),
        kept_(scratch_.take<uint64_t>(plan_.row_block * words_)),
        dropout_(s) {}

  // `next`: the task after this one on the same thread, or -1.
  void run(int64_t task, int64_t next) {
    const TaskRange range = plan_.range(s_, task);
    first_ = range.first;
    count_ = range.count;
    prefetcher_.clear();
    if (plan_.all_heads) {
      for (int64_t h = 0; h < s_.key_heads; ++h) run_head(range.batch, h);
    } else {
      prefetch(range.batch, range.key_head, next);
      run_head(range.batch, range.key_head);
    }
  }

 private:
  void prefetch(int64_t b, int64_t key_head, int64_t next) {
    for (int64_t g = 0; g < s_.group(); ++g)
      prefetcher_.add(rows_of(s_.out, b, key_head * s_.group() + g, first_, count_, s_.value_dim), true);
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
    std::memset(sums_, 0, size_t(rows_ * kLanes<F>) * sizeof(F));
    if (s_.keys == 0) std::memset(out_, 0, size_t(rows_ * ld_out_) * sizeof(F));

    prefetcher_.spread(s_.group() * count_ * s_.keys * (s_.dim + s_.value_dim));
    for (int64_t k = 0; k < s_.keys; k += plan_.key_block) {
      const int64_t count = s_.keys - k < plan_.key_block ? s_.keys - k : plan_.key_block;
      const KeyBlock block = {k, count, round_up(count, P::kStep)};
      load_rows(key_, ld_query_, block.padded, dim_, rows_of(s_.key, b, key_head, k, count, s_.dim));
      load_rows(value_, ld_value_, block.padded, value_dim_, rows_of(s_.value, b, key_head, k, count, s_.value_dim));
      const auto key = P::right_from_columns(key_, ld_query_, block.padded, dim_, key_form_);
      const auto value = P::right_from_rows(value_, ld_value_, block.padded, value_dim_, value_form_);
      const bool small = scores_are_small(block);
      for (int64_t g = 0; g < s_.group(); ++g)
        for (int64_t i = 0; i < count_; i += plan_.row_block) {
          if (small) {
            attend_small(b, key_head * s_.group() + g, i, g * plan_.chunk + i, block, key, value);
          } else {
            attend(b, key_head * s_.group() + g, i, g * plan_.chunk + i, block, key, value);
          }
        }
      if (small) take_sums();
    }
    for (int64_t g = 0; g < s_.group(); ++g) finish(b, key_head * s_.group() + g, g * plan_.chunk);
  }

  // Whether attend_small may take the head: all keys at once, nothing but the scores, and these bounded by |q| |k|.
  bool scores_are_small(const KeyBlock& block) const {
    if (block.count < s_.keys || s_.mask.data || s_.causal || s_.weights) return false;
    const float query = largest_square(query_, ld_query_, rows_, dim_), key = largest_square(key_, ld_query_, block.count, dim_);
    const float most = kLargestScore / float(s_.scale * kLog2E<double>);
    return query * key <= most * most &&
           largest_square(value_, ld_value_, block.count, value_dim_) <= kLargestValue * kLargestValue;
  }

  // Queries i.. of the chunk, whose scratch rows start at `row`, over all keys.
  void attend_small(int64_t b, int64_t head, int64_t i, int64_t row, const KeyBlock& block, typename P::Right key,
                    typename P::Right value) {
    const int64_t count = count_ - i < plan_.row_block ? count_ - i : plan_.row_block;
    const bool drops = s_.dropout_p > 0;
    if (drops) draw(b, head, i, count, block);
    const Exponentials<F> exponentials = {broadcast(F(s_.scale) * kLog2E<F>), block.count, sums_ + row * kLanes<F>,
                                          drops ? kept_ : nullptr, words_};
    T* weights = P::rows_of_left(score_, score_form_);
    const int64_t ld = P::row_length_of_left(keys_);
    P::multiply(count, block.count, s_.dim, P::left_from_rows(query_ + row * ld_query_, ld_query_), key, weights, ld, false,
                prefetcher_, exponentials);
    P::multiply(count, s_.value_dim, block.count, P::left_from_rows(weights, ld), value, out_ + row * ld_out_, ld_out_, false,
                prefetcher_);
  }

  void take_sums() {
    constexpr int n = kLanes<F>;
    for (int64_t i = 0; i < rows_; i += n) {  // up to n - 1 rows more than there are: scratch has room
      Vec<F> row[n];
      IUMAD_UNROLL for (int r = 0; r < n; ++r) row[r] = load(sums_ + (i + r) * n);
      store<F>(sum_ + i, sum_rows<F>(row));
      store<F>(max_ + i, Vec<F>{});
    }
  }

  // Queries i.. of the chunk, whose scratch rows start at `row`, over one block of keys.
  void attend(int64_t b, int64_t head, int64_t i, int64_t row, KeyBlock block, typename P::Right key, typename P::Right value) {
    const int64_t count = count_ - i < plan_.row_block ? count_ - i : plan_.row_block;
    if (const int64_t visible = visible_keys(s_, block, first_ + i + count - 1); visible < block.count) {
      block.count = visible;
      block.padded = round_up(visible, P::kStep);
    }
    P::multiply(count, block.count, s_.dim, P::left_from_rows(query_ + row * ld_query_, ld_query_), key, score_, ld_score_, false,
                prefetcher_);
    if (s_.dropout_p > 0) draw(b, head, i, count, block);
    for (int64_t r = 0; r < count; ++r) softmax_row(b, head, i + r, row + r, block, score_ + r * ld_score_, kept_ + r * words_);
    const auto left = P::left_from_scores(score_, ld_score_, count, block.padded, score_form_);
    P::multiply(count, s_.value_dim, block.count, left, value, out_ + row * ld_out_, ld_out_, block.first > 0, prefetcher_);
  }

  void softmax_row(int64_t b, int64_t head, int64_t i, int64_t row, const KeyBlock& block, F* score, const uint64_t* kept) {
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
    if (s_.dropout_p > 0) drop_row(score, block.padded, kept, F(1));
    if (s_.weights) add_weights(b, head, query, score, block.count, sum_[row]);
  }

  // Which keys queries i.. of the chunk keep.
  void draw(int64_t b, int64_t head, int64_t i, int64_t count, const KeyBlock& block) {
    dropout_.draw(kept_, words_, block, (b * s_.heads + head) * s_.queries + first_ + i, count);
  }

  void add_weights(int64_t b, int64_t head, int64_t query, const F* score, int64_t count, F sum) const {
    F* weights = static_cast<F*>(s_.weights) + (b * s_.queries + query) * s_.keys;
    const F factor = sum == F(0) ? F(0) : keep_scale_ / (sum * F(s_.heads));
    if (head == 0)
      for (int64_t j = 0; j < s_.keys; ++j) weights[j] = F(0);
    for (int64_t j = 0; j < count; ++j) weights[j] += score[j] * factor;
  }

  void finish(int64_t b, int64_t head, int64_t row) {
    F* lse = static_cast<F*>(s_.lse) + (b * s_.heads + head) * s_.queries + first_;
    for (int64_t i = 0; i < count_; ++i) {
      const F sum = sum_[row + i];
      if (sum == F(0)) std::memset(out_ + (row + i) * ld_out_, 0, size_t(value_dim_) * sizeof(F));
      lse[i] = sum == F(0) ? -kInfinity<F> : max_[row + i] * kLn2<F> + log(sum);
    }
    store_rows(out_ + row * ld_out_, ld_out_, rows_of(s_.out, b, head, first_, count_, s_.value_dim),
               [&](int64_t i) { return sum_[row + i] == F(0) ? F(0) : keep_scale_ / sum_[row + i]; });
  }

  static float exp2(float x) { return ::exp2f(x); }
  static double exp2(double x) { return ::exp2(x); }
  static float log(float x) { return ::logf(x); }
  static double log(double x) { return ::log(x); }

  const CrossAttention& s_;
  const AttentionPlan plan_;
  const int64_t dim_, value_dim_, ld_query_, ld_value_, ld_out_, ld_score_, rows_, keys_, words_;
  const F keep_scale_;
  Scratch scratch_;
  T *query_, *key_, *value_, *key_form_, *value_form_, *score_form_;
  F *score_, *out_, *max_, *sum_, *sums_, *bias_;
  uint64_t* kept_;
  const Dropout dropout_;
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
