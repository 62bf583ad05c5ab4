// The pool: every task once, from one and from several callers, nested, and after fork().

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "secateur.h"

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                       \
    }                                                                     \
  } while (0)

namespace {

using Pool = std::unique_ptr<secateur_pool, decltype(&secateur_pool_destroy)>;

Pool make(int threads) { return Pool(secateur_pool_create(threads), secateur_pool_destroy); }

template <typename Task>
void run(const Pool &pool, size_t count, Task task) {
  auto call = [](void *user, size_t i) { (*static_cast<Task *>(user))(i); };
  secateur_pool_run(pool.get(), call, count, &task);
}

// The caller must see what the tasks wrote: plain writes, so that a sanitizer sees a race.
bool each_once(const Pool &pool, size_t count) {
  std::vector<int> seen(count, 0);
  run(pool, count, [&](size_t i) { seen[i] += 1; });
  for (int times : seen) {
    if (times != 1) return false;
  }
  return true;
}

void wait_a_while() { std::this_thread::sleep_for(std::chrono::microseconds(300)); }

void every_task_runs_once() {
  for (int threads : {-1, 0, 1, 2, 3, 8}) {
    const Pool pool = make(threads);
    CHECK(pool && secateur_pool_threads(pool.get()) == (threads > 1 ? threads : 1));
    for (size_t count : {0u, 1u, 2u, 3u, 7u, 8u, 9u, 1000u}) CHECK(each_once(pool, count));
    for (int i = 0; i < 2000; ++i) CHECK(each_once(pool, 5));
    for (int i = 0; i < 20; ++i) {
      wait_a_while();  // the workers fall asleep
      CHECK(each_once(pool, 5));
    }
  }
}

void more_than_one_thread_works() {
  const Pool pool = make(2);
  std::mutex mutex;
  std::set<std::thread::id> who;
  run(pool, 20, [&](size_t) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    std::lock_guard<std::mutex> lock(mutex);
    who.insert(std::this_thread::get_id());
  });
  CHECK(who.size() == 2);
}

void several_callers() {
  const Pool pool = make(3);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int i = 0; i < 500; ++i) CHECK(each_once(pool, 7));
    });
  }
  for (std::thread &caller : callers) caller.join();
}

void runs_within_runs() {
  const Pool outer = make(3), inner = make(2);
  std::atomic<int> total{0};
  run(outer, 10, [&](size_t) {
    run(outer, 10, [&](size_t) { ++total; });
    run(inner, 10, [&](size_t) { ++total; });
  });
  CHECK(total == 200);
  CHECK(each_once(outer, 100));
}

void destroyed_in_any_state() {
  for (int i = 0; i < 200; ++i) {
    const Pool pool = make(3);
    if (i % 3 == 1) wait_a_while();
    if (i % 3 == 2) CHECK(each_once(pool, 4));
  }
  secateur_pool_destroy(nullptr);
}

void a_child_of_fork_works_alone() {
  Pool pool = make(3);
  CHECK(each_once(pool, 10));
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    const bool right = each_once(pool, 10);
    pool.reset();
    const bool again = each_once(make(1), 10);
    _exit(right && again ? 0 : 1);
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK(each_once(pool, 10));
}

}  // namespace

int main() {
  every_task_runs_once();
  more_than_one_thread_works();
  several_callers();
  runs_within_runs();
  destroyed_in_any_state();
  a_child_of_fork_works_alone();
  std::puts("pool: right");
}
