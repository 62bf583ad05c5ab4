// The threads of an OpenMP runtime that the program has already, instead of more threads of our own.
//
// After a parallel region its threads spin for some milliseconds. On a machine with no processors to
// spare they would keep the workers of a pool of ours from running for just that time.

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <new>

#include "secateur.h"

namespace {

using Parallel = void (*)(void (*body)(void *), void *data, unsigned threads, unsigned flags);

struct Run {
  void (*task)(void *, size_t);
  void *user;
  size_t count;
  std::atomic<size_t> next{0};
};

void work(void *data) {
  Run &run = *static_cast<Run *>(data);
  for (size_t i; (i = run.next.fetch_add(1, std::memory_order_relaxed)) < run.count;) {
    run.task(run.user, i);
  }
}

}  // namespace

struct secateur_team {
  Parallel parallel;
  int threads;
  pid_t owner;
};

extern "C" {

secateur_team *secateur_team_create(void *gomp_parallel, int threads) {
  if (!gomp_parallel) return nullptr;
  const auto parallel = reinterpret_cast<Parallel>(gomp_parallel);
  return new (std::nothrow) secateur_team{parallel, std::max(1, threads), getpid()};
}

void secateur_team_destroy(secateur_team *team) { delete team; }

void secateur_team_run(void *context, void (*task)(void *user, size_t i), size_t count,
                       void *user) {
  const auto &team = *static_cast<secateur_team *>(context);
  Run run{task, user, count};
  const size_t threads = std::min(static_cast<size_t>(team.threads), count);
  // In a child of fork() the runtime would wait for threads that stayed with the parent.
  if (threads < 2 || getpid() != team.owner) return work(&run);
  team.parallel(work, &run, static_cast<unsigned>(threads), 0);
}
}
