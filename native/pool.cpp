// A small pool of threads, for callers that bring none (PyTorch modules; ONNX Runtime has its own).
//
// One run at a time: a run writes down its task, opens itself, and works until no task is left.
// Workers join while it is open. The caller then closes it and waits for those that joined, so a
// worker that wakes up late costs nothing. Tasks must not throw.

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "secateur.h"

namespace {

void pause_thread() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

struct secateur_pool {
  explicit secateur_pool(int threads);
  ~secateur_pool();

  void run(void (*task)(void *, size_t), size_t count, void *user);
  int threads() const { return static_cast<int>(workers_.size()) + 1; }
  // False in a child of fork(): the workers stayed with the parent.
  bool owned() const { return getpid() == owner_; }

 private:
  // The state of a run: is it open, does its caller sleep, and how many workers have joined.
  static constexpr uint32_t kOpen = 1u << 31, kAsleep = 1u << 30, kJoined = kAsleep - 1;
  static constexpr int kMostThreads = 256;
  // Layers follow each other within this time; waking a thread takes about as long.
  static constexpr std::chrono::microseconds kSpin{30};

  template <typename Ready>
  bool spin(Ready ready) const;
  void work();
  bool join();
  void leave();
  void execute();

  const pid_t owner_ = getpid();
  bool spins_ = true;
  std::vector<std::thread> workers_;

  std::atomic<bool> busy_{false};  // a run is under way
  std::atomic<uint32_t> state_{0};
  std::atomic<size_t> next_{0};
  // Written while the run is closed and nobody is joined, read by those who joined.
  void (*task_)(void *, size_t) = nullptr;
  void *user_ = nullptr;
  size_t count_ = 0;

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::atomic<uint64_t> runs_{0};  // changes under mutex_
  size_t sleepers_ = 0;            // under mutex_
  std::atomic<bool> stop_{false};  // changes under mutex_
};

secateur_pool::secateur_pool(int threads) {
  threads = std::min(threads, kMostThreads);
  // With fewer processors than threads, a spinning thread keeps a working one from running.
  spins_ = threads <= static_cast<int>(std::thread::hardware_concurrency());
  if (threads <= 1) return;
  // Signals belong to the threads of the program.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    workers_.reserve(static_cast<size_t>(threads) - 1);
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
  } catch (const std::system_error &) {
    // The system gives no more threads: the pool is as large as it got.
  } catch (const std::bad_alloc &) {
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

secateur_pool::~secateur_pool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread &worker : workers_) worker.join();
}

template <typename Ready>
bool secateur_pool::spin(Ready ready) const {
  if (!spins_) return ready();
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 16; ++i) {
      if (ready()) return true;
      pause_thread();
    }
  } while (std::chrono::steady_clock::now() < end);
  return ready();
}

void secateur_pool::execute() {
  const size_t count = count_;
  for (size_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) task_(user_, i);
}

bool secateur_pool::join() {
  uint32_t state = state_.load(std::memory_order_relaxed);
  do {
    if (!(state & kOpen)) return false;
  } while (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acquire,
                                         std::memory_order_relaxed));
  return true;
}

void secateur_pool::leave() {
  const uint32_t before = state_.fetch_sub(1, std::memory_order_acq_rel);
  if ((before & kAsleep) && (before & kJoined) == 1) {
    // The caller holds the lock from setting kAsleep until it waits, so this cannot be too early.
    { std::lock_guard<std::mutex> lock(mutex_); }
    done_.notify_one();
  }
}

void secateur_pool::work() {
  uint64_t seen = 0;
  const auto ready = [&] { return stop_.load() || runs_.load() != seen; };
  while (true) {
    if (!spin(ready)) {
      std::unique_lock<std::mutex> lock(mutex_);
      ++sleepers_;
      wake_.wait(lock, ready);
      --sleepers_;
    }
    if (stop_.load()) return;
    seen = runs_.load();
    if (!join()) continue;
    execute();
    leave();
  }
}

void secateur_pool::run(void (*task)(void *, size_t), size_t count, void *user) {
  // A second caller, or a run inside a task, does its own work: as fast as waiting for the first,
  // and it cannot deadlock.
  if (workers_.empty() || count < 2 || !owned() || busy_.exchange(true)) {
    for (size_t i = 0; i < count; ++i) task(user, i);
    return;
  }
  task_ = task;
  user_ = user;
  count_ = count;
  next_.store(0, std::memory_order_relaxed);
  state_.store(kOpen, std::memory_order_release);
  size_t sleepers;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ++runs_;
    sleepers = sleepers_;
  }
  if (sleepers < count) {
    wake_.notify_all();
  } else {
    for (size_t i = 1; i < count; ++i) wake_.notify_one();
  }

  execute();

  state_.fetch_and(~kOpen, std::memory_order_acq_rel);
  const auto empty = [this] { return !(state_.load(std::memory_order_acquire) & kJoined); };
  if (!spin(empty)) {
    std::unique_lock<std::mutex> lock(mutex_);
    state_.fetch_or(kAsleep, std::memory_order_acq_rel);
    done_.wait(lock, empty);
  }
  busy_.store(false, std::memory_order_release);
}

extern "C" {

secateur_pool *secateur_pool_create(int threads) {
  return new (std::nothrow) secateur_pool(threads);
}

void secateur_pool_destroy(secateur_pool *pool) {
  // In a child of fork() there is nothing to join; the memory is a copy that dies with the child.
  if (pool && pool->owned()) delete pool;
}

int secateur_pool_threads(const secateur_pool *pool) { return pool ? pool->threads() : 1; }

void secateur_pool_run(void *pool, void (*task)(void *user, size_t i), size_t count, void *user) {
  static_cast<secateur_pool *>(pool)->run(task, count, user);
}
}
