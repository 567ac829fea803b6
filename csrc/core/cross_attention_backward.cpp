#include "attention_plan.h"
#include "cross_attention.h"
#include "scratch.h"

namespace iumad::IUMAD_ISA {
namespace {

template <class P>
AttentionPlan backward_plan(const CrossAttention& s, bool weights) {
  return plan_attention<P>(s, weights,
                           {.tasks = 8,
                            .min_chunk = 256,
                            .max_chunk = 1 << 20,
                            .one_pass_keys = 384,
                            .key_block = 320,
                            .score_bytes = 128 * 1024,
                            .score_copies = 2,
                            .min_rows = 96});
}

// Scores in registers -> their weights P = 2^(scale score - shift of the row).
template <class F>
struct Weights {
  Vec<F> scale;
  const F* shift;
  int64_t count;  // keys; the columns beyond are padding

  template <int n>
  void operator()(int64_t i, int64_t j, Vec<F> (&x)[n]) const {
    const Vec<F> offset = broadcast(-shift[i]);
#pragma GCC unroll 4
    for (int v = 0; v < n; ++v) x[v] = exp2<F, Range::kFinite>(fma(x[v], scale, offset));
    zero_beyond<F>(count, j, x);
  }
};

// Gradients of the weights D in registers -> gradients of the scores x; where weights are dropped, P in memory -> D (1 - p).
template <class F>
struct ScoreGradients {
  F* weights;
  int64_t ld;
  const F* delta;        // of the row
  const uint64_t* kept;  // null: none is dropped
  int64_t words;         // of a row of `kept`
  Vec<F> keep_scale;

  template <int n>
  void operator()(int64_t i, int64_t j, Vec<F> (&x)[n]) const {
    F* p = weights + i * ld + j;
    const Vec<F> mean = broadcast(delta[i]);
#pragma GCC unroll 4
    for (int v = 0; v < n; ++v) {
      const Vec<F> weight = load(p + v * kLanes<F>);
      if (kept) {
        const int64_t column = j + v * kLanes<F>;
        x[v] = without_dropped<F>(kept + i * words, column, x[v] * keep_scale);
        store<F>(p + v * kLanes<F>, without_dropped<F>(kept + i * words, column, weight));
      }
      x[v] = weight * (x[v] - mean);
    }
  }
};

template <class P>
class Backward {
  using F = typename P::Compute;
  using T = typename P::Operand;

 public:
  Backward(const CrossAttention& s, const CrossAttentionGradients& d)
      : s_(s),
        d_(d),
        plan_(backward_plan<P>(s, d.weights != nullptr)),
        dim_(round_up(s.dim, P::kStep)),
        value_dim_(round_up(s.value_dim, P::kStep)),
        keys_(round_up(plan_.key_block, P::kStep)),
        rows_(s.group() * plan_.chunk),
        words_(Dropout::words(keys_)),
        keep_scale_(F(1 / (1 - s.dropout_p))),
        ld_query_(row_length<T>(dim_)),
        ld_value_(row_length<T>(value_dim_)),
        ld_query_grad_(row_length<F>(dim_)),
        ld_row_(row_length<F>(dim_ > value_dim_ ? dim_ : value_dim_)),
        ld_score_(row_length<F>(keys_)),
        scratch_(bytes()),
        query_(scratch_.take<T>(rows_ * ld_query_)),
        out_grad_(scratch_.take<T>(rows_ * ld_value_)),
        query_columns_(scratch_.take<T>(P::buffer_size(dim_, rows_))),
        out_grad_columns_(scratch_.take<T>(P::buffer_size(value_dim_, rows_))),
        key_(scratch_.take<T>(keys_ * ld_query_)),
        value_(scratch_.take<T>(keys_ * ld_value_)),
        key_form_(scratch_.take<T>(P::buffer_size(keys_, dim_))),
        key_columns_(scratch_.take<T>(P::transposed_size(dim_, keys_))),
        value_columns_(scratch_.take<T>(P::transposed_size(value_dim_, keys_))),
        score_form_(scratch_.take<T>(P::buffer_size(plan_.row_block, keys_))),
        score_(scratch_.take<F>(score_rows() * ld_score_)),
        score_grad_(scratch_.take<F>(score_rows() * ld_score_)),
        query_grad_(scratch_.take<F>(rows_ * ld_query_grad_)),
        key_grad_(scratch_.take<F>(sums_size(dim_))),
        value_grad_(scratch_.take<F>(sums_size(value_dim_))),
        row_(scratch_.take<F>((keys_ > plan_.chunk ? keys_ : plan_.chunk) * ld_row_)),
        delta_(scratch_.take<F>(rows_)),
        shift_(scratch_.take<F>(rows_)),
        bias_(scratch_.take<F>(keys_)),
        kept_(scratch_.take<uint64_t>(score_rows() * words_)),
        dropout_(s) {}

  // `next`: the task after this one on the same thread, or -1.
  void run(int64_t task, int64_t next) {
    const TaskRange range = plan_.range(s_, task);
    chunk_ = task % plan_.chunks;
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
  int64_t score_rows() const { return round_up(plan_.row_block, P::kStep); }

  // Gradients of a block of keys or values, kept as [key][feature] where kFreeColumns, else as [feature][key].
  int64_t sums_size(int64_t dim) const { return P::kFreeColumns ? keys_ * ld_row_ : dim * ld_score_; }

  int64_t bytes() const {
    const int64_t row_block_keys = P::buffer_size(plan_.row_block, keys_);
    return Scratch::bytes<T>(rows_ * ld_query_) + Scratch::bytes<T>(rows_ * ld_value_) +
           Scratch::bytes<T>(P::buffer_size(dim_, rows_)) + Scratch::bytes<T>(P::buffer_size(value_dim_, rows_)) +
           Scratch::bytes<T>(keys_ * ld_query_) + Scratch::bytes<T>(keys_ * ld_value_) +
           Scratch::bytes<T>(P::buffer_size(keys_, dim_)) + Scratch::bytes<T>(P::transposed_size(dim_, keys_)) +
           Scratch::bytes<T>(P::transposed_size(value_dim_, keys_)) + Scratch::bytes<T>(row_block_keys) +
           2 * Scratch::bytes<F>(score_rows() * ld_score_) + Scratch::bytes<F>(rows_ * ld_query_grad_) +
           Scratch::bytes<F>(sums_size(dim_)) + Scratch::bytes<F>(sums_size(value_dim_)) +
           Scratch::bytes<F>((keys_ > plan_.chunk ? keys_ : plan_.chunk) * ld_row_) + 2 * Scratch::bytes<F>(rows_) +
           Scratch::bytes<F>(keys_) + Scratch::bytes<uint64_t>(score_rows() * words_);
  }

  void prefetch(int64_t b, int64_t key_head, int64_t next) {
    const int64_t head = key_head * s_.group();
    prefetcher_.add(rows_of(d_.query, b, head, first_, count_, s_.dim), true);
    prefetcher_.add(rows_of(with_part(d_.key, d_.key_part), b, key_head, 0, s_.keys, s_.dim), true);
    prefetcher_.add(rows_of(with_part(d_.value, d_.value_part), b, key_head, 0, s_.keys, s_.value_dim), true);
    if (next < 0) return;
    const TaskRange n = plan_.range(s_, next);
    const int64_t next_head = n.key_head * s_.group();
    prefetcher_.add(rows_of(s_.query, n.batch, next_head, n.first, n.count, s_.dim));
    prefetcher_.add(rows_of(s_.out, n.batch, next_head, n.first, n.count, s_.value_dim));
    prefetcher_.add(rows_of(d_.out, n.batch, next_head, n.first, n.count, s_.value_dim));
    prefetcher_.add(rows_of(s_.key, n.batch, n.key_head, 0, s_.keys, s_.dim));
    prefetcher_.add(rows_of(s_.value, n.batch, n.key_head, 0, s_.keys, s_.value_dim));
  }

  void run_head(int64_t b, int64_t key_head) {
    for (int64_t g = 0; g < s_.group(); ++g) load_queries(b, key_head * s_.group() + g, g * plan_.chunk);
    if (s_.keys == 0) std::memset(query_grad_, 0, size_t(rows_ * ld_query_grad_) * sizeof(F));
    const auto query_columns = P::left_from_columns(query_, ld_query_, rows_, dim_, query_columns_);
    const auto out_grad_columns = P::left_from_columns(out_grad_, ld_value_, rows_, value_dim_, out_grad_columns_);

    prefetcher_.spread(s_.group() * count_ * s_.keys * (3 * s_.dim + 2 * s_.value_dim));
    for (int64_t k = 0; k < s_.keys; k += plan_.key_block) {
      const int64_t count = s_.keys - k < plan_.key_block ? s_.keys - k : plan_.key_block;
      const KeyBlock block = {k, count, round_up(count, P::kStep)};
      load_rows(key_, ld_query_, block.padded, dim_, rows_of(s_.key, b, key_head, k, count, s_.dim));
      load_rows(value_, ld_value_, block.padded, value_dim_, rows_of(s_.value, b, key_head, k, count, s_.value_dim));
      key_rows_ = P::right_from_rows(key_, ld_query_, block.padded, dim_, key_form_);
      keys_by_dim_ = P::right_from_columns(key_, ld_query_, block.padded, dim_, key_columns_);
      values_by_dim_ = P::right_from_columns(value_, ld_value_, block.padded, value_dim_, value_columns_);
      if (s_.causal) {  // the first queries do not see all keys, so the sums do not begin with theirs
        std::memset(key_grad_, 0, size_t(sums_size(dim_)) * sizeof(F));
        std::memset(value_grad_, 0, size_t(sums_size(value_dim_)) * sizeof(F));
      }
      for (int64_t g = 0; g < s_.group(); ++g)
        for (int64_t i = 0; i < count_; i += plan_.row_block)
          attend(b, key_head * s_.group() + g, i, g * plan_.chunk + i, block, query_columns, out_grad_columns);
      store_sums(key_grad_, dim_, s_.dim, block, with_part(d_.key, d_.key_part), b, key_head, F(s_.scale));
      store_sums(value_grad_, value_dim_, s_.value_dim, block, with_part(d_.value, d_.value_part), b, key_head, keep_scale_);
    }
    for (int64_t g = 0; g < s_.group(); ++g)
      store_rows(query_grad_ + g * plan_.chunk * ld_query_grad_, ld_query_grad_,
                 rows_of(d_.query, b, key_head * s_.group() + g, first_, count_, s_.dim), [&](int64_t) { return F(s_.scale); });
  }

  HeadView with_part(HeadView t, int64_t stride) const {
    t.data = static_cast<char*>(t.data) + chunk_ * stride * size_of(t.dtype);
    return t;
  }

  // Queries, the output's gradient, shift (the log-sum-exp in units of log 2) and delta = out . dout of one head of the chunk.
  void load_queries(int64_t b, int64_t head, int64_t row) {
    load_rows(query_ + row * ld_query_, ld_query_, plan_.chunk, dim_, rows_of(s_.query, b, head, first_, count_, s_.dim));
    load_rows(out_grad_ + row * ld_value_, ld_value_, plan_.chunk, value_dim_,
              rows_of(d_.out, b, head, first_, count_, s_.value_dim));
    load_rows(row_, ld_row_, count_, value_dim_, rows_of(s_.out, b, head, first_, count_, s_.value_dim));
    const F* lse = static_cast<const F*>(s_.lse) + (b * s_.heads + head) * s_.queries + first_;
    for (int64_t i = 0; i < count_; ++i) {
      shift_[row + i] = lse[i] == -kInfinity<F> ? kInfinity<F> : lse[i] * kLog2E<F>;  // nothing seen: P = 0
      Vec<F> sum{};
      const F* out = row_ + i * ld_row_;
      const T* grad = out_grad_ + (row + i) * ld_value_;
      for (int64_t j = 0; j < value_dim_; j += kLanes<F>) sum = fma(load(out + j), load_lanes(grad + j), sum);
      delta_[row + i] = sum_lanes<F>(sum);
    }
  }

  // Queries i.. of the chunk, whose scratch rows start at `row`, over one block of keys.
  void attend(int64_t b, int64_t head, int64_t i, int64_t row, KeyBlock block, typename P::Left query_columns,
              typename P::Left out_grad_columns) {
    const int64_t count = count_ - i < plan_.row_block ? count_ - i : plan_.row_block;
    if (const int64_t visible = visible_keys(s_, block, first_ + i + count - 1); visible < block.count) {
      block.count = visible;
      block.padded = round_up(visible, P::kStep);
    }
    const auto query = P::left_from_rows(query_ + row * ld_query_, ld_query_);
    const auto out_grad = P::left_from_rows(out_grad_ + row * ld_value_, ld_value_);
    const bool drops = s_.dropout_p > 0;
    if (drops) dropout_.draw(kept_, words_, block, (b * s_.heads + head) * s_.queries + first_ + i, count);
    if (s_.mask.data || s_.causal || d_.weights) {
      P::multiply(count, block.count, s_.dim, query, keys_by_dim_, score_, ld_score_, false, prefetcher_);
      P::multiply(count, block.count, s_.value_dim, out_grad, values_by_dim_, score_grad_, ld_score_, false, prefetcher_);
      for (int64_t r = 0; r < count; ++r)
        differentiate_row(b, head, i + r, row + r, block, score_ + r * ld_score_, score_grad_ + r * ld_score_,
                          kept_ + r * words_);
    } else {
      P::multiply(count, block.count, s_.dim, query, keys_by_dim_, score_, ld_score_, false, prefetcher_,
                  Weights<F>{broadcast(F(s_.scale) * kLog2E<F>), shift_ + row, block.count});
      P::multiply(count, block.count, s_.value_dim, out_grad, values_by_dim_, score_grad_, ld_score_, false, prefetcher_,
                  ScoreGradients<F>{score_, ld_score_, delta_ + row, drops ? kept_ : nullptr, words_, broadcast(keep_scale_)});
    }

    const bool accumulate = s_.causal || row > 0;
    // Adds up scores^T rows over the queries.
    const auto add = [&](const F* scores, const T* rows, int64_t ld, typename P::Left columns, int64_t dim, F* grad) {
      if constexpr (P::kFreeColumns) {
        P::multiply(block.count, dim, count, P::left_from_columns(scores, ld_score_, count, block.padded, nullptr),
                    P::right_from_rows(rows, ld, count, dim, nullptr), grad, ld_row_, accumulate, prefetcher_);
      } else {
        const auto right = P::right_from_scores(scores, ld_score_, count, block.padded, score_form_);
        P::multiply(dim, block.count, count, columns, right, grad, ld_score_, accumulate, prefetcher_);
      }
    };
    add(score_, out_grad_ + row * ld_value_, ld_value_, out_grad_columns.from_depth(row), s_.value_dim, value_grad_);
    add(score_grad_, query_ + row * ld_query_, ld_query_, query_columns.from_depth(row), s_.dim, key_grad_);
    const auto rows = P::left_from_scores(score_grad_, ld_score_, count, block.padded, score_form_);
    P::multiply(count, s_.dim, block.count, rows, key_rows_, query_grad_ + row * ld_query_grad_, ld_query_grad_, block.first > 0,
                prefetcher_);
  }

  // scores -> the weights D (1 - p), gradient of D -> gradient of x, in place.
  void differentiate_row(int64_t b, int64_t head, int64_t i, int64_t row, const KeyBlock& block, F* score, F* grad,
                         const uint64_t* kept) {
    const int64_t query = first_ + i;
    const bool drops = s_.dropout_p > 0;
    if (s_.mask.data) load_bias(bias_, s_.mask, block, b, head, query);
    if (d_.weights) {
      const F* weights = static_cast<const F*>(d_.weights) + (b * s_.queries + query) * s_.keys;
      for (int64_t j = 0; j < block.count; ++j) grad[j] += weights[j] / F(s_.heads);
    }
    if (drops) drop_row(grad, block.padded, kept, keep_scale_);
    const int64_t visible = visible_keys(s_, block, query);
    F factor = F(s_.scale) * kLog2E<F>;
    if (s_.mask.data || visible < block.count) {
      scale_row(score, block.padded, visible, factor, s_.mask.data ? bias_ : nullptr);
      factor = F(1);
    }

    const Vec<F> scale = broadcast(factor), offset = broadcast(-shift_[row]);
    F delta = delta_[row];
    if (d_.weights) {
      for (int64_t j = 0; j < block.padded; j += kLanes<F>)
        store<F>(score + j, exp2<F, Range::kFinite>(fma(load(score + j), scale, offset)));
      delta = F(0);
      for (int64_t j = 0; j < block.count; ++j) delta += score[j] * grad[j];
      for (int64_t j = 0; j < block.padded; j += kLanes<F>)
        store<F>(grad + j, load(score + j) * (load(grad + j) - broadcast(delta)));
    } else {
      for (int64_t j = 0; j < block.padded; j += kLanes<F>) {
        const Vec<F> p = exp2<F, Range::kFinite>(fma(load(score + j), scale, offset));
        store<F>(score + j, p);
        store<F>(grad + j, p * (load(grad + j) - broadcast(delta)));
      }
    }
    for (int64_t j = block.count; j < block.padded; ++j) score[j] = grad[j] = F(0);
    if (d_.mask) store_mask_grad(b, head, query, block, grad);
    if (drops) drop_row(score, block.padded, kept, F(1));
  }

  void store_mask_grad(int64_t b, int64_t head, int64_t query, const KeyBlock& block, const F* grad) const {
    const int64_t rows = d_.mask_has_queries ? s_.queries : plan_.chunks, columns = d_.mask_has_keys ? s_.keys : 1;
    const int64_t row = (b * s_.heads + head) * rows + (d_.mask_has_queries ? query : chunk_);
    F* to = static_cast<F*>(d_.mask) + row * columns;  // zeroed by the caller: rows and keys that share an element add up
    if (d_.mask_has_keys) {
      for (int64_t j = 0; j < block.count; ++j) to[block.first + j] += grad[j];
    } else {
      for (int64_t j = 0; j < block.count; ++j) *to += grad[j];
    }
  }

  // What `attend` added up over the block, into the gradient of keys or values.
  void store_sums(const F* sums, int64_t padded_dim, int64_t dim, const KeyBlock& block, const HeadView& target, int64_t b,
                  int64_t key_head, F factor) {
    if constexpr (!P::kFreeColumns) {
      transpose_rows(row_, ld_row_, sums, ld_score_, padded_dim, block.padded);
      sums = row_;
    }
    store_rows(sums, ld_row_, rows_of(target, b, key_head, block.first, block.count, dim), [&](int64_t) { return factor; });
  }

  const CrossAttention& s_;
  const CrossAttentionGradients& d_;
  const AttentionPlan plan_;
  const int64_t dim_, value_dim_, keys_, rows_, words_;
  const F keep_scale_;
  const int64_t ld_query_, ld_value_, ld_query_grad_, ld_row_, ld_score_;
  Scratch scratch_;
  T *query_, *out_grad_, *query_columns_, *out_grad_columns_, *key_, *value_, *key_form_, *key_columns_, *value_columns_,
      *score_form_;
  F *score_, *score_grad_, *query_grad_, *key_grad_, *value_grad_, *row_, *delta_, *shift_, *bias_;
  uint64_t* kept_;
  const Dropout dropout_;
  typename P::Right key_rows_{}, keys_by_dim_{}, values_by_dim_{};
  Prefetcher prefetcher_;
  int64_t chunk_ = 0, first_ = 0, count_ = 0;  // the chunk's queries
};

}  // namespace

int64_t cross_attention_backward_parts(const CrossAttention& s, bool weights) {
  return with_products(s, [&](auto products) { return backward_plan<decltype(products)>(s, weights).chunks; });
}

int64_t cross_attention_backward_tasks(const CrossAttention& s, bool weights) {
  return with_products(s, [&](auto products) { return backward_plan<decltype(products)>(s, weights).tasks(s); });
}

void cross_attention_backward(const CrossAttention& s, const CrossAttentionGradients& d, int64_t begin, int64_t end) {
  with_products(s, [&](auto products) {
    using P = decltype(products);
    [[maybe_unused]] const typename P::Session session;
    Backward<P> run(s, d);
    for (int64_t task = begin; task < end; ++task) run.run(task, task + 1 < end ? task + 1 : -1);
  });
}

}  // namespace iumad::IUMAD_ISA
