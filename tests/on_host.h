// What the programs that run code of csrc/ on the host share: a team of threads with a barrier, and numbers by standard
// input and output.

#pragma once

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

#include <pthread.h>

struct Threads {
  int index, count;
  pthread_barrier_t* barrier;
  int lane() const { return index; }
  int width() const { return count; }
  void sync() const { pthread_barrier_wait(barrier); }
};

// Calls `work` in every thread of a team.
inline void run_team(int count, const std::function<void(const Threads&)>& work) {
  pthread_barrier_t barrier;
  pthread_barrier_init(&barrier, nullptr, count);
  std::vector<std::thread> team;
  for (int index = 0; index < count; ++index) team.emplace_back(work, Threads{index, count, &barrier});
  for (auto& thread : team) thread.join();
  pthread_barrier_destroy(&barrier);
}

template <typename T>
std::vector<T> read(size_t count) {
  std::vector<T> values(count);
  if (std::fread(values.data(), sizeof(T), count, stdin) != count) std::exit(3);
  return values;
}

template <typename T>
void write(const std::vector<T>& values) {
  std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}
