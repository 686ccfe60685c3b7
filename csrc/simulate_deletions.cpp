#include "simulate_deletions.h"

#include <omp.h>

#include <algorithm>
#include <vector>

namespace pymape {
namespace {

// SplitMix64 (Steele, Lea and Flood 2014): a counter, mixed.
constexpr std::uint64_t kStep = 0x9E3779B97F4A7C15;

std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

struct Column {
  std::uint64_t threshold;
  std::int64_t alias;
};

// What does not change from run to run.
struct System {
  std::int64_t shards, budget, slices, cells;
  std::vector<Column> columns;           // [cells]
  std::vector<std::int64_t> shard;       // [cells]
  std::vector<std::uint8_t> first;       // [cells], 1 where some sequence begins with the slice
  std::vector<std::int64_t> first_left;  // [m], how many such slices a shard has
  std::vector<std::int32_t> position;    // [cells, B], place of the slice in every sequence of its shard

  explicit System(const DeletionSystem& in)
      : shards(in.sequences.shape[0]),
        budget(in.sequences.shape[1]),
        slices(in.sequences.shape[2]),
        cells(shards * slices),
        columns(cells),
        shard(cells),
        first(cells, 0),
        first_left(shards, 0),
        position(cells * budget) {
    for (std::int64_t cell = 0; cell < cells; ++cell) {
      columns[cell] = {static_cast<std::uint64_t>(in.threshold.as<std::int64_t>()[cell]), in.alias.as<std::int64_t>()[cell]};
      shard[cell] = cell / slices;
    }
    const std::int64_t* slice = in.sequences.as<std::int64_t>();
    for (std::int64_t s = 0; s < shards; ++s)
      for (std::int64_t b = 0; b < budget; ++b)
        for (std::int64_t i = 0; i < slices; ++i, ++slice) {
          const std::int64_t cell = s * slices + *slice;
          position[cell * budget + b] = static_cast<std::int32_t>(i);
          if (i == 0 && !first[cell]) first[cell] = 1, ++first_left[s];
        }
  }
};

// One run at a time; buffers are kept between runs.
class Run {
 public:
  explicit Run(const System& system) : system_(system) {}

  void operator()(std::int64_t run, std::int64_t max_requests, std::uint64_t seed, const DeletionRuns& out,
                  std::int64_t curve, std::int64_t* depth_sum, std::int64_t* live_sum) {
    const System& s = system_;
    hit_.assign(s.cells, 0);
    first_left_ = s.first_left;
    depth_.assign(s.shards * s.budget, static_cast<std::int32_t>(s.slices));
    best_.assign(s.shards, s.slices);
    std::int64_t live = s.shards, total_depth = s.shards * s.slices, distinct = 0, first_dead = -1, request = 0;
    std::uint64_t state = mix(mix(seed + kStep) + static_cast<std::uint64_t>(run));
    depth_sum[0] += total_depth;
    live_sum[0] += live;
    while (live > 0 && request < max_requests) {
      ++request;
      state += kStep;
      // The product's upper half is a uniform column, its lower half a uniform number within the column.
      const unsigned __int128 product = static_cast<unsigned __int128>(mix(state)) * static_cast<std::uint64_t>(s.cells);
      // What no processor can predict goes without a branch: the alias, and whether a slice is hit for the first time.
      const std::int64_t index = static_cast<std::int64_t>(product >> 64);
      const Column& column = s.columns[index];
      const auto aliased = static_cast<std::int64_t>(static_cast<std::uint64_t>(product) >= column.threshold);
      const std::int64_t cell = index ^ ((index ^ column.alias) & -aliased);
      const bool fresh = !hit_[cell];
      hit_[cell] = 1;
      distinct += fresh;
      const std::int64_t shard = s.shard[cell];
      const std::int64_t ends = fresh & s.first[cell];
      first_left_[shard] -= ends;
      if (ends > first_left_[shard]) {
        --live;
        if (first_dead < 0) first_dead = request;
      }
      if (request <= curve) {
        if (fresh) total_depth -= cut(shard, cell);
        depth_sum[request] += total_depth;
        live_sum[request] += live;
      }
    }
    out.first_dead.as<std::int64_t>()[run] = first_dead;
    out.all_dead.as<std::int64_t>()[run] = live == 0 ? request : -1;
    out.distinct.as<std::int64_t>()[run] = live == 0 ? distinct : -1;
  }

 private:
  // Every sequence of the shard keeps what is before the slice; returns how much the best depth falls.
  std::int64_t cut(std::int64_t shard, std::int64_t cell) {
    const std::int32_t* position = &system_.position[cell * system_.budget];
    std::int32_t* depth = &depth_[shard * system_.budget];
    std::int32_t best = 0;
    for (std::int64_t b = 0; b < system_.budget; ++b) {
      depth[b] = std::min(depth[b], position[b]);
      best = std::max(best, depth[b]);
    }
    const std::int64_t before = best_[shard];
    best_[shard] = best;
    return before - best;
  }

  const System& system_;
  std::vector<std::uint8_t> hit_;         // [cells]
  std::vector<std::int64_t> first_left_;  // [m], first slices not hit yet
  std::vector<std::int32_t> depth_;       // [m, B]
  std::vector<std::int64_t> best_;        // [m]
};

}  // namespace

void simulate_deletions(const DeletionSystem& in, std::int64_t max_requests, std::uint64_t seed, const DeletionRuns& out,
                        int num_threads) {
  const System system(in);
  const std::int64_t runs = out.all_dead.shape[0], points = out.depth.shape[0];
  std::int64_t* depth_sum = out.depth.as<std::int64_t>();
  std::int64_t* live_sum = out.live.as<std::int64_t>();
  std::fill_n(depth_sum, points, 0);
  std::fill_n(live_sum, points, 0);
#pragma omp parallel num_threads(num_threads)
  {
    Run simulate(system);
    std::vector<std::int64_t> depth(points, 0), live(points, 0);
#pragma omp for schedule(static)
    for (std::int64_t run = 0; run < runs; ++run)
      simulate(run, max_requests, seed, out, points - 1, depth.data(), live.data());
#pragma omp critical
    for (std::int64_t i = 0; i < points; ++i) {
      depth_sum[i] += depth[i];
      live_sum[i] += live[i];
    }
  }
}

}  // namespace pymape
