// The fingerprint of elements that are stretches of a full tensor: see fingerprint.py.
//
//   values   count stretches of run elements each, one after the other
//   starts   flat index in the full tensor of each stretch's first element
//   table    an odd factor for each of the kBlock elements of a block
//   seed     of the factors of the full tensor's blocks
//
// All arithmetic is modulo 2^64, so neither order nor vectorisation changes the result.

#include <cstdint>

namespace {

const int64_t kBlock = 4096;  // elements that have one table of factors, of 32 KiB
const int64_t kRows = 4;      // blocks at a time: a factor is loaded once for all of them

// The factor of a block: see _odd in fingerprint.py.
uint64_t odd(uint64_t seed, int64_t block) {
  uint64_t x = seed + uint64_t(block + 1) * 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return (x ^ (x >> 31)) | 1;
}

inline uint64_t widened(int64_t value) { return uint64_t(value); }

template <class T>
uint64_t part(const T* __restrict__ values, int64_t n, const uint64_t* __restrict__ factors) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += widened(values[i]) * factors[i];
  return sum;
}

// kRows whole blocks
template <class T>
uint64_t rows(const T* __restrict__ values, int64_t block, const uint64_t* __restrict__ table,
              uint64_t seed) {
  uint64_t a = 0, b = 0, c = 0, d = 0;
  for (int64_t i = 0; i < kBlock; ++i) {
    const uint64_t factor = table[i];
    a += widened(values[i]) * factor;
    b += widened(values[i + kBlock]) * factor;
    c += widened(values[i + 2 * kBlock]) * factor;
    d += widened(values[i + 3 * kBlock]) * factor;
  }
  return a * odd(seed, block) + b * odd(seed, block + 1) + c * odd(seed, block + 2) +
         d * odd(seed, block + 3);
}

template <class T>
uint64_t stretch(const T* values, int64_t n, int64_t first, const uint64_t* table,
                 uint64_t seed) {
  uint64_t total = 0;
  while (n > 0) {
    const int64_t block = first / kBlock, offset = first % kBlock;
    int64_t here = kRows * kBlock;
    if (offset == 0 && n >= here) {
      total += rows(values, block, table, seed);
    } else {
      here = n < kBlock - offset ? n : kBlock - offset;
      total += part(values, here, table + offset) * odd(seed, block);
    }
    values += here, first += here, n -= here;
  }
  return total;
}

template <class T>
uint64_t stretches(const void* given, int64_t run, int64_t count, const int64_t* starts,
                   const uint64_t* table, uint64_t seed) {
  const T* values = static_cast<const T*>(given);
  uint64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    total += stretch(values + i * run, run, starts[i], table, seed);
  }
  return total;
}

}  // namespace

extern "C" uint64_t shardema_fingerprint(const void* values, int64_t size, int64_t run,
                                         int64_t count, const int64_t* starts,
                                         const uint64_t* table, uint64_t seed) {
  switch (size) {
    case 1: return stretches<int8_t>(values, run, count, starts, table, seed);
    case 2: return stretches<int16_t>(values, run, count, starts, table, seed);
    case 4: return stretches<int32_t>(values, run, count, starts, table, seed);
    default: return stretches<int64_t>(values, run, count, starts, table, seed);
  }
}
