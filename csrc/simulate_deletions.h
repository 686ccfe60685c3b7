// simulate_deletions: random deletion requests until every shard of an S3T system is dead, run by run.
#pragma once

#include "tensor_view.h"

namespace pymape {

// Requests draw a cell c = shard * L + slice by the alias method: a column of the tables, uniformly, and then the column
// itself with probability threshold / 2^64 and its alias otherwise.
struct DeletionSystem {
  TensorView sequences;  // [m, B, L] i64, orders of the slices
  TensorView alias;      // [m * L] i64
  TensorView threshold;  // [m * L] i64, read as unsigned
};

struct DeletionRuns {
  TensorView first_dead;  // [R] i64, requests until the first shard was dead; -1 if none was within max_requests
  TensorView all_dead;    // [R] i64, requests until all were
  TensorView distinct;    // [R] i64, distinct cells hit until all were
  TensorView depth;       // [C + 1] i64, sum over runs and shards of the best depth after 0 .. C requests
  TensorView live;        // [C + 1] i64, sum over runs of the number of live shards
};

// All tensors are contiguous. A run's random numbers depend on its index and the seed only, and all sums are of integers:
// the result does not depend on num_threads.
void simulate_deletions(const DeletionSystem& system, std::int64_t max_requests, std::uint64_t seed,
                        const DeletionRuns& runs, int num_threads);

}  // namespace pymape
