// Forks while threads use a File: no lock of the library stays locked in the child.

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

#include "support.h"

using namespace support;

namespace {

// Enough forks for a lock that is held 1 % of the time to be locked in some child.
constexpr int kForks = 200;

// Forks repeatedly while two threads run `work`. Each child runs `child`, and its result is the child's exit status.
void fork_while(const std::function<void()>& work, const std::function<bool()>& child) {
    std::atomic<bool> over{false};
    std::vector<std::thread> threads;
    for (int number = 0; number < 2; ++number) {
        threads.emplace_back([&] {
            while (!over) {
                work();
            }
        });
    }
    bool ended = true;
    for (int number = 0; number < kForks && ended; ++number) {
        const pid_t pid = fork();
        if (pid == 0) {
            alarm(20);  // kills a child that hangs
            _exit(child() ? 0 : 1);
        }
        int status = 1;
        ended = pid > 0 && waitpid(pid, &status, 0) == pid && status == 0;
    }
    over = true;
    for (std::thread& thread : threads) {
        thread.join();
    }
    EXPECT(ended);
}

}  // namespace

// The allocators of sanitizers have locks that are not safe in a fork.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)

TEST(forks_while_threads_use_a_file) {
    const TempDir dir;
    st::Tensors tensors;
    tensors.insert("weight", at::arange(12, at::kFloat));
    st::save_file(tensors, dir.file("f"));
    const st::File file(dir.file("f"));
    fork_while([&] { EXPECT(file.is_open() && file.size() == 1); },
               [&] {
                   st::File own = file;
                   const bool reads = own.size() == 1 && identical(own.get_tensor("weight"), tensors.at("weight"));
                   own.close();
                   return reads && !file.is_open() && st::File(dir.file("f")).size() == 1;
               });
    EXPECT(file.is_open());
}

TEST(forks_while_threads_write_a_file) {
    const TempDir dir;
    const at::Tensor weight = at::arange(12, at::kFloat);
    st::IncrementalWriter writer(dir.file("f"), st::TensorSpecs{{"weight", {at::kFloat, {12}}}});
    const auto is_refused = [](const std::function<void()>& call) {
        return ERROR_OF(call()).find("before a fork") != std::string::npos;
    };
    fork_while([&] { EXPECT(writer.is_open()); },
               [&] {
                   const bool refused = is_refused([&] { writer.write("weight", weight); }) &&
                                        is_refused([&] { writer.commit(); }) &&
                                        is_refused([&] { static_cast<void>(writer.missing()); });
                   writer.discard();
                   return refused && !writer.is_open();
               });
    writer.write("weight", weight);
    writer.commit();
    EXPECT(identical(st::load_file(dir.file("f")).at("weight"), weight));
}

#endif
