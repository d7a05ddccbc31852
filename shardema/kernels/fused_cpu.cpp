// shadow <- lerp(shadow, parameter, weight) over a table of pointers: all shards, all averages.
//
//   row     a parameter; its elements are [start, start of the next row) of the whole table
//   twin    a shadow of that row and the slot of its weight; rows[r].first .. rows[r + 1].first
//           and for its rounding, if it has one: see rounding.py
//   block   elements of a row: the parameter is read from memory once, each of its twins moves by it
//
// The rounding is that of torch.lerp on a CPU (aten/src/ATen/native/cpu/LerpKernel.cpp): below 0.5
// fma(weight, end - start, start), else fma(weight - 1, end - start, end). The weight is rounded to
// the type of the arithmetic first; then 0 is a no-op and 1 a copy. No element looks at another,
// so no cut changes a bit. No header of torch is needed: that would cost a minute of compiling.

#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

const int64_t kMostBlock = 4096;  // 16 KiB of floats: with a twin they fit a first-level cache
const int64_t kLine = 64;         // what is prefetched at a time
const int64_t kGrain = 1 << 15;   // elements that are worth a thread

// What is fastest depends on the host: see variants.py.
struct Variant {
  int64_t ahead;  // elements that are prefetched ahead; 0: none
  int64_t block;  // elements of a block of several twins, at most kMostBlock
  int64_t width;  // bits of a vector, of those that only move memory
};
#if defined(__AVX512F__)
#define SHARDEMA_256 __attribute__((noinline, target("prefer-vector-width=256")))
#else
#define SHARDEMA_256
#endif

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <class To, class From>
inline To reread(From from) {  // the same bits as another type
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline double widen(double x) { return x; }
inline float widen(float x) { return x; }
inline float widen(bf16 x) { return reread<float>(uint32_t(x.bits) << 16); }

// To the type of a shadow, as Tensor.to rounds: to nearest, ties to even.
inline void narrow(double x, double* to) { *to = x; }
inline void narrow(float x, double* to) { *to = x; }
inline void narrow(double x, float* to) { *to = float(x); }
inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, bf16* to) {
  const uint32_t bits = reread<uint32_t>(x);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  to->bits = nan ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void narrow(double x, bf16* to) { narrow(float(x), to); }

template <class P, class S>
inline void convert(P x, S* to) {
  narrow(widen(x), to);
}
template <class T>
inline void convert(T x, T* to) {  // as it is, what a NaN carries too
  *to = x;
}

#if SHARDEMA_FMA
inline float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else  // torch without vector instructions rounds twice
inline float multiply_add(float a, float b, float c) { return a * b + c; }
inline double multiply_add(double a, double b, double c) { return a * b + c; }
#endif

enum class Form { copy, below_half, from_half };

template <Form form, class P, class S, class C>
inline void line(const P* __restrict__ param, S* __restrict__ shadow, int64_t n, C coefficient) {
  for (int64_t i = 0; i < n; ++i) {
    S converted;
    convert(param[i], &converted);
    const C start = widen(shadow[i]), end = widen(converted);
    const C base = form == Form::below_half ? start : end;
    if (form == Form::copy)
      shadow[i] = converted;
    else
      narrow(multiply_add(coefficient, end - start, base), &shadow[i]);
  }
}

template <class T>
inline void prefetch(const T* at) {
  const char* first = reinterpret_cast<const char*>(at);
  for (int64_t byte = 0; byte < kLine * int64_t(sizeof(T)); byte += 64)
    __builtin_prefetch(first + byte);
}

template <Form form, class P, class S, class C>
inline void block(const P* param, S* shadow, int64_t n, C coefficient, int64_t ahead) {
  if (ahead == 0) return line<form>(param, shadow, n, coefficient);
  for (int64_t at = 0; at < n; at += kLine) {
    prefetch(param + at + ahead);  // beyond the end it does nothing
    prefetch(shadow + at + ahead);
    const int64_t part = n - at < kLine ? n - at : kLine;
    line<form>(param + at, shadow + at, part, coefficient);
  }
}

template <Form form, class P, class S, class C>
SHARDEMA_256 void block_256(const P* param, S* shadow, int64_t n, C coefficient, int64_t ahead) {
  block<form>(param, shadow, n, coefficient, ahead);
}

template <Form form, class P, class S, class C>
void block_of(const P* param, S* shadow, int64_t n, C coefficient, const Variant& variant) {
  if (variant.width == 256)
    block_256<form>(param, shadow, n, coefficient, variant.ahead);
  else
    block<form>(param, shadow, n, coefficient, variant.ahead);
}

template <class P, class S>
void move(const void* param, void* shadow, int64_t at, int64_t n, double given,
          const Variant& variant) {
  typedef decltype(widen(S())) C;  // the type of the arithmetic
  const P* p = static_cast<const P*>(param);
  S* s = static_cast<S*>(shadow) + at;
  const C weight = C(given);
  if (weight == 0) return;
  if (weight == 1)
    block_of<Form::copy>(p, s, n, weight, variant);
  else if (weight < C(0.5))
    block_of<Form::below_half>(p, s, n, weight, variant);
  else
    block_of<Form::from_half>(p, s, n, weight - 1, variant);
}

// ---- roundings: lerp in double, then rounded at random or with its lost bits: see rounding.py ----

const int kCut = 45;   // bits of a double that bf16 has no room for
const int kLost = 13;  // bits of a double that a float and its companion have no room for
const uint64_t kGolden = 0x9E3779B97F4A7C15u;
const uint64_t kFactor = 0xBF58476D1CE4E5B9u;

inline uint64_t mixed(uint64_t x) {  // splitmix64
  x = (x ^ (x >> 30)) * kFactor;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

inline bool has_companion(float x) {  // neither inf, NaN nor 0
  return (reread<uint32_t>(x) & 0x7fffffff) - 1 < 0x7f7fffff;
}

template <Form form>
inline double moved(double start, double end, double coefficient) {
  if (form == Form::copy) return end;
  return multiply_add(coefficient, end - start, form == Form::below_half ? start : end);
}

struct Places {  // of elements in the full tensor: runs of equal steps, and a jump between them
  int64_t first, run, step, jump;
};

template <Form form, class P>
void round_run(const P* __restrict__ param, bf16* __restrict__ shadow, int64_t n,
               double coefficient, uint64_t x, uint64_t step) {
  for (int64_t i = 0; i < n; ++i, x += step) {
    const double value =
        moved<form>(double(widen(shadow[i])), double(widen(param[i])), coefficient);
    const uint64_t noise = (x ^ (x >> 32)) * kFactor >> (64 - kCut);
    const uint64_t bits = reread<uint64_t>(value);
    const uint64_t cut = (bits + noise) & ~((uint64_t(1) << kCut) - 1);
    // what a NaN of bfloat16 carries ends above the cut bits; that of others might overflow
    const bool kept = sizeof(P) == sizeof(bf16) || value == value;
    const float nearest = float(reread<double>(kept ? cut : bits));
    shadow[i].bits = uint16_t(reread<uint32_t>(nearest) >> 16);
  }
}

template <Form form, class P>
void round_block(const P* param, bf16* shadow, int64_t at, int64_t n, double coefficient,
                 uint64_t key, const Places& places) {
  for (const int64_t end = at + n; at < end;) {
    const int64_t run = at / places.run, inside = at % places.run;
    const int64_t left = places.run - inside;
    const int64_t part = left < end - at ? left : end - at;
    const uint64_t place = places.first + run * places.jump + inside * places.step;
    round_run<form>(param, shadow, part, coefficient, key + place * kGolden,
                    places.step * kGolden);
    param += part, shadow += part, at += part;
  }
}

template <Form form, class P>
void compensate_block(const P* __restrict__ param, float* __restrict__ shadow,
                      int16_t* __restrict__ companion, int64_t n, double coefficient) {
  for (int64_t i = 0; i < n; ++i) {
    const int32_t lost = has_companion(shadow[i]) ? companion[i] : 0;
    const int64_t before = reread<int64_t>(double(shadow[i]));
    const double start = reread<double>(before + int64_t(lost) * (int64_t(1) << kLost));
    const double value = moved<form>(start, double(widen(param[i])), coefficient);
    const float nearest = float(value);
    const int64_t apart = reread<int64_t>(value) - reread<int64_t>(double(nearest));
    const int64_t units = (apart + (1 << (kLost - 1))) >> kLost;
    const int64_t most = units < 32767 ? units : 32767;
    const int32_t both = int32_t(most > -32768 ? most : -32768);
    shadow[i] = nearest;
    companion[i] = int16_t(has_companion(nearest) ? both : 0);
  }
}

struct Rounding {
  int16_t* companion;  // null: rounded at random
  uint64_t key;
  Places places;
};

template <Form form, class P>
void store_rounded(const P* param, void* shadow, int64_t at, int64_t n, double coefficient,
                   const Rounding& how, uint64_t key) {
  if (how.companion)
    compensate_block<form>(param, static_cast<float*>(shadow) + at, how.companion + at, n,
                           coefficient);
  else
    round_block<form>(param, static_cast<bf16*>(shadow) + at, at, n, coefficient, key,
                      how.places);
}

template <class P>
void move_rounded(const void* param, void* shadow, int64_t at, int64_t n, double weight,
                  const Rounding& how, double number) {
  const P* p = static_cast<const P*>(param);
  const uint64_t key = mixed(how.key + uint64_t(number) * kGolden);
  if (weight == 0) return;
  if (weight == 1)
    store_rounded<Form::copy>(p, shadow, at, n, weight, how, key);
  else if (weight < 0.5)
    store_rounded<Form::below_half>(p, shadow, at, n, weight, how, key);
  else
    store_rounded<Form::from_half>(p, shadow, at, n, weight - 1, how, key);
}

typedef void (*MoveRounded)(const void*, void*, int64_t, int64_t, double, const Rounding&, double);
const MoveRounded kMovesRounded[3] = {move_rounded<float>, move_rounded<double>,
                                      move_rounded<bf16>};

typedef void (*Move)(const void*, void*, int64_t, int64_t, double, const Variant&);

// [dtype of the parameter][dtype of the shadow]: fused_cpu.py numbers them alike.
enum { kFloat32, kFloat64, kBFloat16, kFloat16 };
const Move kMoves[3][3] = {
    {move<float, float>, move<float, double>, move<float, bf16>},
    {move<double, float>, move<double, double>, move<double, bf16>},
    {move<bf16, float>, move<bf16, double>, move<bf16, bf16>},
};
const int64_t kSizes[4] = {4, 8, 2, 2};

// Exact. By instructions where there are any: compilers do not vectorise this by themselves.
void widen_halves(const fp16* from, float* to, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
#endif
  for (; i < n; ++i) {
    const uint32_t sign = uint32_t(from[i].bits & 0x8000) << 16;
    const uint32_t rest = from[i].bits & 0x7fff;
    uint32_t bits = (rest << 13) + ((127 - 15) << 23);
    if (rest >= 0x7c00)  // inf and NaN
      bits = (rest << 13) | 0x7f800000;
    else if (rest < 0x0400)  // subnormal: rest * 2^-24
      bits = reread<uint32_t>(float(rest) * 0x1p-24f);
    to[i] = reread<float>(bits | sign);
  }
}

struct Row {
  int64_t start;
  const char* param;
  int64_t dtype;
  int64_t first;
};
struct Twin {
  void* shadow;
  int64_t dtype;
  int64_t slot;
  int64_t number;  // slot of the number of the update; negative: no rounding
  Rounding rounding;
};
static_assert(sizeof(Row) == 32 && sizeof(Twin) == 80, "fused_cpu.py writes 8 bytes a field");

struct Table {
  const Row* rows;  // one more than there are: the last one is where the table ends
  int64_t count;
  const Twin* twins;
  const double* weights;
  Variant variant;
};

// Elements [at, at + n) of a row.
void move_block(const Table& table, const Row* row, int64_t at, int64_t n) {
  const void* param = row->param + at * kSizes[row->dtype];
  int64_t dtype = row->dtype;
  alignas(64) float halves[kMostBlock];
  if (dtype == kFloat16) {
    widen_halves(static_cast<const fp16*>(param), halves, n);
    param = halves;
    dtype = kFloat32;
  }
  for (int64_t t = row[0].first; t < row[1].first; ++t) {
    const Twin& twin = table.twins[t];
    if (twin.number >= 0) {
      kMovesRounded[dtype](param, twin.shadow, at, n, table.weights[twin.slot], twin.rounding,
                           table.weights[twin.number]);
      continue;
    }
    kMoves[dtype][twin.dtype](param, twin.shadow, at, n, table.weights[twin.slot],
                              table.variant);
  }
}

// Elements [begin, end) of the whole table.
void move_range(const Table& table, int64_t begin, int64_t end) {
  int64_t low = 0, high = table.count;
  while (high - low > 1) {  // rows[low] holds element begin
    const int64_t middle = (low + high) / 2;
    (table.rows[middle].start <= begin ? low : high) = middle;
  }
  for (const Row* row = table.rows + low; begin < end; ++row) {
    const int64_t stop = end < row[1].start ? end : row[1].start;
    const bool several = row[1].first - row->first > 1;  // else nothing is read twice
    const int64_t block = several ? table.variant.block : kMostBlock;
    while (begin < stop) {
      const int64_t n = stop - begin < block ? stop - begin : block;
      move_block(table, row, begin - row->start, n);
      begin += n;
    }
  }
}

// The OpenMP runtime that torch has loaded, by its own functions: a second one beside it would
// start threads of its own.
struct Threads {
  void (*fork)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel; null: one thread
  int (*number)();                                           // omp_get_thread_num
  int (*count)();                                            // omp_get_num_threads
};

struct Job {
  const Table* table;
  const Threads* threads;
};

void work(void* given) {
  const Job& job = *static_cast<const Job*>(given);
  const int64_t total = job.table->rows[job.table->count].start;
  const int64_t count = job.threads->count();  // may be fewer than were asked for
  const int64_t each = (total / count / kLine + 1) * kLine;
  const int64_t begin = job.threads->number() * each;
  if (begin < total) move_range(*job.table, begin, total - begin < each ? total : begin + each);
}

}  // namespace

extern "C" void shardema_lerp(const Row* rows, int64_t count, const Twin* twins,
                              const double* weights, int64_t most, const Threads* threads,
                              const Variant* variant) {
  const Table table = {rows, count, twins, weights, *variant};
  const int64_t total = rows[count].start;
  const int64_t worth = total / kGrain < most ? total / kGrain : most;
  if (worth < 2 || !threads->fork) return move_range(table, 0, total);
  Job job = {&table, threads};
  threads->fork(work, &job, unsigned(worth), 0);
}
