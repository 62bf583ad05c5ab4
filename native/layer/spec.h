// What all parts of a layer share: its shape, its weights, and how work is spread over threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "secateur.h"

namespace secateur {

// Carries an error code of secateur.h and a message of four parts.
struct Error : std::runtime_error {
  Error(int code, const std::string &what) : std::runtime_error(what), code(code) {}
  int code;
};

// Weights as rows of (column, value); columns of a row increase. Checked: every column is below
// `columns`, and starts has rows + 1 entries that do not decrease.
struct Weights {
  int64_t rows = 0, columns = 0;
  std::vector<int64_t> starts;
  std::vector<int32_t> column;
  std::vector<float> value;
  std::vector<float> bias;  // one a row, zeros where there is none

  int64_t nonzeros() const { return static_cast<int64_t>(column.size()); }
};

// Throws Error if the numbers of a spec make no sense.
void check(const secateur_spec &spec);

// Decodes and checks a stored form. Throws Error (SECATEUR_DAMAGED) before anything out of bounds
// is read. Entries that are exactly zero are left out.
Weights decode(const secateur_spec &spec, const secateur_weights &stored);

// How a run spreads its tasks.
struct Parallel {
  secateur_parallel run = nullptr;
  void *context = nullptr;
  int threads = 1;

  // Calls task(i) for every i below count. What a task throws must not leave the thread it ran on:
  // it becomes one bad_alloc here, as tasks do nothing that can fail but take memory.
  template <typename Task>
  void operator()(size_t count, Task &&task) const {
    struct Job {
      std::remove_reference_t<Task> *task;
      std::atomic<bool> failed{false};
    } job{&task};
    const auto call = [](void *user, size_t i) {
      Job &mine = *static_cast<Job *>(user);
      try {
        (*mine.task)(i);
      } catch (...) {
        mine.failed = true;
      }
    };
    if (run && count > 1) {
      run(context, call, count, &job);
    } else {
      for (size_t i = 0; i < count; ++i) call(&job, i);
    }
    if (job.failed) throw std::bad_alloc();
  }
};

}  // namespace secateur
