// The fastest ways that this host may have to do what an update does to memory: in place,
// s <- s + w * (p - s). See triads.py.

#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

const int64_t kLine = 64;    // elements
const int64_t kAhead = 512;  // elements that are prefetched ahead

enum How { ordinary, narrow, prefetched, streamed };
#if defined(__AVX512F__)
#define NARROW __attribute__((noinline, target("prefer-vector-width=256")))
#else
#define NARROW
#endif

inline float widen(float x) { return x; }
inline float widen(uint16_t x) {  // bfloat16
  const uint32_t bits = uint32_t(x) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline void stream(const float* from, float* to) {  // a line, past the caches
#if defined(__AVX512F__)
  for (int64_t i = 0; i < kLine; i += 16) _mm512_stream_ps(to + i, _mm512_load_ps(from + i));
#elif defined(__AVX2__)
  for (int64_t i = 0; i < kLine; i += 8) _mm256_stream_ps(to + i, _mm256_load_ps(from + i));
#else
  std::memcpy(to, from, kLine * sizeof *to);
#endif
}

template <class T>
inline void prefetch(const T* at) {
  for (int64_t i = 0; i < kLine; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(at + i);
}

template <class P>
inline void plain(const P* __restrict__ p, float* __restrict__ s, int64_t n, float w) {
  for (int64_t i = 0; i < n; ++i) s[i] = s[i] + w * (widen(p[i]) - s[i]);
}

template <class P>
NARROW void plain_256(const P* p, float* s, int64_t n, float w) {
  plain(p, s, n, w);
}

template <How how, class P>
void run(const P* __restrict__ p, float* __restrict__ s, int64_t n, float w) {
  if (how == ordinary) return plain(p, s, n, w);
  if (how == narrow) return plain_256(p, s, n, w);
  for (int64_t at = 0; at < n; at += kLine) {
    alignas(64) float line[kLine];
    float* to = how == streamed ? line : s + at;
    if (how == prefetched) prefetch(p + at + kAhead), prefetch(s + at + kAhead);
    for (int64_t i = 0; i < kLine; ++i) to[i] = s[at + i] + w * (widen(p[at + i]) - s[at + i]);
    if (how == streamed) stream(line, s + at);
  }
}

template <class P>
void run(const P* p, float* s, int64_t n, float w, int64_t how) {
  if (how == ordinary) run<ordinary>(p, s, n, w);
  if (how == narrow) run<narrow>(p, s, n, w);
  if (how == prefetched) run<prefetched>(p, s, n, w);
  if (how == streamed) run<streamed>(p, s, n, w);
}

struct Threads {  // torch's own, as in fused_cpu.cpp
  void (*fork)(void (*)(void*), void*, unsigned, unsigned);
  int (*number)();
  int (*count)();
};

struct Job {
  const void* p;
  int64_t half;  // p is bfloat16
  float* s;
  int64_t n;
  float w;
  int64_t how;
  const Threads* threads;
};

void part(const Job& job, int64_t number, int64_t count) {
  const int64_t each = (job.n / count / kLine + 1) * kLine, begin = number * each;
  if (begin >= job.n) return;
  const int64_t n = job.n - begin < each ? job.n - begin : each;
  if (job.half)
    run(static_cast<const uint16_t*>(job.p) + begin, job.s + begin, n, job.w, job.how);
  else
    run(static_cast<const float*>(job.p) + begin, job.s + begin, n, job.w, job.how);
}

void work(void* given) {
  const Job& job = *static_cast<const Job*>(given);
  part(job, job.threads->number(), job.threads->count());
}

}  // namespace

// n is a multiple of 64, s aligned to 64 bytes.
extern "C" void triad(const void* p, int64_t half, float* s, int64_t n, float w, int64_t how,
                      int64_t count, const Threads* threads) {
  Job job = {p, half, s, n, w, how, threads};
  if (count < 2 || !threads->fork)
    part(job, 0, 1);
  else
    threads->fork(work, &job, unsigned(count), 0);
}
